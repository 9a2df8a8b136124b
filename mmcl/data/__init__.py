"""Streams of batches from indexed shards."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mmcl.data.order import sample_order

if TYPE_CHECKING:
    from mmcl.data.stream import ClipStream

__all__ = ["ClipStream", "sample_order"]


def __getattr__(name: str) -> Any:
    # Imported when first used: the order of samples alone needs no torch.
    if name == "ClipStream":
        from mmcl.data.stream import ClipStream

        return ClipStream
    raise AttributeError(f"module 'mmcl.data' has no attribute {name!r}")
