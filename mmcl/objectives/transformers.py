"""What the transformers that objectives own share: their options, and rows in chunks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mmcl.config import Options
from mmcl.objectives.views import PositiveInt


class TransformerOptions(Options):
    """Its size, and how much of a batch it takes at once."""

    width: PositiveInt = 256
    layers: PositiveInt = 2
    heads: PositiveInt = 4
    hidden: PositiveInt = 1024
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    chunk: PositiveInt = 64
    """rows, or pairs of them, at once; of more, activations are made again in the backward pass"""

    @model_validator(mode="after")
    def _divides(self) -> TransformerOptions:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} must be a multiple of heads, {self.heads}")
        return self


def in_chunks(run: Callable[[Tensor], Tensor], pairs: Tensor, size: int) -> Tensor:
    """``run`` on at most ``size`` of ``pairs`` at once, joined; activations of more than one chunk are made again."""
    if len(pairs) <= size:
        return run(pairs)
    return torch.cat([checkpoint(run, part, use_reentrant=False) for part in torch.split(pairs, size)])
