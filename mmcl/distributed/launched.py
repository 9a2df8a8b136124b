"""Programs that a launcher starts several times."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

_joined = itertools.count()


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
    # a group that this program had before left the addresses of its processes in the launcher's store: under names of
    # our own nobody takes them for the new ones
    store, rank, world_size = next(rendezvous("env://"))
    dist.init_process_group(
        # a CPU tensor travels too, whatever the device of the model
        "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
        store=PrefixStore(f"launched/{next(_joined)}", store),
        rank=rank,
        world_size=world_size,
    )
    try:
        yield
    finally:
        # without this a process sometimes aborts at exit and the launcher reports a failure
        dist.destroy_process_group()
