"""Streams of batches from indexed shards."""

from mmcl.data.order import sample_order
from mmcl.data.stream import ClipStream

__all__ = ["ClipStream", "sample_order"]
