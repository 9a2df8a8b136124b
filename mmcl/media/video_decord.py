"""Video through decord."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import numpy as np

from mmcl.media.frames import Fit, checked, has_index, is_matroska, scaled_size, square_crop
from mmcl.media.probe import MediaSource, VideoInfo, best_stream, open_container, origin_seconds, probe, read_head
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
        head = read_head(data, 12)
        if not has_index(head):
            raise DecordRefusedError
        try:
            decord = importlib.import_module("decord")
        except (ImportError, OSError) as error:  # OSError: its shared library does not load here
            raise DecordRefusedError from error
        self._errors = (RuntimeError, AssertionError, StopIteration, decord.DECORDError)
        self._data, self._size, self._fit, self._threads = data, size, fit, threads
        self._instead: PyAVReader | None = None
        decord.logging.set_level(decord.logging.FATAL)
        shown = source_size
        if shown is None or is_matroska(head):
            video = _video(data)
            if is_matroska(head) and video.rotation_degrees:  # which decord reads from MP4 alone
                raise DecordRefusedError
            shown = video.displayed_size
        height, width = scaled_size(*shown, size, fit)
        if height == shown[0] and not _colours_as_others(data, (height, width), shown):
            raise DecordRefusedError
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
                pictures = square_crop(self._reader.get_batch(numbers).asnumpy(), self._size, self._fit)
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


def _video(data: MediaSource) -> VideoInfo:
    try:
        video = probe(data).video
    except SampleError as error:
        if error.reason != "no_streams":
            raise
        video = None
    if video is None:
        raise SampleError("no_video_stream", "the file has no video stream")
    return video


def _colours_as_others(data: MediaSource, scaled: tuple[int, int], shown: tuple[int, int]) -> bool:
    """Whether a picture that keeps its height comes out as from others: decord's old FFmpeg takes colours that have
    fewer rows from the nearest of them, but for 8 bits, an even height and an unchanged width."""
    with closing(open_container(data)) as container:
        stream = best_stream(container, "video")
        pixels = None if stream is None else stream.codec_context.format
    if pixels is None or (pixels.chroma_height(4) == pixels.chroma_width(4) == 4):
        return True
    return pixels.name in ("yuv420p", "yuvj420p") and scaled == shown and scaled[0] % 2 == 0
