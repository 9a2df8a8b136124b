"""The approximate index of faiss beside embeddings: built once, and again when the rows are others."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from mmcl.types import ConfigError, RunError

FLAT_ROWS = 10_000
"""up to so many, faiss compares all"""
PROBED_SHARE = 1 / 16
"""of the lists of an inverted file that a query looks into"""
LEARNED_ROWS = 40
"""per list, from which its centre is learned"""


def near_index(path: Path, source: str, total: int, chunks: Callable[[], Iterable[tuple[int, Tensor]]]) -> Any:
    """The index at ``path``, memory-mapped; built if it is missing, damaged or made from other rows.

    Args:
        source: checksum of the rows, kept beside the index.
        total: how many rows there are.
        chunks: gives the rows, float32 ``(n, D)``, in their order.

    Raises:
        ConfigError: faiss is not installed.
        RunError: the folder cannot be written.
    """
    try:
        import faiss
    except ImportError:
        raise ConfigError("--index faiss needs faiss: pip install 'mmcl[faiss]'") from None
    try:
        told = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        if isinstance(told, dict) and told.get("source") == source:
            return faiss.read_index(str(path), faiss.IO_FLAG_MMAP | faiss.IO_FLAG_READ_ONLY)
    except (OSError, ValueError, RuntimeError):  # not there, cut short, or of another version
        pass
    index = _built(faiss, total, chunks)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(exist_ok=True)
        path.with_suffix(".json").unlink(missing_ok=True)
        faiss.write_index(index, str(temporary))
        temporary.replace(path)
        path.with_suffix(".json").write_text(json.dumps({"source": source, "rows": total}) + "\n", encoding="utf-8")
    except (OSError, RuntimeError) as error:
        words = getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
        raise RunError(f"cannot write {path}: {words}") from None
    finally:
        temporary.unlink(missing_ok=True)
    return index


def _built(faiss: Any, total: int, chunks: Callable[[], Iterable[tuple[int, Tensor]]]) -> Any:
    index = None
    for _, rows in chunks():
        if index is None:
            index = faiss.IndexFlatIP(rows.shape[1])
            if total > FLAT_ROWS:
                lists = int(4 * total**0.5)
                every = max(1, total // (LEARNED_ROWS * lists))
                index = faiss.IndexIVFFlat(index, rows.shape[1], lists, faiss.METRIC_INNER_PRODUCT)
                index.train(np.concatenate([part[::every].numpy() for _, part in chunks()]))
                index.nprobe = max(8, int(lists * PROBED_SHARE))
        index.add(rows.numpy())
    return index
