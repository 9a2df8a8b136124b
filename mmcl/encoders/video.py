"""``tiny_video``: a small tower for short clips and pictures that trains on two cores."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from mmcl.encoders.base import Encoder
from mmcl.encoders.options import TowerCommon
from mmcl.types import Features, VideoSpec


class TinyVideoOptions(TowerCommon):
    """A convolutional network per frame, then a convolution over time."""

    name: Literal["tiny_video"] = "tiny_video"
    width: int = Field(default=128, ge=8, multiple_of=8)
    """``D`` of its features"""
    channels: int = Field(default=32, ge=8, multiple_of=8)
    """channels after the first layer"""
    size: int = Field(default=64, ge=16, le=4096, multiple_of=16)
    """pixels, height = width"""
    frames: int = Field(default=4, ge=1, le=4096)
    fps: float = Field(default=2.0, ge=0.001, le=1000)
    """frames per second at which a window is sampled; a window lasts ``frames / fps`` seconds"""
    stride: int | None = Field(default=None, ge=1)
    """take every such frame of the source, at whatever rate it has, instead of ``fps``"""
    fit: Literal["crop", "squash"] = "squash"
    """scale both sides, so that so small a picture keeps its edges, or scale the short side and crop the centre"""
    dropout: float = Field(default=0.0, ge=0, lt=1)


def group_norm(channels: int) -> nn.GroupNorm:
    """Statistics of one sample alone, over groups of 8 channels."""
    return nn.GroupNorm(channels // 8, channels)


class ResidualConv2d(nn.Module):
    """x + conv(gelu(norm(x))), a square kernel."""

    def __init__(self, channels: int, kernel: int = 3) -> None:
        super().__init__()
        self.norm = group_norm(channels)
        self.conv = nn.Conv2d(channels, channels, kernel, padding=kernel // 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.conv(F.gelu(self.norm(x)))
        return out


class TinyVideo(Encoder):
    """uint8 ``(B, T, C, H, W)``, any ``T`` and any ``H = W`` divisible by 16, to ``T · H/16 · W/16`` tokens.

    A picture is a clip of one frame: the convolution over time pads with zeros, so ``T = 1`` needs no special case.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, options: TinyVideoOptions) -> None:
        super().__init__()
        spec = self.spec = VideoSpec(
            frames=options.frames, size=options.size, fps=options.fps, fit=options.fit, stride=options.stride
        )
        self.width = options.width
        channels, width = options.channels, options.width
        self.stages = (("early", channels), ("middle", 2 * channels))
        self.register_buffer("mean", torch.tensor(spec.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(spec.std).view(3, 1, 1), persistent=False)
        self.frame = nn.Sequential(
            nn.Conv2d(3, channels, 4, stride=4),
            ResidualConv2d(channels),
            group_norm(channels),
            nn.Conv2d(channels, 2 * channels, 2, stride=2),
            ResidualConv2d(2 * channels),
            group_norm(2 * channels),
            nn.Conv2d(2 * channels, width, 2, stride=2),
            ResidualConv2d(width),
        )
        self.time_norm = nn.LayerNorm(width)
        self.time = nn.Conv1d(width, width, 3, padding=1)
        self.norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(options.dropout)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Features:
        """``x``: uint8 ``(B, T, C, H, W)``; ``mask`` is not used. Tokens unfold to the grid ``(T, H/16, W/16)``."""
        B, T = x.shape[:2]  # noqa: N806
        pixels = (x.flatten(0, 1).to(self.mean.dtype) / 255 - self.mean) / self.std
        maps = pixels.contiguous(memory_format=torch.channels_last)
        stages = {}
        for name, part in (("early", self.frame[:3]), ("middle", self.frame[3:6]), ("", self.frame[6:])):
            maps = part(maps)
            if name:
                stages[name] = maps.unflatten(0, (B, T)).movedim(2, -1)
        _, D, H, W = maps.shape  # noqa: N806
        maps = maps.view(B, T, D, H, W).permute(0, 1, 3, 4, 2)
        motion = F.gelu(self.time_norm(maps.mean((2, 3)))).transpose(1, 2)
        maps = maps + self.time(motion).transpose(1, 2)[:, :, None, None]
        tokens = self.dropout(self.norm(maps.reshape(B, T * H * W, D)))
        return Features(tokens.mean(1), tokens, grid=(T, H, W), stages=stages)

    def blocks(self) -> list[nn.Module]:
        return [*self.frame, self.time]
