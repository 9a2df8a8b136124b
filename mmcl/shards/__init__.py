"""Indexed WebDataset shards: plain tar files, with a table beside them that says where every member lies."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmcl.shards.make import make_shards
    from mmcl.shards.make_options import MakeOptions, MakeReport
    from mmcl.shards.manifest import Manifest, load_manifest, write_manifest
    from mmcl.shards.members import Sample, parse_sample
    from mmcl.shards.reader import RawSample, ShardReader
    from mmcl.shards.writer import ShardWriter

__all__ = [
    "MakeOptions",
    "MakeReport",
    "Manifest",
    "RawSample",
    "Sample",
    "ShardReader",
    "ShardWriter",
    "load_manifest",
    "make_shards",
    "parse_sample",
    "write_manifest",
]

_HOME = {
    "MakeOptions": "make_options",
    "MakeReport": "make_options",
    "Manifest": "manifest",
    "RawSample": "reader",
    "Sample": "members",
    "ShardReader": "reader",
    "ShardWriter": "writer",
    "load_manifest": "manifest",
    "make_shards": "make",
    "parse_sample": "members",
    "write_manifest": "manifest",
}


def __getattr__(name: str) -> Any:
    # Imported when first used: the command line mounts `mmcl.shards.commands` without numpy or PyAV.
    if name in _HOME:
        return getattr(importlib.import_module(f"mmcl.shards.{_HOME[name]}"), name)
    raise AttributeError(f"module 'mmcl.shards' has no attribute {name!r}")
