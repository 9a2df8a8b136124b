"""Ranks as one: gathers and sums with gradients, and contrastive losses of the whole batch, tile by tile."""

from mmcl.distributed.comm import Comm
from mmcl.distributed.contrastive import Form, contrastive, view_contrastive

__all__ = ["Comm", "Form", "contrastive", "view_contrastive"]
