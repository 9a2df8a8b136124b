"""``tiny_text``: a small tower for captions, on bytes: nothing to download, any language."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from mmcl.encoders.base import Encoder
from mmcl.encoders.options import TowerCommon
from mmcl.media.text import ByteTokenizer
from mmcl.types import Features, TextSpec


class TinyTextOptions(TowerCommon):
    """Byte embeddings and convolutions over them."""

    name: Literal["tiny_text"] = "tiny_text"
    width: int = Field(default=128, ge=8)
    """``D`` of its features"""
    depth: int = Field(default=2, ge=1)
    """residual convolutions, each five bytes wide"""
    max_tokens: int = Field(default=64, ge=1)
    """longer captions are cut"""
    dropout: float = Field(default=0.0, ge=0, lt=1)


class ResidualConv1d(nn.Module):
    """x + conv(gelu(norm(x))) over tokens, five wide; padding changes nothing."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.conv = nn.Conv1d(width, width, 5, padding=2)

    def forward(self, x: Tensor, real: Tensor) -> Tensor:
        """``x``: float ``(B, L, D)``; ``real``: bool ``(B, L, 1)``."""
        # zeroed padding is what the convolution's own padding holds: a row does not feel how far it was padded
        inner = F.gelu(self.norm(x)).masked_fill(~real, 0.0)
        out: Tensor = x + self.conv(inner.transpose(1, 2)).transpose(1, 2)
        return out


class TinyText(Encoder):
    """ids int64 ``(B, L)`` of a ``ByteTokenizer`` (0 is padding) to ``L`` tokens; padding changes nothing."""

    def __init__(self, options: TinyTextOptions) -> None:
        super().__init__()
        self.spec = TextSpec(ByteTokenizer(max_tokens=options.max_tokens))
        self.width = width = options.width
        self.embedding = nn.Embedding(257, width)
        self.layers = nn.ModuleList(ResidualConv1d(width) for _ in range(options.depth))
        self.norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(options.dropout)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Features:
        """``x``: int64 ``(B, L)``; ``mask``: bool ``(B, L)``, at least one True a row (None: all are tokens)."""
        if mask is None:
            mask = torch.ones_like(x, dtype=torch.bool)
        real = mask[:, :, None]
        tokens = self.embedding(x)
        for layer in self.layers:
            tokens = layer(tokens, real)
        tokens = self.dropout(self.norm(tokens)).masked_fill(~real, 0.0)
        pooled = tokens.sum(1) / mask.sum(1, keepdim=True).clamp(min=1).to(tokens.dtype)
        return Features(pooled, tokens, mask)

    def blocks(self) -> list[nn.Module]:
        return list(self.layers)
