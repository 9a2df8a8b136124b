"""What a user hands in, as rows that a tower eats: files, bytes, arrays, or clips decoded elsewhere."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from mmcl.media.clip import MediaReader
from mmcl.media.frames import scaled_size, square_crop
from mmcl.media.windows import Window, frame_indices, place_windows, wanted_times
from mmcl.types import AudioSpec, Clip, ConfigError, MotionSpec, SampleError, TimedSpec, VideoSpec

Media: TypeAlias = str | Path | bytes | Clip | npt.NDArray[Any] | Tensor
"""A path, the bytes of a file, a decoded clip, or an array: uint8 ``(T, C, H, W)`` frames, uint8 ``(C, H, W)`` one
picture, float ``(S,)`` or ``(channels, S)`` sound in [−1, 1]"""

MAX_WINDOWS = 8
"""of one file, where nobody says how many; a longer one is seen in parts"""

PICTURES = (".jpg", ".jpeg", ".png", ".webp")
_PICTURE_MARKS = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n")


def decode_windows(
    media: Media, spec: TimedSpec, windows: int | None, *, rate: float | None = None
) -> npt.NDArray[Any]:
    """Evenly spaced windows, ``(windows, …)``: uint8 frames, float32 sound or float32 motion.

    Args:
        windows: None: as many as cover the source, at most ``MAX_WINDOWS``.
        rate: of arrays: frames per second (None: the frames are one window, whatever its length), or Hz.

    Raises:
        SampleError: damaged, or without this modality.
        ConfigError: an array of another kind, or sound without a rate.
    """
    if isinstance(media, Clip):
        return np.stack([_fit_clip(media, spec)] * (windows or 1))
    if isinstance(media, (np.ndarray, Tensor)):
        array = media.detach().cpu().numpy() if isinstance(media, Tensor) else media
        if isinstance(spec, VideoSpec):
            return _frame_windows(_checked_frames(array), spec, windows, rate)
        if isinstance(spec, MotionSpec):
            raise ConfigError("motion is read from compressed files, not from arrays: hand in the path or its bytes")
        return _wave_windows(_checked_wave(array), spec, windows, rate)
    path = Path(media) if isinstance(media, (str, Path)) else None
    if path is not None and not path.exists():
        raise SampleError("missing_file", str(path))
    source = media if path is None else path
    with MediaReader(image=source) if is_picture(media) else MediaReader(video=source) as reader:
        spec = reader.resolved(spec)
        placed = _placed(reader.duration_seconds, spec.seconds, windows)
        rows = [row for window in placed if (row := reader.read(window, spec)) is not None]
    if len(rows) < len(placed):
        raise SampleError(f"no_{spec.modality}_stream", str(path or "bytes"))
    return np.stack(rows)


def is_picture(media: str | Path | bytes) -> bool:
    """Whether a file is a still picture: by its first bytes, or the ending of its path."""
    if isinstance(media, bytes):
        return media.startswith(_PICTURE_MARKS) or (media[:4] == b"RIFF" and media[8:12] == b"WEBP")
    return Path(media).suffix.lower() in PICTURES


def _placed(duration_seconds: float, length_seconds: float, windows: int | None) -> list[Window]:
    """Evenly spaced; as many as the source is long, where nobody says how many."""
    count = windows or min(MAX_WINDOWS, max(1, round(duration_seconds / length_seconds)))
    return place_windows(duration_seconds, length_seconds, count, rule="even")


def _checked_frames(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """uint8 ``(T, C, H, W)``."""
    frames = array[None] if array.ndim == 3 else array
    if frames.ndim != 4 or frames.dtype != np.uint8 or frames.shape[1] != 3 or 0 in frames.shape:
        hint = "; permute the channels to the second place" if array.ndim > 2 and array.shape[-1] == 3 else ""
        raise ConfigError(f"frames must be uint8 (T, 3, H, W) or (3, H, W), got {array.dtype} {array.shape}{hint}")
    return frames


def _checked_wave(array: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """float32 ``(S,)``, mono."""
    if array.dtype.kind != "f" or array.ndim not in (1, 2) or 0 in array.shape or array.shape[0] > array.shape[-1]:
        raise ConfigError(f"sound must be float (S,) or (channels, S), got {array.dtype} {array.shape}")
    wave: npt.NDArray[np.float32] = (array if array.ndim == 1 else array.mean(0)).astype(np.float32)
    if not np.isfinite(wave).all():
        raise ConfigError("sound must be finite numbers")
    return wave


def _frame_windows(
    frames: npt.NDArray[Any], spec: VideoSpec, windows: int | None, fps: float | None
) -> npt.NDArray[np.uint8]:
    if fps is None:
        chosen = [np.linspace(0, len(frames) - 1, spec.frames).round().astype(int)] * (windows or 1)
    else:
        if not 0 < fps < math.inf:
            raise ConfigError(f"fps must be greater than 0, got {fps}")
        wanted = spec.fps if spec.stride is None else fps / spec.stride
        times, duration = np.arange(len(frames)) / fps, len(frames) / fps
        chosen = [
            frame_indices(times, wanted_times(window, spec.frames, wanted, duration_seconds=duration))
            for window in _placed(duration, spec.frames / wanted, windows)
        ]
    return np.stack([_scaled(frames[numbers], spec) for numbers in chosen])


def _scaled(frames: npt.NDArray[Any], spec: VideoSpec) -> npt.NDArray[np.uint8]:
    """Frames as large as a tower wants them, fitted as it wants."""
    if frames.shape[2:] == (spec.size, spec.size):
        return frames.astype(np.uint8, copy=False)
    size = scaled_size(frames.shape[2], frames.shape[3], spec.size, spec.fit)
    scaled = F.interpolate(
        torch.from_numpy(np.ascontiguousarray(frames)).float(),
        size,
        mode="bilinear",
        antialias=True,
        align_corners=False,
    )
    pictures = scaled.round().clamp(0, 255).byte().movedim(1, -1).numpy()
    cut: npt.NDArray[np.uint8] = np.ascontiguousarray(square_crop(pictures, spec.size, spec.fit).transpose(0, 3, 1, 2))
    return cut


def _wave_windows(
    wave: npt.NDArray[np.float32], spec: AudioSpec, windows: int | None, rate: float | None
) -> npt.NDArray[np.float32]:
    if rate is None or not 0 < rate < math.inf or rate != round(rate):
        raise ConfigError(f"sample_rate_hz: arrays of sound need their rate, a whole number of Hz, got {rate}")
    if int(rate) != spec.sample_rate_hz:
        from torchaudio.functional import resample

        wave = np.asarray(resample(torch.from_numpy(wave), int(rate), spec.sample_rate_hz))
    starts = [window.start_seconds for window in _placed(len(wave) / spec.sample_rate_hz, spec.seconds, windows)]
    numbers = np.array([round(start * spec.sample_rate_hz) for start in starts])[:, None] + np.arange(spec.samples)
    cut: npt.NDArray[np.float32] = wave[numbers % len(wave)]  # a short one is played again, as files are
    return cut


def _fit_clip(clip: Clip, spec: TimedSpec) -> npt.NDArray[Any]:
    """A decoded clip, one window, as one row of a tower's input: frames at even distances and scaled, or sound cut or
    padded.

    Raises:
        SampleError: the clip lacks this modality, or its sound has another rate than the tower hears.
    """
    if isinstance(spec, VideoSpec):
        if clip.video is None:
            raise SampleError("no_video_stream", clip.key)
        row: npt.NDArray[Any] = _frame_windows(clip.video, spec, 1, None)[0]
        return row
    if isinstance(spec, MotionSpec):
        raise SampleError("no_motion_vectors", f"{clip.key}: decoded pictures tell nothing of them")
    if clip.audio is None:
        raise SampleError("no_audio_stream", clip.key)
    if clip.sample_rate_hz != spec.sample_rate_hz:
        raise SampleError("sample_rate", f"{clip.key}: {clip.sample_rate_hz} Hz, the tower hears {spec.sample_rate_hz}")
    wave = clip.audio[: spec.samples]
    padded: npt.NDArray[Any] = np.pad(wave, (0, spec.samples - len(wave)))
    return padded
