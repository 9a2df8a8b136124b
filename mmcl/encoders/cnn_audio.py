"""Convolutional audio towers of our own on log-mel: ``cnn14`` (PANNs), ``resnet_mel`` and ``sfx_cnn``."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from mmcl.encoders.base import Encoder
from mmcl.encoders.front_ends import MelSpectrum, decibels, sounding
from mmcl.encoders.norms import Norm, batch_norm
from mmcl.encoders.options import TowerCommon
from mmcl.encoders.video import group_norm
from mmcl.types import AudioSpec, Features

SFX_RATE_HZ, SFX_HOP, SFX_FRAMES = 44_100, 1024, 100
SFX_TOP = 9.457798957824707
"""the largest log-mel value of what ``sfx_cnn`` was trained on"""


class Cnn14Options(TowerCommon):
    """The CNN14 architecture of PANNs (Kong et al. 2019, arXiv 1912.10211, table 1)."""

    name: Literal["cnn14"] = "cnn14"
    channels: int = Field(default=64, ge=8, multiple_of=8)
    """of the first of six blocks, each with twice as many as the one before; 64 as published"""
    norm: Norm = "rank"
    """batch norm over the rows of all ranks, or with the statistics that published weights bring (``frozen``)"""
    seconds: float = Field(default=10.0, ge=1, le=3600)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """after each block; published weights were trained with 0.2"""


class ResnetMelOptions(TowerCommon):
    """A residual network (He et al. 2015, arXiv 1512.03385, with norms first) on log-mel; norms are of one sample."""

    name: Literal["resnet_mel"] = "resnet_mel"
    channels: int = Field(default=64, ge=8, multiple_of=8)
    """of the first stage; each further one has twice as many"""
    depths: tuple[int, ...] = Field(default=(2, 2, 2, 2), min_length=1, max_length=5)
    """residual blocks of each stage; ResNet-18 has (2, 2, 2, 2), ResNet-34 (3, 4, 6, 3)"""
    sample_rate_hz: int = Field(default=16_000, ge=8_000)
    seconds: float = Field(default=5.0, ge=0.5, le=3600)
    mels: int = Field(default=64, ge=32, multiple_of=32)


class SfxCnnOptions(TowerCommon):
    """The network of aisfx (Ma and Lerch 2022) for sound effects: ``pretrained: package:aisfx``."""

    name: Literal["sfx_cnn"] = "sfx_cnn"
    blocks: int = Field(default=2, ge=1, le=1000)
    """a window is so many blocks of 2.3 seconds, whose embeddings are averaged"""
    norm: Norm = "frozen"
    """batch norm with the statistics that its weights bring, or over the rows of all ranks (``rank``)"""


class _ConvBlock(nn.Module):
    """Two 3 × 3 convolutions, each with batch norm and ReLU."""

    def __init__(self, inside: int, outside: int, norm: Norm) -> None:
        super().__init__()
        make = batch_norm(norm)
        self.conv1 = nn.Conv2d(inside, outside, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(outside, outside, 3, padding=1, bias=False)
        self.bn1, self.bn2 = make(outside), make(outside)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))


class Cnn14(Encoder):
    """float32 ``(B, S)`` at 32 kHz, a second at least, to a token every 0.32 s. Names of its weights are PANNs' own."""

    def __init__(self, options: Cnn14Options) -> None:
        super().__init__()
        self.spec = AudioSpec(32_000, options.seconds)
        self.mel = MelSpectrum(
            32_000, mels=64, fourier=1024, hop=320, low_hz=50, high_hz=14_000, scale="slaney", norm="slaney"
        )
        widths = [1, *(options.channels << n for n in range(6))]
        self.width = widths[-1]
        self.bn0 = batch_norm(options.norm)(64)
        for n in range(6):
            self.add_module(f"conv_block{n + 1}", _ConvBlock(widths[n], widths[n + 1], options.norm))
        self.fc1 = nn.Linear(self.width, self.width)
        self.dropout = options.dropout

    def blocks(self) -> list[nn.Module]:
        """Its six blocks and the layer after them."""
        return [*(getattr(self, f"conv_block{n}") for n in range(1, 7)), self.fc1]

    def foreign(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """PANNs' names, without its front end and its classifier."""
        gone = ("spectrogram_extractor.", "logmel_extractor.", "fc_audioset.")
        return {name: t for name, t in tensors.items() if not name.startswith(gone)}

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Features:
        """``x``: float32 ``(B, S)``; ``mask`` is not used: silence is sound."""
        maps = self.bn0(decibels(self.mel(x)).unsqueeze(3))  # (B, M, time, 1)
        maps = maps.permute(0, 3, 2, 1)
        for n in range(1, 7):
            maps = getattr(self, f"conv_block{n}")(maps)
            maps = F.avg_pool2d(maps, 2) if n < 6 else maps
            maps = F.dropout(maps, self.dropout, self.training)
        time = maps.mean(3).transpose(1, 2)  # (B, time, D)
        pooled = F.relu(self.fc1(time.amax(1) + time.mean(1)))
        return Features(pooled, F.relu(self.fc1(time)), grid=(time.shape[1],))


class _Residual(nn.Module):
    """x + two convolutions, norms first; the first one of a stage halves both sides of the map."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = group_norm(inside), group_norm(outside)
        self.conv1 = nn.Conv2d(inside, outside, 3, stride=stride, padding=1)
        self.conv2 = nn.Conv2d(outside, outside, 3, padding=1)
        same = stride == 1 and inside == outside
        self.short = nn.Identity() if same else nn.Conv2d(inside, outside, 1, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv2(F.relu(self.norm2(self.conv1(F.relu(self.norm1(x))))))
        shortcut: Tensor = self.short(x)
        return out + shortcut


class ResnetMel(Encoder):
    """float32 ``(B, S)`` to tokens on a grid ``(time, frequency)``. No number of it depends on the batch.

    ``pooled`` averages over time alone and keeps bands apart before a linear layer: pitch tells sounds apart.
    """

    def __init__(self, options: ResnetMelOptions) -> None:
        super().__init__()
        rate, channels = options.sample_rate_hz, options.channels
        self.spec = AudioSpec(rate, options.seconds)
        self.mel = MelSpectrum(rate, mels=options.mels, fourier=rate // 16 // 2 * 2, hop=rate // 100)
        self.stem = nn.Conv2d(1, channels, 7, stride=2, padding=3)
        layers: list[nn.Module] = []
        width = channels
        for stage, depth in enumerate(options.depths):
            for number in range(depth):
                layers.append(_Residual(width, channels << stage, 2 if stage and not number else 1))
                width = channels << stage
        self.layers = nn.ModuleList(layers)
        self.width = width
        self.norm = nn.LayerNorm(width)
        self.bands = nn.Linear(-(-options.mels // (1 << len(options.depths))) * width, width)

    def blocks(self) -> list[nn.Module]:
        """The stem and each residual block."""
        return [self.stem, *self.layers]

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Features:
        """``x``: float32 ``(B, S)``; ``mask`` is not used: silence is sound."""
        maps = self.stem((decibels(self.mel(x)) / 20.0).unsqueeze(1))
        for layer in self.layers:
            maps = layer(maps)
        maps = self.norm(maps.permute(0, 3, 2, 1))  # (B, time, frequency, D)
        tokens = maps.flatten(1, 2)
        return Features(self.bands(maps.mean(1).flatten(1)), tokens, grid=(maps.shape[1], maps.shape[2]))


class SfxCnn(Encoder):
    """float32 ``(B, S)`` at 44.1 kHz to a token every 0.19 s: four blocks of convolutions on log-mel of the wave at its
    loudest; the mean over frequency, the maximum over a block's time, the mean over blocks.
    """

    def __init__(self, options: SfxCnnOptions) -> None:
        super().__init__()
        self.spec = AudioSpec(SFX_RATE_HZ, options.blocks * SFX_FRAMES * SFX_HOP / SFX_RATE_HZ)
        self.mel = MelSpectrum(SFX_RATE_HZ, mels=96, fourier=2 * SFX_HOP, hop=SFX_HOP, norm="sum", pad="constant")
        self.width = 512
        for n, (inside, outside) in enumerate(((1, 64), (64, 128), (128, 256), (256, 512)), 1):
            self.add_module(f"conv_block{n}", _ConvBlock(inside, outside, options.norm))

    def foreign(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Its own names stand below ``embedding_net``; the classifiers beside it are left out."""
        inside = {name[14:]: t for name, t in tensors.items() if name.startswith("embedding_net.")}
        return inside or tensors

    def log_mel(self, x: Tensor) -> Tensor:
        """``(B, S)`` to ``(B · blocks, 100, M)`` in about [0, 1]; silence fills the last block."""
        loudest = x.abs().amax(1, keepdim=True)
        x = F.pad(x / loudest.masked_fill(loudest == 0, 1.0), (0, -x.shape[1] % (SFX_FRAMES * SFX_HOP)))
        mel: Tensor = self.mel(x)[..., :-1]
        scaled = (1.0 + 1e4 * mel).log10() / SFX_TOP
        return scaled.unfold(2, SFX_FRAMES, SFX_FRAMES).permute(0, 2, 3, 1).flatten(0, 1)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Features:
        """``x``: float32 ``(B, S)``; ``mask``: bool ``(B, S)``, samples that are not padding (None: padding is what is
        exactly 0 up to the end). A block that is padding alone counts for nothing.
        """
        lengths = sounding(x, mask)
        maps = self.log_mel(x if mask is None else x.masked_fill(~mask, 0.0)).unsqueeze(1)
        for n in range(1, 5):
            maps = getattr(self, f"conv_block{n}")(maps)
            maps = F.max_pool2d(maps, 2) if n < 4 else maps
        time = maps.mean(3).transpose(1, 2)  # (B · blocks, 12, D)
        blocks = len(time) // len(x)
        each = time.amax(1).view(len(x), blocks, self.width)
        heard = torch.arange(blocks, device=x.device) * (SFX_FRAMES * SFX_HOP) < lengths[:, None]
        pooled = each.masked_fill(~heard[:, :, None], 0.0).sum(1) / heard.sum(1, keepdim=True)
        tokens = time.reshape(len(x), -1, self.width)
        seen = heard.repeat_interleave(time.shape[1], 1)
        return Features(pooled, tokens.masked_fill(~seen[:, :, None], 0.0), seen, grid=(tokens.shape[1],))
