"""What the readers of video share: their protocol, the size of a picture, frame numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol, TypeAlias, get_args

import numpy as np

from mmcl.media.probe import MAX_PIXELS
from mmcl.types import SampleError

Fit: TypeAlias = Literal["crop", "squash", "crop_start", "crop_end"]
"""scale the short side and cut out the centre, the start or the end of the long one; or scale both sides"""
FITS: tuple[Fit, ...] = get_args(Fit)
Wanted: TypeAlias = tuple[Sequence[int] | np.ndarray, int | None, Fit]
"""frame numbers, and the size and fit in which they are wanted"""


class VideoReader(Protocol):
    """An open video."""

    frame_times_seconds: np.ndarray
    """float64 ``(F,)``, ascending: when each frame appears, on the clock shared with the audio of the file"""
    duration_seconds: float
    """when the last frame disappears"""

    def read(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """uint8 ``(n, C, H, W)``, RGB: the frames with these numbers, in this order; a number may come twice.

        Raises ``SampleError("decode")`` where the data is damaged and ``IndexError`` on a number outside 0 … F − 1.
        """
        ...

    def close(self) -> None:
        """Frees the decoder; the reader cannot be used afterwards."""
        ...


class ScalingReader(VideoReader, Protocol):
    """An open video that gives frames in several sizes."""

    def nearest_keyframes(self, indices: np.ndarray) -> np.ndarray:
        """int64, same shape: the number of the keyframe nearest to each frame; the earlier of two."""
        ...

    def read_scaled(self, wanted: Sequence[Wanted]) -> list[np.ndarray]:
        """uint8 ``(n, C, H, W)`` for each of (frame numbers, size, fit); every frame is decoded once for all of them.

        Raises as ``read`` does.
        """
        ...


def scaled_size(height: int, width: int, size: int | None, fit: Fit) -> tuple[int, int]:
    """(height, width) to scale a picture to, before a square is cut out.

    Raises ``SampleError("too_large")`` where the picture, before or after, is larger than ``MAX_PIXELS``.
    """
    if height < 1 or width < 1:
        raise SampleError("decode", f"a picture of {width}×{height} pixels")
    if size is None:
        scaled = height, width
    elif fit == "squash":
        scaled = size, size
    else:
        factor = size / min(height, width)
        scaled = max(size, round(height * factor)), max(size, round(width * factor))
    if max(height * width, scaled[0] * scaled[1]) > MAX_PIXELS:
        raise SampleError("too_large", f"{width}×{height} pixels, at most {MAX_PIXELS} are read")
    return scaled


def square_crop(pictures: np.ndarray, size: int | None, fit: Fit = "crop") -> np.ndarray:
    """``(…, H, W, C)`` -> ``(…, size, size, C)``, a view; None: unchanged."""
    if size is None:
        return pictures
    share = {"crop_start": 0, "crop_end": 2}.get(fit, 1)
    top, left = ((side - size) * share // 2 for side in pictures.shape[-3:-1])
    return pictures[..., top : top + size, left : left + size, :]


def checked(indices: Sequence[int] | np.ndarray, frames: int) -> tuple[np.ndarray, np.ndarray]:
    """The different frame numbers, ascending, and where each asked one is among them."""
    asked = np.asarray(indices, dtype=np.int64)
    if asked.ndim != 1 or (asked.size and (asked.min() < 0 or asked.max() >= frames)):
        raise IndexError(f"frame numbers must lie in 0 … {frames - 1}, got {asked.tolist()}")
    return np.unique(asked, return_inverse=True)


def channels_first(pictures: Sequence[np.ndarray], places: np.ndarray) -> np.ndarray:
    """``(H, W, C)`` pictures -> ``(n, C, H, W)``, those at these places, copied once."""
    height, width, channels = pictures[0].shape
    frames = np.empty((len(places), channels, height, width), pictures[0].dtype)
    for frame, place in zip(frames, places.tolist(), strict=True):
        frame[...] = pictures[place].transpose(2, 0, 1)
    return frames


def has_index(head: bytes) -> bool:
    """Whether a file begins like an MP4, Matroska or AVI: decord's old FFmpeg shall see nothing else."""
    return head[4:8] in (b"ftyp", b"moov", b"mdat", b"free", b"wide", b"skip") or (
        is_matroska(head) or (head.startswith(b"RIFF") and head[8:12] == b"AVI ")
    )


def is_matroska(head: bytes) -> bool:
    """Whether a file begins like an MKV or WebM."""
    return head.startswith(b"\x1a\x45\xdf\xa3")
