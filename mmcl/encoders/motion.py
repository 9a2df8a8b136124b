"""``tiny_motion``: a small tower for the motion vectors of compressed video."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from mmcl.encoders.base import Encoder
from mmcl.encoders.options import TowerCommon
from mmcl.encoders.video import ResidualConv2d, group_norm
from mmcl.types import ConfigError, Features, MotionSpec


class TinyMotionOptions(TowerCommon):
    """A convolutional network per map with a first layer of stride 1, then a convolution and a mean over time."""

    name: Literal["tiny_motion"] = "tiny_motion"
    width: int = Field(default=128, ge=8, multiple_of=8)
    """``D`` of its features"""
    channels: int = Field(default=32, ge=8, multiple_of=8)
    """channels after the first layer"""
    size: int = Field(default=64, ge=16, le=4096)
    """pixels, height = width, of the pictures that move; as the video tower's, so that crops are the same"""
    cell: int = Field(default=4, ge=1, le=64)
    """pixels that one vector stands for; ``size / cell`` must be a multiple of 4"""
    frames: int = Field(default=8, ge=1, le=4096)
    stride: int | None = Field(default=1, ge=1)
    """take every such frame of the source; null: as many per second as ``fps``"""
    fps: float = Field(default=25.0, ge=0.001, le=1000)
    fit: Literal["crop", "squash"] = "squash"
    """as the video tower's"""
    keyframes: Literal["hold", "zero"] = "hold"
    """they have no vectors: those of the frame before, or none"""
    corrected: bool = True
    """velocities are scaled with the picture and turned round with a flip; false: neither, as in the official code of
    context and motion decoupling"""
    limit: float = Field(default=10.0, gt=0)
    """pixels per frame that velocities are cut at, and divided by"""


class TinyMotion(Encoder):
    """float32 ``(B, T, 2, S, S)``, any ``T`` and any ``S`` divisible by 4, to ``S/4 · S/4`` tokens of all times."""

    def __init__(self, options: TinyMotionOptions) -> None:
        super().__init__()
        if options.size % (4 * options.cell):
            nearest = max(4, round(options.size / options.cell / 4) * 4) * options.cell
            raise ConfigError(
                f"tower tiny_motion: size {options.size} is no multiple of 4 × cell {options.cell}; nearest: {nearest}"
            )
        self.spec = MotionSpec(
            frames=options.frames,
            size=options.size,
            cell=options.cell,
            fps=options.fps,
            fit=options.fit,
            stride=options.stride,
            keyframes=options.keyframes,
            corrected=options.corrected,
        )
        self.width, self.limit = options.width, options.limit
        channels, width = options.channels, options.width
        self.frame = nn.Sequential(
            nn.Conv2d(2, channels, 3, padding=1),
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

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Features:
        """``x``: float32 ``(B, T, 2, S, S)``; ``mask`` is not used. Tokens unfold to the grid ``(1, S/4, S/4)``."""
        B, T = x.shape[:2]  # noqa: N806
        velocities = x.clamp(-self.limit, self.limit).to(self.time.weight.dtype) / self.limit
        maps = self.frame(velocities.flatten(0, 1))
        D, H, W = maps.shape[1:]  # noqa: N806
        places = maps.view(B, T, D, H * W).permute(0, 3, 2, 1).reshape(B * H * W, D, T)
        steps = self.time(F.gelu(self.time_norm(places.transpose(1, 2))).transpose(1, 2))
        tokens = self.norm((places + steps).mean(2).view(B, H * W, D))
        return Features(tokens.mean(1), tokens, grid=(1, H, W))
