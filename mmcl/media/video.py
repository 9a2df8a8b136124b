"""Frames of a video, decoded and scaled in one pass, behind one protocol for three decoders.

Open a reader in the process that reads it (never before a fork) and use it from one thread.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np
from av.video.reformatter import Interpolation, VideoReformatter

from mmcl.media.frame_table import MAX_FRAMES as MAX_FRAMES
from mmcl.media.frame_table import FrameTable
from mmcl.media.probe import (
    DECODE_ERRORS,
    MAX_PIXELS,
    MediaSource,
    best_stream,
    open_container,
    origin_seconds,
    probe,
    quarter_turns,
    read_head,
    read_only,
    short_message,
)
from mmcl.media.windows import frame_indices
from mmcl.types import ConfigError, SampleError

Decoder: TypeAlias = Literal["decord", "pyav", "torchcodec"]
Fit: TypeAlias = Literal["crop", "squash"]
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


def open_video(
    data: MediaSource,
    *,
    decoder: Decoder = "decord",
    size: int | None = None,
    fit: Fit = "crop",
    threads: int = 1,
    source_size: tuple[int, int] | None = None,
) -> VideoReader:
    """Opens the video stream of a file for reading single frames.

    ``size``: frames come out as ``size`` × ``size`` pixels (None: as they are displayed). ``fit="crop"`` scales the
    short side to ``size`` and cuts out the centre, ``"squash"`` scales both sides. ``source_size`` is the displayed
    (height, width) where the caller knows it, which saves decord a look at the file.
    decord gives way to PyAV where it is not installed, where it refuses a file, and for files whose frame list it is
    known to get wrong (edit lists, exotic containers). decord ends the process on some damaged files; PyAV does not.

    Raises ``SampleError``: ``missing_file``, ``unreadable``, ``empty``, ``not_media``, ``no_video_stream``,
    ``too_large``, ``truncated``, ``decode``; ``ConfigError`` for an unknown decoder or one that is not installed.
    """
    if fit not in ("crop", "squash"):
        raise ConfigError(f"fit is {fit!r}; allowed: 'crop', 'squash'")
    if decoder == "pyav":
        return _PyAVReader(data, size, fit, threads)
    if decoder == "torchcodec":
        return _TorchCodecReader(data, size, fit, threads)
    if decoder != "decord":
        raise ConfigError(f"decoder is {decoder!r}; allowed: 'decord', 'pyav', 'torchcodec'")
    try:
        return _DecordReader(data, size, fit, threads, source_size)
    except _DecordRefusedError:
        return _PyAVReader(data, size, fit, threads)


def scaled_size(height: int, width: int, size: int | None, fit: Fit) -> tuple[int, int]:
    """(height, width) to scale a picture to, before its centre is cut out.

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


def centre_crop(pictures: np.ndarray, size: int | None) -> np.ndarray:
    """``(…, H, W, C)`` -> ``(…, size, size, C)``, a view; None: unchanged."""
    if size is None:
        return pictures
    top, left = (pictures.shape[-3] - size) // 2, (pictures.shape[-2] - size) // 2
    return pictures[..., top : top + size, left : left + size, :]


def _checked(indices: Sequence[int] | np.ndarray, frames: int) -> tuple[np.ndarray, np.ndarray]:
    """The different frame numbers, ascending, and where each asked one is among them."""
    asked = np.asarray(indices, dtype=np.int64)
    if asked.ndim != 1 or (asked.size and (asked.min() < 0 or asked.max() >= frames)):
        raise IndexError(f"frame numbers must lie in 0 … {frames - 1}, got {asked.tolist()}")
    return np.unique(asked, return_inverse=True)


def _channels_first(pictures: Sequence[np.ndarray], places: np.ndarray) -> np.ndarray:
    """``(H, W, C)`` pictures -> ``(n, C, H, W)``, those at these places, copied once."""
    height, width, channels = pictures[0].shape
    frames = np.empty((len(places), channels, height, width), pictures[0].dtype)
    for frame, place in zip(frames, places.tolist(), strict=True):
        frame[...] = pictures[place].transpose(2, 0, 1)
    return frames


