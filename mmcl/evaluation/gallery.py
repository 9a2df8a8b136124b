"""What a report shows of an item: its captions, a poster frame, a picture of its sound."""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mmcl.types import Modality

POSTER_PIXELS = 160
"""longer side of a poster"""


@dataclass(frozen=True, slots=True)
class GalleryItem:
    """One item as the report shows it."""

    key: str
    captions: tuple[str, ...] = ()
    poster: bytes | None = None
    """JPEG, see :func:`poster_jpeg`"""
    waveform: bytes | None = None
    """SVG, see :func:`waveform_svg`, or PNG"""
    missing: tuple[Modality, ...] = ()
    """modalities that the item should have and has not"""


def poster_jpeg(frame: npt.NDArray[np.uint8], pixels: int = POSTER_PIXELS) -> bytes:
    """A JPEG of ``frame``, uint8 ``(C, H, W)`` with C = 1 or 3, its longer side at most ``pixels``.

    Raises ValueError for another dtype or shape.
    """
    from PIL import Image

    frame = np.asarray(frame)
    if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[0] not in (1, 3) or not frame.size:
        raise ValueError(f"a frame must be uint8 (1 or 3, H, W), got {frame.dtype} {frame.shape}")
    picture = Image.fromarray(np.ascontiguousarray(np.broadcast_to(frame, (3, *frame.shape[1:])).transpose(1, 2, 0)))
    picture.thumbnail((pixels, pixels), Image.Resampling.LANCZOS)
    out = io.BytesIO()
    picture.save(out, "JPEG", quality=75, optimize=True)
    return out.getvalue()


def waveform_svg(audio: npt.NDArray[np.float32], bars: int = 64) -> bytes:
    """A small SVG of the envelope of ``audio``, float32 ``(S,)`` in [−1, 1], scaled to its own peak.

    Each bar is the largest magnitude of its stretch of time; silence is a row of dots.
    """
    level = np.abs(np.nan_to_num(np.asarray(audio, np.float32).reshape(-1)))
    peaks = np.array([part.max(initial=0.0) for part in np.array_split(level, bars)])
    heights = np.rint(17 * peaks / max(float(peaks.max()), 1e-4)).astype(int)
    path = "".join(f"M{2 * place + 1} {20 - height}v{2 * height}" for place, height in enumerate(heights))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{8 * bars}" height="160" viewBox="0 0 {2 * bars} 40">'
        f'<path d="{path}" stroke="#3a8fb7" stroke-width="1.2" stroke-linecap="round" fill="none"/></svg>'
    ).encode()
