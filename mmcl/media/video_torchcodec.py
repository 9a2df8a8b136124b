"""Video through torchcodec."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from mmcl.media.frames import Fit, centre_crop, checked, scaled_size
from mmcl.media.probe import MediaSource, short_message
from mmcl.media.scaling import RgbScaler
from mmcl.media.video_pyav import PyAVReader
from mmcl.types import ConfigError, SampleError


class TorchCodecReader:
    """Frame times come from the packets, as for PyAV; where torchcodec counts other frames, it is asked by time."""

    def __init__(self, data: MediaSource, size: int | None, fit: Fit, threads: int) -> None:
        try:
            decoders = importlib.import_module("torchcodec.decoders")
        except (ImportError, RuntimeError, OSError) as error:  # the latter two: FFmpeg's libraries are missing
            raise ConfigError(
                f"decoder 'torchcodec' cannot be loaded ({short_message(error)}): "
                "pip install 'mmcl[torchcodec]' and the system's FFmpeg libraries"
            ) from error
        self._size, self._fit = size, fit
        with closing(PyAVReader(data, None, fit, 1)) as reader:
            self._scaler = RgbScaler(reader.codec_context)
            self.frame_times_seconds = reader.frame_times_seconds
            self.duration_seconds = reader.duration_seconds
            self._origin_seconds = reader.origin_seconds
        options: dict[str, Any] = {"dimension_order": "NHWC", "num_ffmpeg_threads": threads, "seek_mode": "exact"}
        file = str(data) if isinstance(data, (str, Path)) else bytes(data)
        try:
            self._decoder = decoders.VideoDecoder(file, **options)
        except (RuntimeError, ValueError) as error:
            raise SampleError("decode", short_message(error)) from error

    def read(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        numbers, places = checked(indices, len(self.frame_times_seconds))
        if not len(numbers):
            return np.zeros((0, 3, self._size or 0, self._size or 0), np.uint8)
        instants = self.frame_times_seconds[numbers] + self._origin_seconds + 1e-6
        try:
            if len(self._decoder) == len(self.frame_times_seconds):
                frames = self._decoder.get_frames_at(numbers.tolist())
            else:
                frames = self._decoder.get_frames_played_at(instants.tolist())
            pictures = frames.data.numpy()
        except (RuntimeError, ValueError, IndexError) as error:
            raise SampleError("decode", short_message(error)) from error
        if len(pictures) and self._size is not None:
            shown = pictures.shape[1], pictures.shape[2]
            height, width = scaled_size(*shown, self._size, self._fit)
            if (height, width) != shown:
                pictures = np.stack([self._scaler.scale(picture, height, width) for picture in pictures])
        return np.ascontiguousarray(centre_crop(pictures, self._size)[places].transpose(0, 3, 1, 2))

    def close(self) -> None:
        self._decoder = None
