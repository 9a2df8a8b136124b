"""``slow_r50``: the Slow pathway alone of SlowFast networks (Feichtenhofer et al. 2019, arXiv 1812.03982, table 1)."""

from __future__ import annotations

import re
from typing import Annotated, Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from mmcl.encoders.norms import Norm, batch_norm
from mmcl.encoders.pixels import NormedOptions, VideoEncoder, renamed, video_spec
from mmcl.encoders.torchvision_video import from_maps
from mmcl.types import Features

_TIME_KERNELS = (1, 1, 3, 3)
"""of the first convolution of the blocks of each stage: only the last two stages look along time"""

_PARTS = {"branch1": "shortcut", "a": "a", "b": "b", "c": "c"}


class SlowOptions(NormedOptions):
    """Slow-only R50 8×8, the backbone of arXiv 2104.14558: every eighth frame, eight of them, at 224 pixels."""

    name: Literal["slow_r50"] = "slow_r50"
    stride: Annotated[int, Field(ge=1)] | None = 8
    """take every such frame of the source, at whatever rate it has; null: frames at ``fps``"""
    size: Annotated[int, Field(ge=32, le=4096)] = 224
    """pixels, height = width"""
    norm: Norm = "rank"
    """batch norm takes the statistics of all ranks' present rows, as the paper trains it, which the gradient cache
    refuses, or keeps those it has"""
    depth: tuple[Annotated[int, Field(ge=1)], ...] = Field(default=(3, 4, 6, 3), min_length=4, max_length=4)
    """blocks of each stage"""
    channels: int = Field(default=64, ge=8)
    """after the first convolution; ``D`` is 32 times that"""


class _ConvNorm(nn.Module):
    """A convolution without bias and its norm."""

    def __init__(self, width: int, out: int, kernel: tuple[int, int, int], stride: int, norm: Norm) -> None:
        super().__init__()
        padding = (kernel[0] // 2, kernel[1] // 2, kernel[2] // 2)
        self.conv = nn.Conv3d(width, out, kernel, stride=(1, stride, stride), padding=padding, bias=False)
        self.norm = batch_norm(norm)(out)
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(self.conv(x))
        return out


class _Stem(nn.Module):
    def __init__(self, channels: int, norm: Norm) -> None:
        super().__init__()
        self.first = _ConvNorm(3, channels, (1, 7, 7), 2, norm)

    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool3d(F.relu(self.first(x)), (1, 3, 3), stride=(1, 2, 2), padding=(0, 1, 1))


class _Bottleneck(nn.Module):
    """Kernels ``t×1×1``, ``1×3×3``, ``1×1×1`` beside a shortcut; the second one strides."""

    def __init__(self, width: int, inner: int, time_kernel: int, stride: int, norm: Norm) -> None:
        super().__init__()
        out = 4 * inner
        self.a = _ConvNorm(width, inner, (time_kernel, 1, 1), 1, norm)
        self.b = _ConvNorm(inner, inner, (1, 3, 3), stride, norm)
        self.c = _ConvNorm(inner, out, (1, 1, 1), 1, norm)
        self.shortcut = nn.Identity() if width == out else _ConvNorm(width, out, (1, 1, 1), stride, norm)
        # a block begins as its shortcut: without batch statistics fifty layers would blow up what passes through them
        nn.init.zeros_(self.c.norm.get_parameter("weight"))

    def forward(self, x: Tensor) -> Tensor:
        inner = F.relu(self.b(F.relu(self.a(x))))
        return F.relu(self.shortcut(x) + self.c(inner))


class SlowR50(VideoEncoder):
    """uint8 ``(B, T, C, H, W)`` to ``T · H/32 · W/32`` tokens and their mean; time is never strided.

    31.6 million weights. Begins with the last norm of each block at zero, as the authors train it.
    """

    def __init__(self, options: SlowOptions) -> None:
        # eight frames of every eighth last 64 frames; pictures, and sources without a rate, count 30 a second
        super().__init__(
            video_spec(
                options, frames=8, fps=30 / 8, size=options.size, mean=(0.45, 0.45, 0.45), std=(0.225, 0.225, 0.225)
            )
        )
        channels = options.channels
        self.width = 32 * channels
        self.stages = tuple((f"res{number + 2}", channels * 4 * 2**number) for number in range(4))
        self.stem = _Stem(channels, options.norm)
        stages: list[nn.Sequential] = []
        width = channels
        for number, (count, kernel) in enumerate(zip(options.depth, _TIME_KERNELS, strict=True)):
            stage = nn.Sequential()
            for block in range(count):
                stride = 2 if block == 0 and number > 0 else 1
                stage.append(_Bottleneck(width, channels * 2**number, kernel, stride, options.norm))
                width = channels * 4 * 2**number
            stages.append(stage)
        self.res = nn.ModuleList(stages)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Features:
        """``x``: uint8 ``(B, T, C, H, W)``; ``mask`` is not used. Tokens unfold to ``(T, H/32, W/32)``."""
        maps = self.stem(self.normalised(x).transpose(1, 2))
        stages = {}
        for stage, (name, _) in zip(self.res, self.stages, strict=True):
            maps = stage(maps)
            stages[name] = maps.movedim(1, -1)
        features = from_maps(maps)
        return Features(features.pooled, features.tokens, grid=features.grid, stages=stages)

    def blocks(self) -> list[nn.Module]:
        """The stem and each residual block."""
        return [self.stem, *(block for stage in self.res for block in stage.children())]

    def foreign(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Names of SlowFast's and of PyTorchVideo's checkpoints, without classifiers and heads."""
        found = {own: tensor for name, tensor in tensors.items() if (own := _own_name(name)) is not None}
        return renamed(found, "")


def _own_name(name: str) -> str | None:
    """None: of a part that is not ours.

    >>> _own_name("s4.pathway0_res1.branch2.a_bn.running_var"), _own_name("blocks.1.res_blocks.0.branch1_conv.weight")
    ('res.2.1.a.norm.running_var', 'res.0.0.shortcut.conv.weight')
    """
    name = name.removeprefix("backbone.")
    if name.startswith(("stem.", "res.")):
        return name
    if found := re.fullmatch(r"(?:s1\.pathway0_stem|blocks\.0)\.(conv|bn|norm)\.(\w+)", name):
        return f"stem.first.{'conv' if found[1] == 'conv' else 'norm'}.{found[2]}"
    slowfast = re.fullmatch(r"s(\d)\.pathway0_res(\d+)\.(?:branch2\.)?(branch1|[abc])(_bn)?\.(\w+)", name)
    if slowfast:
        stage, block, part, norm, tensor = slowfast.groups()
        return f"res.{int(stage) - 2}.{block}.{_PARTS[part]}.{'norm' if norm else 'conv'}.{tensor}"
    if found := re.fullmatch(r"blocks\.(\d)\.res_blocks\.(\d+)\.branch1_(conv|norm)\.(\w+)", name):
        return f"res.{int(found[1]) - 1}.{found[2]}.shortcut.{found[3]}.{found[4]}"
    if found := re.fullmatch(r"blocks\.(\d)\.res_blocks\.(\d+)\.branch2\.(conv|norm)_([abc])\.(\w+)", name):
        return f"res.{int(found[1]) - 1}.{found[2]}.{found[4]}.{found[3]}.{found[5]}"
    return None
