"""``tiny_audio``: a small tower for sound: log-mel on the device of the weights, then a convolutional network."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from mmcl.encoders.base import Encoder
from mmcl.encoders.options import TowerCommon
from mmcl.encoders.video import ResidualConv2d, group_norm
from mmcl.types import AudioSpec, Features

SHRINK = 16
"""spectrogram frames, and mels, per token"""


class TinyAudioOptions(TowerCommon):
    """A log-mel spectrogram and a convolutional network over time and frequency."""

    name: Literal["tiny_audio"] = "tiny_audio"
    width: int = Field(default=128, ge=8, multiple_of=8)
    """``D`` of its features"""
    channels: int = Field(default=32, ge=8, multiple_of=8)
    """channels after the first layer"""
    sample_rate_hz: int = Field(default=16_000, ge=1_000)
    seconds: float = Field(default=2.0, ge=0.01, le=3600)
    """length of a window"""
    mels: int = Field(default=64, ge=SHRINK, multiple_of=SHRINK)
    window_samples: int = Field(default=1024, ge=16)
    """of the Fourier transform"""
    hop_samples: int = Field(default=320, ge=1)
    """between two spectrogram frames"""
    dropout: float = Field(default=0.0, ge=0, lt=1)

    @model_validator(mode="after")
    def _long_enough(self) -> TinyAudioOptions:
        least = max((SHRINK - 1) * self.hop_samples, self.window_samples // 2 + 1) / self.sample_rate_hz
        if self.seconds < least:
            raise ValueError(f"seconds must be at least {least:.3g} with these window_samples and hop_samples")
        return self


class TinyAudio(Encoder):
    """float32 ``(B, S)`` in [−1, 1] to ``S/hop/16 · mels/16`` tokens.

    Pooling averages over time alone and keeps bands apart before a linear layer: pitch tells sounds apart.
    """

    def __init__(self, options: TinyAudioOptions) -> None:
        super().__init__()
        from torchaudio.transforms import MelSpectrogram

        self.spec = AudioSpec(sample_rate_hz=options.sample_rate_hz, seconds=options.seconds)
        self.width = options.width
        channels, width = options.channels, options.width
        self.mel = MelSpectrogram(
            options.sample_rate_hz,
            n_fft=options.window_samples,
            hop_length=options.hop_samples,
            n_mels=options.mels,
        )
        self.spectrogram = nn.Sequential(
            nn.Conv2d(1, channels, 4, stride=4),
            ResidualConv2d(channels),
            group_norm(channels),
            nn.Conv2d(channels, 2 * channels, 2, stride=2),
            ResidualConv2d(2 * channels),
            group_norm(2 * channels),
            nn.Conv2d(2 * channels, width, 2, stride=2),
            ResidualConv2d(width),
        )
        self.norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(options.dropout)
        self.bands = nn.Linear(options.mels // SHRINK * width, width)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Features:
        """``x``: float32 ``(B, S)``; ``mask`` is not used. Tokens unfold to the grid ``(time, frequency)``."""
        log_mel = (self.mel(x) + 1e-5).log().unsqueeze(1)  # (B, 1, M, time)
        maps = self.spectrogram(log_mel.contiguous(memory_format=torch.channels_last))
        maps = self.dropout(self.norm(maps.permute(0, 3, 2, 1)))
        B, N, M, D = maps.shape  # noqa: N806
        return Features(self.bands(maps.mean(1).flatten(1)), maps.reshape(B, N * M, D), grid=(N, M))

    def blocks(self) -> list[nn.Module]:
        return [*self.spectrogram, self.bands]
