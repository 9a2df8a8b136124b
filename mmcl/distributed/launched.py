"""Programs that a launcher starts several times."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist


@contextmanager
def launched() -> Iterator[None]:
    """Joins the processes that ``accelerate launch`` or ``torchrun`` started, and leaves them at the end.

    Does nothing for a program that was started alone. ``Comm.current()`` is the group then.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    # a CPU tensor travels too, whatever the device of the model
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield
    finally:
        # without this a process sometimes aborts at exit and the launcher reports a failure
        dist.destroy_process_group()
