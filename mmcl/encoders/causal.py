"""Causal towers: a transformer over patches in order, in which no token sees what comes after it.

They are what a decoder can be stacked on that predicts each patch from those before (``generative_contrastive``, layout
``prefix``). ``pooled`` is the mean of the tokens.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from mmcl.encoders.base import Encoder
from mmcl.encoders.options import TowerCommon
from mmcl.layers import CausalBlock, sinusoids
from mmcl.media.patches import audio_patches, video_patches
from mmcl.media.text import ByteTokenizer
from mmcl.types import AudioSpec, Features, TextSpec, VideoSpec

PositiveInt = Annotated[int, Field(ge=1)]


class CausalOptions(TowerCommon):
    """The transformer."""

    width: Annotated[int, Field(ge=8)] = 128
    """``D`` of its features"""
    depth: PositiveInt = 2
    heads: PositiveInt = 4
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0

    @model_validator(mode="after")
    def _divides(self) -> CausalOptions:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} must be a multiple of heads, {self.heads}")
        return self


class CausalVideoOptions(CausalOptions):
    """A causal transformer over square patches, frame by frame."""

    name: Literal["causal_video"] = "causal_video"
    size: Annotated[int, Field(ge=8, le=4096)] = 64
    """pixels, height = width"""
    patch: PositiveInt = 16
    """pixels, height = width; ``size`` is a multiple"""
    frames: Annotated[int, Field(ge=1, le=4096)] = 4
    fps: Annotated[float, Field(ge=0.001, le=1000)] = 2.0
    """frames per second at which a window is sampled; a window lasts ``frames / fps`` seconds"""
    stride: PositiveInt | None = None
    """take every such frame of the source, at whatever rate it has, instead of ``fps``"""
    fit: Literal["crop", "squash"] = "squash"
    """scale both sides, or scale the short side and crop the centre"""

    @model_validator(mode="after")
    def _whole_patches(self) -> CausalVideoOptions:
        if self.size % self.patch:
            raise ValueError(f"size {self.size} must be a multiple of patch, {self.patch}")
        return self


class CausalAudioOptions(CausalOptions):
    """A causal transformer over the levels of frequency bands, block by block."""

    name: Literal["causal_audio"] = "causal_audio"
    sample_rate_hz: Annotated[int, Field(ge=1_000)] = 16_000
    seconds: Annotated[float, Field(ge=0.01, le=3600)] = 2.0
    """length of a window"""
    patch_samples: Annotated[int, Field(ge=2)] = 640
    """samples of a block; blocks do not overlap"""
    bands: PositiveInt = 64
    """at most half of ``patch_samples``"""

    @model_validator(mode="after")
    def _long_enough(self) -> CausalAudioOptions:
        if self.patch_samples > self.seconds * self.sample_rate_hz:
            raise ValueError(f"patch_samples {self.patch_samples} is longer than the window of {self.seconds} seconds")
        if self.bands > self.patch_samples // 2:
            raise ValueError(f"bands {self.bands} must be at most half of patch_samples, {self.patch_samples // 2}")
        return self


class CausalTextOptions(CausalOptions):
    """A causal transformer over the bytes of a caption."""

    name: Literal["causal_text"] = "causal_text"
    max_tokens: PositiveInt = 64
    """longer captions are cut"""


class _Causal(Encoder):
    """What the three share: positions, layers, a last norm, and a mean over real tokens."""

    def __init__(self, options: CausalOptions, front: nn.Module) -> None:
        super().__init__()
        self.width = width = options.width
        self.front = front
        self.layers = nn.ModuleList(
            CausalBlock(width, options.heads, 4 * width, options.dropout) for _ in range(options.depth)
        )
        self.norm = nn.LayerNorm(width)

    def run(self, x: Tensor, grid: tuple[int, ...] | None, mask: Tensor | None = None) -> Features:
        """Patches ``(B, L, …)`` to features; padding comes last, where nothing sees it."""
        x = self.front(x.to(self.norm.weight.dtype) if x.is_floating_point() else x)
        x = x + sinusoids(x.shape[1], self.width, x)
        for layer in self.layers:
            x = layer(x)
        tokens = self.norm(x)
        if mask is None:
            return Features(tokens.mean(1), tokens, grid=grid)
        tokens = tokens.masked_fill(~mask[..., None], 0)
        return Features(tokens.sum(1) / mask.sum(1, keepdim=True).clamp(min=1).to(tokens.dtype), tokens, mask)

    def blocks(self) -> list[nn.Module]:
        return list(self.layers)


class CausalVideo(_Causal):
    """uint8 ``(B, T, C, H, W)`` to ``T · H/patch · W/patch`` tokens."""

    def __init__(self, options: CausalVideoOptions) -> None:
        super().__init__(options, nn.Linear(3 * options.patch**2, options.width))
        self.spec = VideoSpec(
            frames=options.frames, size=options.size, fps=options.fps, fit=options.fit, stride=options.stride
        )
        self.patch = self.causal_patch = (1, options.patch, options.patch)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Features:
        """``x``: uint8 ``(B, T, C, H, W)``; ``mask`` is not used."""
        side = x.shape[-1] // self.patch[1]
        return self.run(4 * video_patches(x, self.patch) - 2, (x.shape[1], side, side))


class CausalAudio(_Causal):
    """float32 ``(B, S)`` in [−1, 1] to one token per block of samples."""

    def __init__(self, options: CausalAudioOptions) -> None:
        super().__init__(options, nn.Linear(options.bands, options.width))
        self.spec = AudioSpec(sample_rate_hz=options.sample_rate_hz, seconds=options.seconds)
        self.causal_patch, self.samples, self.bands = (options.patch_samples,), options.patch_samples, options.bands

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Features:
        """``x``: float32 ``(B, S)``; ``mask`` is not used."""
        levels = audio_patches(x, self.samples, self.bands)
        return self.run(4 * levels - 2, (levels.shape[1], 1))


class CausalText(_Causal):
    """ids int64 ``(B, L)`` of a ``ByteTokenizer`` to ``L`` tokens; padding changes nothing."""

    def __init__(self, options: CausalTextOptions) -> None:
        super().__init__(options, nn.Embedding(257, options.width))
        self.spec = TextSpec(ByteTokenizer(max_tokens=options.max_tokens))
        self.causal_patch = (1,)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Features:
        """``x``: int64 ``(B, L)``; ``mask``: bool ``(B, L)``, real tokens first (None: all are)."""
        return self.run(x, None, torch.ones_like(x, dtype=torch.bool) if mask is None else mask)
