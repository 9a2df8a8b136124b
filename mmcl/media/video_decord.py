"""Video through decord."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import numpy as np

from mmcl.media.frames import Fit, centre_crop, checked, has_index, scaled_size
from mmcl.media.probe import MediaSource, open_container, origin_seconds, probe, read_head
from mmcl.media.video_pyav import PyAVReader
from mmcl.media.windows import frame_indices
from mmcl.types import SampleError


class DecordRefusedError(Exception):
    """decord is missing or not to be trusted with this file."""


class DecordReader:
    """Frames through decord; PyAV takes over where it stumbles in the middle of a file."""

    def __init__(
        self, data: MediaSource, size: int | None, fit: Fit, threads: int, source_size: tuple[int, int] | None
    ) -> None:
        if not has_index(read_head(data, 12)):
            raise DecordRefusedError
        try:
            decord = importlib.import_module("decord")
        except (ImportError, OSError) as error:  # OSError: its shared library does not load here
            raise DecordRefusedError from error
        self._errors = (RuntimeError, AssertionError, StopIteration, decord.DECORDError)
        self._data, self._size, self._fit, self._threads = data, size, fit, threads
        self._instead: PyAVReader | None = None
        decord.logging.set_level(decord.logging.FATAL)
        height, width = -1, -1
        if size is not None:
            height, width = scaled_size(*(source_size or _displayed_size(data)), size, fit)
        try:
            file = str(data) if isinstance(data, (str, Path)) else _BytesFile(data)
            self._reader = decord.VideoReader(file, width=width, height=height, num_threads=threads)
            times = np.asarray(self._reader.get_frame_timestamp(range(len(self._reader))), dtype=np.float64)
        except self._errors as error:
            raise DecordRefusedError from error
        # Frames before 0 are cut away by an edit list; decord counts them but never shows them.
        if not np.isfinite(times).all() or times[0, 0] < 0 or (np.diff(times[:, 0]) <= 0).any():
            raise DecordRefusedError
        origin = 0.0
        if times[0, 0] > 0:
            with closing(open_container(data)) as container:
                origin = origin_seconds(container)
        self.frame_times_seconds = times[:, 0] - origin
        self.duration_seconds = float(times[:, 1].max() - origin)

    def read(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        numbers, places = checked(indices, len(self.frame_times_seconds))
        if self._instead is None:
            try:
                pictures = centre_crop(self._reader.get_batch(numbers).asnumpy(), self._size)
                return np.ascontiguousarray(pictures[places].transpose(0, 3, 1, 2))
            except self._errors:
                self._instead = PyAVReader(self._data, self._size, self._fit, self._threads)
        # By time, not by number: the two may count the frames of a damaged file differently.
        other = frame_indices(self._instead.frame_times_seconds, self.frame_times_seconds[numbers] + 1e-4)
        return self._instead.read(other[places])

    def close(self) -> None:
        self._reader = None
        if self._instead is not None:
            self._instead.close()


class _BytesFile:
    """What decord takes for a file in memory: anything with ``read``."""

    def __init__(self, data: bytes | bytearray | memoryview) -> None:
        self._data = data

    def read(self) -> bytes | bytearray | memoryview:
        return self._data


def _displayed_size(data: MediaSource) -> tuple[int, int]:
    try:
        video = probe(data).video
    except SampleError as error:
        if error.reason != "no_streams":
            raise
        video = None
    if video is None:
        raise SampleError("no_video_stream", "the file has no video stream")
    return video.displayed_size
