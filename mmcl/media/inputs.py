"""What a user hands in, as rows that a tower eats: files, bytes, or clips decoded elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from mmcl.media.clip import MediaReader
from mmcl.media.windows import place_windows
from mmcl.types import Clip, MotionSpec, SampleError, TimedSpec, VideoSpec

Media: TypeAlias = str | Path | bytes | Clip


def decode_windows(clip: Media, spec: TimedSpec, windows: int) -> npt.NDArray[Any]:
    """Evenly spaced windows of one clip, ``(windows, …)``: uint8 frames, float32 sound or float32 motion.

    Raises:
        SampleError: damaged, or without this modality.
    """
    if isinstance(clip, Clip):
        return np.stack([fit_clip(clip, spec)] * windows)
    path = Path(clip) if isinstance(clip, (str, Path)) else None
    if path is not None and not path.exists():
        raise SampleError("missing_file", str(path))
    source = clip if path is None else path
    picture = path is not None and path.suffix.lower() in (".jpg", ".jpeg", ".png", ".webp")
    with MediaReader(image=source) if picture else MediaReader(video=source) as media:
        spec = media.resolved(spec)
        placed = place_windows(media.duration_seconds, spec.seconds, windows, rule="even")
        found = [media.read(window, spec) for window in placed]
    rows = [row for row in found if row is not None]
    if len(rows) < windows:
        raise SampleError(f"no_{spec.modality}_stream", str(path or "bytes"))
    return np.stack(rows)


def fit_clip(clip: Clip, spec: TimedSpec) -> npt.NDArray[Any]:
    """A decoded clip as one row of a tower's input: frames at even distances and scaled, or sound cut or padded.

    Raises:
        SampleError: the clip lacks this modality, or its sound has another rate than the tower hears.
    """
    if isinstance(spec, VideoSpec):
        if clip.video is None:
            raise SampleError("no_video_stream", clip.key)
        chosen = clip.video[np.linspace(0, len(clip.video) - 1, spec.frames).round().astype(int)]
        frames = torch.from_numpy(chosen).float()
        scaled = F.interpolate(frames, (spec.size, spec.size), mode="bilinear", antialias=True, align_corners=False)
        return scaled.round().clamp(0, 255).byte().numpy()
    if isinstance(spec, MotionSpec):
        raise SampleError("no_motion_vectors", f"{clip.key}: decoded pictures tell nothing of them")
    if clip.audio is None:
        raise SampleError("no_audio_stream", clip.key)
    if clip.sample_rate_hz != spec.sample_rate_hz:
        raise SampleError("sample_rate", f"{clip.key}: {clip.sample_rate_hz} Hz, the tower hears {spec.sample_rate_hz}")
    wave = clip.audio[: spec.samples]
    return np.pad(wave, (0, spec.samples - len(wave)))
