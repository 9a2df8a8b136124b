"""From one vector a frame to one a clip: the similarity heads of CLIP4Clip (Luo et al. 2021, arXiv 2104.08860)."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from mmcl.config import Options

Pooling: TypeAlias = Literal["mean", "attention", "transformer", "lstm"]


class TemporalOptions(Options):
    """How frames become a clip. All but ``mean`` know the order of frames; what they find is added to the frames."""

    pool: Pooling = "mean"
    """``transformer`` and ``lstm`` are CLIP4Clip's seqTransf and seqLSTM, ``attention`` one learned query"""
    layers: Annotated[int, Field(ge=1)] = 4
    """of the transformer"""
    heads: Annotated[int, Field(ge=1)] | None = None
    """of attention; null: one for 64 numbers"""


class TemporalHead(nn.Module):
    """``(B, T, D)`` to the pooled ``(B, D)`` and frames that know their neighbours ``(B, T, D)``.

    Positions are learned for ``frames`` of them and interpolated where a clip has another number.
    """

    def __init__(self, options: TemporalOptions, width: int, frames: int) -> None:
        super().__init__()
        self.pool = options.pool
        heads = max(1, width // 64) if options.heads is None else options.heads
        if width % heads and options.pool in ("attention", "transformer"):
            raise ValueError(f"{width} numbers a frame cannot be shared by {heads} heads")
        if options.pool in ("attention", "transformer"):
            self.positions = nn.Parameter(0.02 * torch.randn(frames, width))
        if options.pool == "attention":
            self.query = nn.Parameter(0.02 * torch.randn(1, 1, width))
            self.norm = nn.LayerNorm(width)
            self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        elif options.pool == "transformer":
            self.layers = nn.ModuleList(
                nn.TransformerEncoderLayer(
                    width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
                )
                for _ in range(options.layers)
            )
        elif options.pool == "lstm":
            self.lstm = nn.LSTM(width, width, batch_first=True)

    def forward(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """float ``(B, T, D)``."""
        if self.pool == "attention":
            keys = self.norm(frames + self._positions(frames.shape[1]))
            found = self.attention(self.query.expand(len(frames), -1, -1), keys, keys, need_weights=False)[0]
            return frames.mean(1) + found[:, 0], frames
        if self.pool == "transformer":
            inner = frames + self._positions(frames.shape[1])
            for block in self.layers:
                inner = block(inner)
            frames = frames + inner
        elif self.pool == "lstm":
            frames = frames + self.lstm(frames)[0]
        return frames.mean(1), frames

    def _positions(self, frames: int) -> Tensor:
        if frames == len(self.positions):
            return self.positions
        rows = self.positions.T[None]
        return F.interpolate(rows, frames, mode="linear", align_corners=False)[0].T
