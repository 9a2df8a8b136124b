"""Projections from ``pooled`` to the joint space."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from mmcl.config import Options
from mmcl.layers import MLPHead


class HeadOptions(Options):
    """The projection from ``pooled`` to the joint space: linear (1 layer) or an MLP."""

    layers: Annotated[int, Field(ge=1, le=4)] = 1
    hidden: Annotated[int, Field(ge=1)] = 512
    norm: Literal["none", "batch", "layer"] = "none"
    """before each activation; ``batch``: over the present rows of all ranks"""
    activation: Literal["gelu", "relu", "silu"] = "gelu"

    def build(self, width: int, out: int) -> MLPHead:
        """The head, freshly initialised."""
        return MLPHead(width, self.hidden, out, self.layers, self.norm, self.activation)


def unit_projection(head: nn.Module, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """Unit rows in float32, also under autocast: cosines near 1 need the bits."""
    with torch.autocast(x.device.type, enabled=False):
        projected: Tensor = head(x if x.dtype == torch.float64 else x.float(), mask)
        return F.normalize(projected, dim=-1)