class ScalingReader(VideoReader, Protocol):
    """An open video that gives frames in several sizes."""

    def read_scaled(self, wanted: Sequence[Wanted]) -> list[np.ndarray]:
        """uint8 ``(n, C, H, W)`` for each of (frame numbers, size, fit); every frame is decoded once for all of them.

        Raises as ``read`` does.
        """
        ...


def open_scaling(data: MediaSource, *, threads: int = 1) -> ScalingReader:
    """Opens a video for reading frames in several sizes in one pass, which PyAV alone can.

    Raises ``SampleError`` as ``open_video`` does.
    """
    return _PyAVReader(data, None, "crop", threads)


class _PyAVReader:
    def __init__(self, data: MediaSource, size: int | None, fit: Fit, threads: int) -> None:
        self._size, self._fit = size, fit
        self._container = open_container(data)
        try:
            self._stream = best_stream(self._container, "video")
            if self._stream is None:
                raise SampleError("no_video_stream", "the file has no video stream")
            context = self._stream.codec_context
            context.thread_count = threads
            context.thread_type = "AUTO" if threads > 1 else "NONE"
            context.options = {"max_pixels": str(MAX_PIXELS)}
            if context.width and context.height:
                scaled_size(context.height, context.width, size, fit)
            self._table = FrameTable.of(self._container, self._stream)
            tick, origin = float(self._stream.time_base), origin_seconds(self._container)
        except DECODE_ERRORS as error:
            self.close()
            raise SampleError("decode", short_message(error)) from error
        except SampleError:
            self.close()
            raise
        self._reformatter = VideoReformatter()
        # only where a frame that nothing refers to says so itself, and says it right
        self._skips = self._stream.codec_context.name == "h264"
        self._shape: tuple[int, int] | None = None
        self.frame_times_seconds = self._table.pts * tick - origin
        self.duration_seconds = max(0.0, self._table.end_pts * tick - origin)

    def read(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        return self.read_scaled([(indices, self._size, self._fit)])[0]

    def read_scaled(self, wanted: Sequence[Wanted]) -> list[np.ndarray]:
        checked = [_checked(indices, len(self._table.pts)) for indices, _, _ in wanted]
        numbers = np.unique(np.concatenate([own for own, _ in checked]))
        keys = np.maximum(np.searchsorted(self._table.key_pts, self._table.pts[numbers], side="right") - 1, 0)
        pictures: list[dict[int, np.ndarray]] = [{} for _ in wanted]
        takers: dict[int, list[int]] = {}
        for i, (own, _) in enumerate(checked):
            for pts in self._table.pts[own].tolist():
                takers.setdefault(pts, []).append(i)

        def take(frame: Any, pts: int) -> None:
            for i in takers[pts]:
                pictures[i][pts] = self._picture(frame, wanted[i][1], wanted[i][2])

        try:
            for key in np.unique(keys).tolist():
                self._read_group(numbers[keys == key], key, take)
        except DECODE_ERRORS as error:
            raise SampleError("decode", short_message(error)) from error
        return [
            _channels_first(list(found.values()), places) if found else np.zeros((0, 3, size or 0, size or 0), np.uint8)
            for found, (_, places), (_, size, _) in zip(pictures, checked, wanted, strict=True)
        ]

    def _read_group(self, numbers: np.ndarray, key: int, take: Callable[[Any, int], None]) -> None:
        """Takes the frames that depend on one keyframe, in order."""
        table, wanted = self._table, self._table.pts[numbers].tolist()
        # Some containers seek by time of display, some by time of decoding, which lands one keyframe early in the
        # others, and some past what was asked for (no index, open GOP): then decode from the start of the file.
        starts = (int(table.key_pts[key]), int(table.key_seek[key]), int(min(table.pts[0], table.key_seek[0])))
        read_only(self._container, self._stream)
        for attempt, target in enumerate(starts):
            self._container.seek(target, stream=self._stream, backward=True)
            if self._decode(wanted, take, skip=self._skips and attempt == 0):
                return
        raise SampleError("decode", f"frame {numbers[0]} cannot be reached")

    def _decode(self, wanted_pts: list[int], take: Callable[[Any, int], None], *, skip: bool) -> bool:
        """Decodes forward until all are taken; False, to be tried otherwise, if the first frame that comes is too late.

        ``skip``: frames that no other depends on are left undecoded unless they are wanted; False then also where
        the frames that come are not the wanted ones.
        """
        taken = 0
        previous = None
        for frame in self._frames(set(wanted_pts) if skip else None):
            pts = frame.pts if frame.pts is not None else frame.dts
            if pts is None:
                continue
            # A packet that never becomes a picture (VP8's hidden frames): the one before it stays on the screen.
            while taken < len(wanted_pts) and pts > wanted_pts[taken]:
                if previous is None or skip:
                    return False
                take(previous, wanted_pts[taken])
                taken += 1
            if taken < len(wanted_pts) and pts == wanted_pts[taken]:
                take(frame, pts)
                taken += 1
            if taken == len(wanted_pts):
                return True
            previous = frame
        if skip:
            return False
        raise SampleError("decode", f"the video ends before {wanted_pts[taken] * self._stream.time_base} s")

    def _frames(self, needed_pts: set[int] | None) -> Iterator[Any]:
        """Frames from where the container stands to its end; with ``needed_pts`` little more than these.

        Then what no other frame refers to stays undecoded, and the decoder is emptied after the last packet that
        matters instead of being fed until it lets go of its frame.
        """
        context = self._stream.codec_context
        context.skip_frame = "DEFAULT" if needed_pts is None else "NONREF"
        if needed_pts is None:
            yield from self._container.decode(self._stream)
            return
        missing = set(needed_pts)
        for packet in self._container.demux(self._stream):
            if packet.pts in missing:
                missing.remove(packet.pts)
                context.skip_frame = "DEFAULT"
                yield from packet.decode()
                context.skip_frame = "NONREF"
                if not missing:
                    yield from context.decode(None)
                    return
            else:
                yield from packet.decode()

    def _picture(self, frame: Any, size: int | None, fit: Fit) -> np.ndarray:
        """uint8 ``(H, W, C)``, scaled, turned and cropped."""
        if frame.is_corrupt:
            raise SampleError("decode", f"a damaged frame at {frame.time} s")
        turns = quarter_turns(frame)
        height, width = scaled_size(frame.height, frame.width, size, fit)
        if size is None:  # frames may change their size in mid-stream; the first one decides
            height, width = self._shape = self._shape or (height, width)
        scaled = self._reformatter.reformat(
            frame, width=width, height=height, format="rgb24", interpolation=Interpolation.BILINEAR, threads=1
        ).to_ndarray()
        return centre_crop(np.rot90(scaled, turns) if turns else scaled, size)

    @property
    def shared_container(self) -> Any:
        """The open file, for a reader of its sound; None where a format may lose its place among several streams."""
        return self._container if self._container.format.name.startswith("mov") else None

    def close(self) -> None:
        self._container.close()


class _DecordRefusedError(Exception):
    """decord is missing or not to be trusted with this file."""


def _decord_reads(head: bytes) -> bool:
    """Whether a file begins like an MP4, Matroska or AVI: its old FFmpeg shall see nothing else."""
    return head[4:8] in (b"ftyp", b"moov", b"mdat", b"free", b"wide", b"skip") or (
        head.startswith(b"\x1a\x45\xdf\xa3") or (head.startswith(b"RIFF") and head[8:12] == b"AVI ")
    )


class _DecordReader:
    def __init__(
        self, data: MediaSource, size: int | None, fit: Fit, threads: int, source_size: tuple[int, int] | None
    ) -> None:
        if not _decord_reads(read_head(data, 12)):
            raise _DecordRefusedError
        try:
            decord = importlib.import_module("decord")
        except (ImportError, OSError) as error:  # OSError: its shared library does not load here
            raise _DecordRefusedError from error
        self._errors = (RuntimeError, AssertionError, StopIteration, decord.DECORDError)
        self._data, self._size, self._fit, self._threads = data, size, fit, threads
        self._instead: _PyAVReader | None = None
        decord.logging.set_level(decord.logging.FATAL)
        height, width = -1, -1
        if size is not None:
            height, width = scaled_size(*(source_size or _displayed_size(data)), size, fit)
        try:
            file = str(data) if isinstance(data, (str, Path)) else _BytesFile(data)
            self._reader = decord.VideoReader(file, width=width, height=height, num_threads=threads)
            times = np.asarray(self._reader.get_frame_timestamp(range(len(self._reader))), dtype=np.float64)
        except self._errors as error:
            raise _DecordRefusedError from error
        # Frames before 0 are cut away by an edit list; decord counts them but never shows them.
        if not np.isfinite(times).all() or times[0, 0] < 0 or (np.diff(times[:, 0]) <= 0).any():
            raise _DecordRefusedError
        origin = 0.0
        if times[0, 0] > 0:
            with closing(open_container(data)) as container:
                origin = origin_seconds(container)
        self.frame_times_seconds = times[:, 0] - origin
        self.duration_seconds = float(times[:, 1].max() - origin)

    def read(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        numbers, places = _checked(indices, len(self.frame_times_seconds))
        if self._instead is None:
            try:
                pictures = centre_crop(self._reader.get_batch(numbers).asnumpy(), self._size)
                return np.ascontiguousarray(pictures[places].transpose(0, 3, 1, 2))
            except self._errors:
                self._instead = _PyAVReader(self._data, self._size, self._fit, self._threads)
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
    video = probe(data).video
    if video is None:
        raise SampleError("no_video_stream", "the file has no video stream")
    return video.displayed_size


class _TorchCodecReader:
    """Frame times come from the packets, as for PyAV; where torchcodec counts other frames, it is asked by time."""

    def __init__(self, data: MediaSource, size: int | None, fit: Fit, threads: int) -> None:
        try:
            decoders = importlib.import_module("torchcodec.decoders")
            transforms = importlib.import_module("torchcodec.transforms")
        except (ImportError, RuntimeError, OSError) as error:  # the latter two: FFmpeg's libraries are missing
            raise ConfigError(
                f"decoder 'torchcodec' cannot be loaded ({short_message(error)}): "
                "pip install 'mmcl[torchcodec]' and the system's FFmpeg libraries"
            ) from error
        self._size = size
        with closing(_PyAVReader(data, None, fit, 1)) as reader:
            self.frame_times_seconds = reader.frame_times_seconds
            self.duration_seconds = reader.duration_seconds
            self._origin_seconds = origin_seconds(reader._container)
        options: dict[str, Any] = {"dimension_order": "NHWC", "num_ffmpeg_threads": threads, "seek_mode": "exact"}
        if size is not None:
            options["transforms"] = [transforms.Resize(size=scaled_size(*_displayed_size(data), size, fit))]
        file = str(data) if isinstance(data, (str, Path)) else bytes(data)
        try:
            self._decoder = decoders.VideoDecoder(file, **options)
        except (RuntimeError, ValueError) as error:
            raise SampleError("decode", short_message(error)) from error

    def read(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        numbers, places = _checked(indices, len(self.frame_times_seconds))
        instants = self.frame_times_seconds[numbers] + self._origin_seconds + 1e-6
        try:
            if len(self._decoder) == len(self.frame_times_seconds):
                frames = self._decoder.get_frames_at(numbers.tolist())
            else:
                frames = self._decoder.get_frames_played_at(instants.tolist())
            pictures = frames.data.numpy()
        except (RuntimeError, ValueError, IndexError) as error:
            raise SampleError("decode", short_message(error)) from error
        return np.ascontiguousarray(centre_crop(pictures, self._size)[places].transpose(0, 3, 1, 2))

    def close(self) -> None:
        self._decoder = None
