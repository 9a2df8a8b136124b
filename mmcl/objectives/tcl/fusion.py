"""The fusion tower: tokens of one modality, a text where there is one, attend to those of another."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmcl.distributed import Comm
from mmcl.objectives.tcl.options import FusionOptions


class Tokens(NamedTuple):
    """Tokens of some samples."""

    values: Tensor
    """``(N, L, D)``"""
    mask: Tensor
    """bool ``(N, L)``: which are real"""

    def pick(self, numbers: Tensor) -> Tokens:
        return Tokens(self.values[numbers], self.mask[numbers])

    def of_all_ranks(self, comm: Comm) -> Tokens:
        """Gathered in draw order, with gradients, padded to the longest of all ranks."""
        return Tokens(comm.gather(self.values, pad=True), comm.gather(self.mask, pad=True))

    def at_least_one(self) -> Tokens:
        """With a row of zeros where there is none, so that a rank without rows still runs every parameter."""
        missing = int(len(self.values) == 0)
        return Tokens(F.pad(self.values, (0, 0, 0, 0, 0, missing)), F.pad(self.mask, (0, 0, 0, missing)))


class Fusion(nn.Module):
    """Layers of self-attention over the reading tokens, cross-attention to the context, and an MLP (norms first).

    A learned token is put before the reading ones: its output stands for the pair, as BERT's [CLS] does.
    """

    def __init__(self, reading: int, context: int, options: FusionOptions) -> None:
        super().__init__()
        width = options.width
        self.reading, self.context = nn.Linear(reading, width), nn.Linear(context, width)
        self.reading_norm, self.context_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.pair = nn.Parameter(0.02 * torch.randn(width))
        self.layers = nn.ModuleList(
            nn.TransformerDecoderLayer(
                width,
                options.heads,
                options.hidden,
                options.dropout,
                activation=F.gelu,
                batch_first=True,
                norm_first=True,
            )
            for _ in range(options.layers)
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, reading: Tokens, context: Tokens) -> Tensor:
        """``(P, 1 + L, width)``: the pair's output, then one of each reading token."""
        x = self.reading_norm(self.reading(reading.values.to(self.reading.weight.dtype)))
        memory = self.context_norm(self.context(context.values.to(self.context.weight.dtype)))
        x = torch.cat([self.pair.to(x.dtype).expand(len(x), 1, -1), x], 1)
        absent = F.pad(~reading.mask, (1, 0))
        nothing = ~context.mask
        nothing = nothing & ~nothing.all(1, keepdim=True)  # attention over no token at all would be NaN
        for layer in self.layers:
            x = layer(x, memory, tgt_key_padding_mask=absent, memory_key_padding_mask=nothing)
        out: Tensor = self.norm(x)
        return out
