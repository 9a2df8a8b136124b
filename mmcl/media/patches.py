"""Pictures and sound as a row of patches, one after the other: what causal towers read and decoders predict."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

FLOOR_DB = -80.0
"""what counts as silence"""


def video_patches(video: Tensor, patch: tuple[int, int, int], detail: int | None = None) -> Tensor:
    """uint8 ``(B, T, C, H, W)`` to ``(B, L, D)`` in [0, 1]: patches of (frames, pixels, pixels), time first, then rows.

    ``detail`` averages a patch over its frames and to at most so many pixels a side; None keeps every number. What the
    patch does not divide is cut at its end.
    """
    rows, frames, channels, height, width = video.shape
    t, h, w = frames // patch[0], height // patch[1], width // patch[2]
    cut = video[:, : t * patch[0], :, : h * patch[1], : w * patch[2]]
    parts = cut.float().div(255).reshape(rows, t, patch[0], channels, h, patch[1], w, patch[2])
    parts = parts.permute(0, 1, 4, 6, 2, 3, 5, 7).reshape(rows, t * h * w, patch[0], channels, *patch[1:])
    if detail is None:
        return parts.flatten(2)
    side = (min(detail, patch[1]), min(detail, patch[2]))
    pooled: Tensor = F.adaptive_avg_pool2d(parts.mean(2).flatten(0, 1), side)
    return pooled.reshape(rows, t * h * w, channels * side[0] * side[1])


def wave_blocks(wave: Tensor, samples: int) -> Tensor:
    """``(B, S)`` to ``(B, L, samples)``, one after the other; what is left of the wave at its end is cut."""
    count = wave.shape[1] // samples
    return wave[:, : count * samples].reshape(len(wave), count, samples)


def audio_patches(wave: Tensor, samples: int, bands: int) -> Tensor:
    """float ``(B, S)`` to ``(B, L, bands)`` in [0, 1]: the level of each band of each block of ``samples``.

    0 is silence (−80 dB and below), 1 full scale. Blocks do not overlap, so a patch says nothing of the next; bands are
    of equal width, at most ``samples // 2 + 1``; what is left of the wave at its end is cut.
    """
    with torch.autocast(wave.device.type, enabled=False):
        blocks = wave_blocks(wave, samples)
        blocks = blocks if blocks.dtype == torch.float64 else blocks.float()
        if not blocks.numel():  # which some builds cannot transform
            return blocks.new_zeros(*blocks.shape[:2], bands)
        power = torch.fft.rfft(blocks, norm="forward").abs().square() * 2
        each: Tensor = F.adaptive_avg_pool1d(power, bands) * power.shape[-1] / bands
        return (1 - 10 * (each + 1e-12).log10() / FLOOR_DB).clamp(0, 1)
