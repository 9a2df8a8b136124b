"""From waves to what audio towers eat, on the device of the weights, each with its tower's own normalisation.

Everything is computed in float32, also under autocast: a logarithm of a small power needs the bits.
"""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LongAudio: TypeAlias = Literal["crop", "repeat-pad", "fuse"]
"""What a tower with a window of its own does with a wave of another length. A shorter one is followed by silence, or,
but for ``crop``, repeated as often as it fits whole and then followed by silence. Of a longer one ``crop`` and
``repeat-pad`` see the middle; ``fuse`` the whole, made short, and three parts of it where the tower was made for that
(CLAP), else three parts one by one, averaged."""


def sounding(x: Tensor, mask: Tensor | None) -> Tensor:
    """int64 ``(B,)``, at least 1: how many samples of each row there are before nothing but padding follows.

    ``mask``: bool ``(B, S)``; None: padding is what is exactly 0 up to the end, as windows longer than their source
    are filled with (``data.short: hold``).
    """
    places = torch.arange(1, x.shape[1] + 1, device=x.device)
    return ((x != 0 if mask is None else mask) * places).amax(1).clamp_min(1)


def fitted(x: Tensor, lengths: Tensor, samples: int, policy: LongAudio) -> tuple[Tensor, Tensor]:
    """Rows of ``(B, S)``, of which ``lengths`` are sound, as ``(B, samples)`` and how much of that is sound."""
    if policy == "crop" and x.shape[1] == samples:
        return x, lengths
    places = torch.arange(samples, device=x.device)
    starts = ((lengths - samples) // 2).clamp_min(0)
    lengths = lengths.clamp_max(samples)
    kept = lengths if policy == "crop" else lengths * (samples // lengths)
    sources = starts[:, None] + places % lengths[:, None]
    return x.gather(1, sources).masked_fill(places >= kept[:, None], 0.0), kept


def thirds(x: Tensor, samples: int) -> Tensor:
    """Start, middle and end of ``(B, S)``, S at least ``samples``: ``(B, 3, samples)``."""
    last = x.shape[1] - samples
    return torch.stack([x[:, start : start + samples] for start in (0, last // 2, last)], 1)


class MelSpectrum(nn.Module):
    """Power in mel bands: ``(B, S)`` to ``(B, M, frames)``; frame i is centred at sample ``i · hop``.

    ``norm``: bands by area (``slaney``), by sum (``sum``) or as they are.
    """

    window: Tensor
    bands: Tensor

    def __init__(
        self,
        sample_rate_hz: int,
        *,
        mels: int,
        fourier: int,
        hop: int,
        low_hz: float = 0.0,
        high_hz: float | None = None,
        scale: Literal["htk", "slaney"] = "htk",
        norm: Literal["none", "slaney", "sum"] = "none",
        pad: Literal["reflect", "constant"] = "reflect",
    ) -> None:
        super().__init__()
        from torchaudio.functional import melscale_fbanks

        self.fourier, self.hop, self.pad = fourier, hop, pad
        bands = melscale_fbanks(
            fourier // 2 + 1,
            low_hz,
            sample_rate_hz / 2 if high_hz is None else high_hz,
            mels,
            sample_rate_hz,
            norm="slaney" if norm == "slaney" else None,
            mel_scale=scale,
        )
        if norm == "sum":
            bands = bands / bands.sum(0).clamp_min(1e-10)
        self.register_buffer("window", torch.hann_window(fourier), persistent=False)
        self.register_buffer("bands", bands, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        from torchaudio.functional import spectrogram

        with torch.autocast(x.device.type, enabled=False):
            power = spectrogram(
                x.float(),
                pad=0,
                window=self.window.float(),
                n_fft=self.fourier,
                hop_length=self.hop,
                win_length=self.fourier,
                power=2.0,
                normalized=False,
                pad_mode=self.pad,
            )
            out: Tensor = self.bands.float().T @ power
            return out


def decibels(power: Tensor) -> Tensor:
    """10 · log10, of at least 1e-10."""
    return 10.0 * power.clamp_min(1e-10).log10()


class AstFrontEnd(nn.Module):
    """Kaldi's filter banks as the Audio Spectrogram Transformer was trained on (Gong et al. 2021, section 2.1): frames
    of 25 ms every 10 ms, ``(x − mean) / (2 · std)``. What follows the sound is 0 before that: ``(B, frames, M)``.
    """

    bands: Tensor
    window: Tensor

    def __init__(self, extractor: Any) -> None:
        super().__init__()
        from torchaudio.compliance.kaldi import get_mel_banks

        rate = int(extractor.sampling_rate)
        self.frames, self.length, self.hop = int(extractor.max_length), rate // 40, rate // 100
        self.fourier = 1 << (self.length - 1).bit_length()
        self.mean = float(extractor.mean) if extractor.do_normalize else 0.0
        self.std = float(extractor.std) if extractor.do_normalize else 0.5
        self.samples = self.frames * self.hop
        bands, _ = get_mel_banks(extractor.num_mel_bins, self.fourier, float(rate), 20.0, 0.0, 100.0, -500.0, 1.0)
        self.register_buffer("bands", F.pad(bands, (0, 1)), persistent=False)
        self.register_buffer("window", torch.hann_window(self.length, periodic=False), persistent=False)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            frames = x.float().unfold(1, self.length, self.hop)
            frames = frames - frames.mean(2, keepdim=True)
            before = torch.cat([frames[..., :1], frames[..., :-1]], 2)
            frames = (frames - 0.97 * before) * self.window.float()  # Kaldi's emphasis of high frequencies
            power = torch.fft.rfft(frames, self.fourier).abs().square()
            mels = (power @ self.bands.float().T).clamp_min(torch.finfo(torch.float32).eps).log()
            full = (lengths - self.length) // self.hop + 1
            silent = torch.arange(mels.shape[1], device=x.device) >= full[:, None]
            mels = F.pad(mels.masked_fill(silent[:, :, None], 0.0), (0, 0, 0, self.frames - mels.shape[1]))
            out: Tensor = (mels - self.mean) / (2 * self.std)
            return out


class WhisperFrontEnd(nn.Module):
    """Whisper's log-mel (Radford et al. 2022, section 2.2): ``(B, M, frames)``, 80 dB below the loudest at least."""

    def __init__(self, extractor: Any, frames: int) -> None:
        super().__init__()
        hop = int(extractor.hop_length)
        self.samples = frames * hop
        self.mel = MelSpectrum(
            int(extractor.sampling_rate),
            mels=int(extractor.feature_size),
            fourier=int(extractor.n_fft),
            hop=hop,
            high_hz=8000.0,
            scale="slaney",
            norm="slaney",
        )

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        log = self.mel(x)[..., :-1].clamp_min(1e-10).log10()
        return (torch.maximum(log, log.amax((1, 2), keepdim=True) - 8.0) + 4.0) / 4.0


class ClapFrontEnd(nn.Module):
    """CLAP's log-mel in decibels (Wu et al. 2022, section 3): ``(B, 1, frames, M)``, or ``(B, 4, frames, M)`` for a
    tower that fuses: the whole, made short, and three parts; four times the same where it is not longer.
    """

    def __init__(self, extractor: Any, *, fuses: bool) -> None:
        super().__init__()
        rate, hop = int(extractor.sampling_rate), int(extractor.hop_length)
        self.samples = int(extractor.nb_max_samples)
        self.frames, self.fuses = self.samples // hop + 1, fuses
        self.mel = MelSpectrum(
            rate,
            mels=int(extractor.feature_size),
            fourier=int(extractor.fft_window_size),
            hop=hop,
            low_hz=float(extractor.frequency_min),
            high_hz=float(extractor.frequency_max),
            scale="htk" if fuses else "slaney",  # its two kinds of weights were trained on different bands
            norm="none" if fuses else "slaney",
        )

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        mel = decibels(self.mel(x)).transpose(1, 2).unsqueeze(1)
        if not self.fuses:
            return mel
        beyond = mel.shape[2] - self.frames
        if beyond <= 0:
            return mel.expand(-1, 4, -1, -1)
        whole = F.interpolate(mel, (self.frames, mel.shape[3]), mode="bilinear", align_corners=False)
        ranges = torch.arange(beyond + 1).tensor_split(3)  # each part is drawn from its third; here, from its middle
        starts = [int(places[len(places) // 2]) if len(places) else 0 for places in ranges]
        return torch.cat([whole, *(mel[:, :, start : start + self.frames] for start in starts)], 1)


class WaveFrontEnd(nn.Module):
    """The wave itself, over its sound of zero mean and unit variance where the tower was trained so: ``(B, S)``."""

    def __init__(self, extractor: Any, samples: int) -> None:
        super().__init__()
        self.normalise, self.samples = bool(extractor.do_normalize), samples

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        if not self.normalise:
            return x
        with torch.autocast(x.device.type, enabled=False):
            inside = torch.arange(x.shape[1], device=x.device) < lengths[:, None]
            x = x.float().masked_fill(~inside, 0.0)
            centred = (x - x.sum(1, keepdim=True) / lengths[:, None]).masked_fill(~inside, 0.0)
            return centred * (centred.square().sum(1, keepdim=True) / lengths[:, None] + 1e-7).rsqrt()
