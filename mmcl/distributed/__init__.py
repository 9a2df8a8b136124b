"""Ranks as one: gathers and sums with gradients, and contrastive losses of the whole batch, tile by tile."""

from mmcl.distributed.comm import Comm
from mmcl.distributed.contrastive import contrastive, contrastive_pairs, view_contrastive
from mmcl.distributed.pair import Form, Pair

__all__ = ["Comm", "Form", "Pair", "contrastive", "contrastive_pairs", "view_contrastive"]
