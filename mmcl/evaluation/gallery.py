"""What a report shows of an item: its captions, a poster frame, a moving clip, its sound and a picture of it."""

from __future__ import annotations

import io
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

from mmcl.types import Modality

if TYPE_CHECKING:
    from PIL import Image

POSTER_PIXELS = 160
"""longer side of a poster"""
CLIP_PIXELS = 128
"""longer side of a moving clip"""
PICTURE_BYTES = 64 << 10
CLIP_BYTES = 48 << 10
SOUND_BYTES = 24 << 10
"""the most that one picture, one clip, one sound may take in a page; a larger one is left out"""
SOUND_RATE_HZ = 24_000
SOUND_SECONDS = 5.0
"""at 24 kbit/s, 15 kB"""
_QUALITIES = (50, 30, 12)


class Showable(Protocol):
    """One item as the report shows it; media may be made when they are asked for."""

    @property
    def key(self) -> str: ...
    @property
    def captions(self) -> tuple[str, ...]: ...
    @property
    def missing(self) -> tuple[Modality, ...]:
        """Modalities that the item should have and has not."""
        ...

    @property
    def poster(self) -> bytes | None:
        """JPEG, see :func:`poster_jpeg`."""
        ...

    @property
    def waveform(self) -> bytes | None:
        """SVG, see :func:`waveform_svg`, or PNG."""
        ...

    @property
    def clip(self) -> bytes | None:
        """Animated WebP, see :func:`clip_webp`."""
        ...

    @property
    def sound(self) -> bytes | None:
        """Opus in WebM, see :func:`sound_webm`."""
        ...


@dataclass(frozen=True, slots=True)
class GalleryItem:
    """A :class:`Showable` that is all there."""

    key: str
    captions: tuple[str, ...] = ()
    poster: bytes | None = None
    waveform: bytes | None = None
    missing: tuple[Modality, ...] = ()
    clip: bytes | None = None
    sound: bytes | None = None


def poster_jpeg(frame: npt.NDArray[np.uint8], pixels: int = POSTER_PIXELS) -> bytes:
    """A JPEG of ``frame``, uint8 ``(C, H, W)`` with C = 1 or 3, its longer side at most ``pixels``.

    Raises ValueError for another dtype or shape.
    """
    picture = _thumbnail(frame, pixels)
    out = io.BytesIO()
    picture.save(out, "JPEG", quality=75, optimize=True)
    return out.getvalue()


def _thumbnail(frame: npt.NDArray[np.uint8], pixels: int) -> Image.Image:
    from PIL import Image

    frame = np.asarray(frame)
    if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[0] not in (1, 3) or not frame.size:
        raise ValueError(f"a frame must be uint8 (1 or 3, H, W), got {frame.dtype} {frame.shape}")
    picture = Image.fromarray(np.ascontiguousarray(np.broadcast_to(frame, (3, *frame.shape[1:])).transpose(1, 2, 0)))
    picture.thumbnail((pixels, pixels), Image.Resampling.LANCZOS)
    return picture


def clip_webp(frames: npt.NDArray[np.uint8], seconds: float, pixels: int = CLIP_PIXELS) -> bytes | None:
    """An animated WebP that repeats ``frames``, uint8 ``(T, C, H, W)`` evenly over ``seconds``, for ever.

    Its quality is as high as :data:`CLIP_BYTES` allow; None where fewer than two frames are given, where nothing moves,
    or where the lowest quality is too large still. Raises ValueError for another dtype or shape.
    """
    if np.ndim(frames) != 4:
        raise ValueError(f"a clip must be uint8 (T, 1 or 3, H, W), got {np.shape(frames)}")
    pictures = [_thumbnail(frame, pixels) for frame in frames]
    if not (np.diff(np.asarray(frames), axis=0) != 0).any():
        return None
    each = max(1, round(1000 * seconds / len(pictures)))
    for quality in _QUALITIES:
        out = io.BytesIO()
        pictures[0].save(
            out, "WEBP", save_all=True, append_images=pictures[1:], duration=each, loop=0, quality=quality, method=2
        )
        if len(out.getvalue()) <= CLIP_BYTES:
            return out.getvalue()
    return None


def sound_webm(audio: npt.NDArray[np.float32]) -> bytes | None:
    """Opus at 24 kbit/s in WebM of ``audio``, float32 ``(S,)`` in [−1, 1] at :data:`SOUND_RATE_HZ`; None of nothing."""
    import av

    wave = np.nan_to_num(np.asarray(audio, np.float32).reshape(-1)).clip(-1, 1)
    if not len(wave):
        return None
    out = io.BytesIO()
    with av.open(out, "w", format="webm", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream("libopus", rate=SOUND_RATE_HZ, layout="mono")
        stream.bit_rate = 24_000
        stream.options = {"vbr": "constrained"}
        stream.codec_context.flags |= av.codec.context.Flags.bitexact
        step = SOUND_RATE_HZ // 50  # a packet of Opus is 20 ms
        for start in range(0, len(wave), step):
            piece = np.ascontiguousarray(np.pad(wave[start : start + step], (0, max(0, start + step - len(wave)))))
            frame = av.AudioFrame.from_ndarray(np.rint(32767 * piece).astype(np.int16)[None], "s16", "mono")
            frame.sample_rate, frame.pts, frame.time_base = SOUND_RATE_HZ, start, Fraction(1, SOUND_RATE_HZ)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
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
