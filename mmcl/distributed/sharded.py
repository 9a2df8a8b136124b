"""Tensors split over ranks, as safetensors that any number of ranks can read (torch's distributed checkpoints).

torch's own format holds pickles; the one of Hugging Face, which torch writes as well, holds none.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

FOLDER = "sharded"
"""inside a checkpoint"""


def write_sharded(folder: Path, tensors: Mapping[str, Tensor], group: dist.ProcessGroup | None = None) -> None:
    """Writes what this rank holds; every rank of the group calls it, and all fail where one does.

    Raises:
        OSError: some rank could not write.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.state_dict_saver import save

    try:
        writer = _storage("Writer")(str(folder), save_distributed=True)
        save(dict(tensors), storage_writer=writer, process_group=group)
    except CheckpointException as error:
        raise OSError(" ".join(str(error).split())[-300:]) from None


def read_sharded(folder: Path, tensors: Mapping[str, Tensor], *, alone: bool) -> None:
    """Fills ``tensors``, whole or split, with those of the same names; whole ones ``alone``, split ones on all ranks.

    Raises:
        ValueError: one is not there or of another shape.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.state_dict_loader import load

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            load(dict(tensors), storage_reader=_storage("Reader")(str(folder)), no_dist=alone)
    except (CheckpointException, RuntimeError, OSError, KeyError) as error:
        raise ValueError(" ".join(str(error).split())[-300:]) from None


def _storage(kind: str) -> Any:
    import torch.distributed.checkpoint as dcp

    found = getattr(dcp, f"HuggingFaceStorage{kind}", None)
    if found is None:
        raise ValueError("split checkpoints need torch 2.9 or later")
    return found
