"""Augmentation of waves, batched: gain, shift, bands and stretches of silence."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def augment_audio(waves: Tensor, params: Mapping[str, Tensor], *, sample_rate_hz: int) -> Tensor:
    """float32 ``(B, S)`` in [−1, 1]; parameters that are not there change nothing."""
    samples = waves.shape[1]
    places = torch.arange(samples, device=waves.device)
    if "gain" in params:
        waves = (waves * params["gain"][:, None]).clamp(-1.0, 1.0)
    if "shift_samples" in params:
        sources = places - params["shift_samples"][:, None]
        outside = (sources < 0) | (sources >= samples)
        waves = waves.gather(1, sources.clamp(0, samples - 1)).masked_fill(outside, 0.0)
    if "frequency_masks" in params:
        waves = silence_bands(waves, params["frequency_masks"], sample_rate_hz=sample_rate_hz)
    if "time_masks" in params:
        for start, length in (span.unbind(1) for span in params["time_masks"].unbind(1)):
            silent = (places >= start[:, None]) & (places < (start + length)[:, None])
            waves = waves.masked_fill(silent, 0.0)
    return waves


def silence_bands(waves: Tensor, bands_hz: Tensor, *, sample_rate_hz: int) -> Tensor:
    """``waves`` float32 ``(B, S)`` without the frequencies in ``bands_hz`` ``(B, n, 2)``, [lowest, highest) each.

    The mask of mel channels of SpecAugment (Park et al. 2019, arXiv 1904.08779), done to the wave: whatever front end a
    tower has sees it.
    """
    spectrum = torch.fft.rfft(waves)
    hertz = torch.fft.rfftfreq(waves.shape[1], 1.0 / sample_rate_hz, device=waves.device)
    low, high = bands_hz[:, :, 0, None], bands_hz[:, :, 1, None]
    silent = ((hertz >= low) & (hertz < high)).any(1)
    filtered = torch.fft.irfft(spectrum.masked_fill(silent, 0.0), n=waves.shape[1])
    return torch.where(silent.any(1, keepdim=True), filtered.clamp(-1.0, 1.0), waves)
