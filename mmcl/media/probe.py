"""What a media file holds, and the one place where PyAV opens one.

Files are hostile input. Only container formats of media are opened: FFmpeg also reads playlists and scripts
(HLS, concat, DASH, …) that name other files and addresses, and those would be fetched while "decoding" a sample.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import av

from mmcl.types import SampleError

MediaSource: TypeAlias = bytes | bytearray | memoryview | str | Path
"""The bytes of a file, or its path."""

MICROSECONDS = 1_000_000
MAX_PIXELS = 8192 * 8192
"""of one picture, as stored and as scaled"""
FORMATS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,live_flv,asf,ogg,nut,mxf,ivf,h264,hevc,m4v,"
    "mjpeg,gif,apng,wav,w64,rf64,aiff,au,caf,flac,mp3,mp2,aac,ac3,eac3,dts,amr,wv,tta,ape"
)


_HDR = {16: "smpte2084", 18: "arib-std-b67"}
"""FFmpeg's number of a transfer curve -> its name"""
DECODE_ERRORS = (av.FFmpegError, ValueError, IndexError, OverflowError, ZeroDivisionError)
"""what PyAV raises on damaged files: FFmpeg's own errors, and Python's where its tables no longer fit the file"""


@dataclass(frozen=True, slots=True)
class VideoInfo:
    """The video stream that is read (FFmpeg's choice if there are several)."""

    codec: str
    width: int
    """pixels as stored, before ``rotation_degrees``"""
    height: int
    """pixels as stored, before ``rotation_degrees``"""
    fps: float
    """mean frames per second; 0 if unknown"""
    frames: int
    """as declared by the file, which may lie; 0 if it says nothing"""
    rotation_degrees: int
    """how far a player turns the picture counter-clockwise: 0, 90, 180 or 270"""
    hdr: str = ""
    """the transfer curve of a high dynamic range (``smpte2084``, ``arib-std-b67``), which no reader undoes"""

    @property
    def displayed_size(self) -> tuple[int, int]:
        """(height, width) in pixels as shown by a player."""
        return (self.width, self.height) if self.rotation_degrees in (90, 270) else (self.height, self.width)


@dataclass(frozen=True, slots=True)
class AudioInfo:
    codec: str
    sample_rate_hz: int
    channels: int


@dataclass(frozen=True, slots=True)
class MediaInfo:
    duration_seconds: float
    """from the earliest stream's start to the latest one's end"""
    video: VideoInfo | None
    audio: AudioInfo | None


def open_container(source: MediaSource) -> Any:
    """An open ``av.container.InputContainer``; the caller closes it.

    Raises ``SampleError``: ``missing_file``, ``unreadable``, ``empty`` (no bytes), ``not_media``.
    """
    name = "data"
    file: str | io.BytesIO
    if isinstance(source, (str, Path)):
        path = Path(source)
        name = str(source)
        if not read_head(source, 1):
            raise SampleError("empty", f"{name} holds no bytes")
        # The prefix keeps FFmpeg from taking a name such as "concat:a|b" or "http://…" for an address.
        file = f"file:{path.absolute()}"
    else:
        if not len(source):
            raise SampleError("empty", "0 bytes")
        file = io.BytesIO(source)
    try:
        return av.open(
            file,
            metadata_errors="replace",
            options={"max_pixels": str(MAX_PIXELS)},  # opening decodes the first pictures of some files
            container_options={"format_whitelist": FORMATS},
        )
    except DECODE_ERRORS as error:
        raise SampleError("not_media", f"{name}: {short_message(error)}") from error


def read_head(source: MediaSource, length_bytes: int) -> bytes:
    """The first bytes of a source. Raises ``SampleError``: ``missing_file``, ``unreadable``."""
    if not isinstance(source, (str, Path)):
        return bytes(source[:length_bytes])
    try:
        with Path(source).open("rb") as file:
            return file.read(length_bytes)
    except FileNotFoundError as error:
        raise SampleError("missing_file", str(source)) from error
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        raise SampleError("unreadable", f"{source}: {error}") from error


def short_message(error: BaseException) -> str:
    """The first line of an error, cut to a length that fits a log line."""
    lines = str(getattr(error, "strerror", None) or error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


def origin_seconds(container: Any) -> float:
    """Where the shared clock of a container starts, on FFmpeg's clock: its earliest stream's start, at least 0.

    Broadcast recordings start at hours. A start below 0 is encoder priming, which no player shows.
    """
    return max(0.0, (container.start_time or 0) / MICROSECONDS)


def best_stream(container: Any, kind: str) -> Any:
    """FFmpeg's choice among the streams of a kind (``video``, ``audio``) or None; cover art is not video."""
    streams = [s for s in getattr(container.streams, kind) if s.codec_context is not None]
    if kind == "video":
        streams = [s for s in streams if not s.disposition & av.stream.Disposition.attached_pic]
    best = container.streams.best(kind)
    if best is not None and any(s.index == best.index for s in streams):
        return best
    return streams[0] if streams else None


def read_only(container: Any, stream: Any) -> None:
    """Lets the container skip the packets of all other streams, until it is called for one of those."""
    discard = getattr(av.stream, "Discard", None)  # PyAV 18; before, they are read and thrown away
    if discard is not None:
        for other in container.streams:
            other.discard = discard.default if other.index == stream.index else discard.all


def demuxed(container: Any, streams: Any) -> Iterator[Any]:
    """The packets of a stream or of several, from where the container stands; then an empty one of each.

    PyAV's own generator frees what it reads into at its end or when it is closed, but not (PyAV 18.1) where it is left
    in the middle and dropped: 150 bytes that a worker would lose several times a sample.
    """
    with closing(container.demux(streams)) as packets:
        yield from packets


def decoded(container: Any, stream: Any) -> Iterator[Any]:
    """The frames of a stream from where the container stands; see ``demuxed``."""
    for packet in demuxed(container, stream):
        yield from packet.decode()


def probe(source: MediaSource) -> MediaInfo:
    """Describes a file without decoding it, except for one frame of video to learn its rotation.

    Raises ``SampleError``: ``missing_file``, ``unreadable``, ``empty`` (no bytes), ``not_media``, ``no_streams``
    (a container without video and audio), ``too_large`` (see ``MAX_PIXELS``).
    """
    with closing(open_container(source)) as container:
        video, audio = best_stream(container, "video"), best_stream(container, "audio")
        if video is None and audio is None:
            raise SampleError("no_streams", "neither a video nor an audio stream")
        return MediaInfo(
            duration_seconds=_duration_seconds(container, [s for s in (video, audio) if s is not None]),
            audio=_audio_info(audio) if audio is not None else None,
            video=_video_info(container, video) if video is not None else None,
        )


def _duration_seconds(container: Any, streams: list[Any]) -> float:
    if container.duration:
        return max(0.0, float(container.duration / MICROSECONDS))
    ends = [float(s.duration * s.time_base) for s in streams if s.duration and s.time_base]
    if ends:
        return max(ends)
    # Written by a program that never came back to fill in the header: the packets know.
    end = 0.0
    try:
        for packet in demuxed(container, streams):
            if packet.pts is not None and packet.time_base:
                end = max(end, float((packet.pts + (packet.duration or 0)) * packet.time_base))
    except DECODE_ERRORS as error:
        raise SampleError("decode", short_message(error)) from error
    return max(0.0, end - origin_seconds(container))


def _audio_info(stream: Any) -> AudioInfo:
    context = stream.codec_context
    return AudioInfo(context.name, int(context.sample_rate or 0), int(context.channels or 0))


def _video_info(container: Any, stream: Any) -> VideoInfo:
    context = stream.codec_context
    if (context.width or 0) * (context.height or 0) > MAX_PIXELS:
        raise SampleError("too_large", f"{context.width}×{context.height} pixels, at most {MAX_PIXELS} are read")
    fps = float(stream.average_rate or 0)
    return VideoInfo(
        codec=context.name,
        width=int(context.width or 0),
        height=int(context.height or 0),
        fps=fps if math.isfinite(fps) else 0.0,
        frames=max(0, int(stream.frames or 0)),
        rotation_degrees=_rotation_degrees(container, stream),
        hdr=_HDR.get(int(context.color_trc or 0), ""),
    )


def _rotation_degrees(container: Any, stream: Any) -> int:
    stream.codec_context.thread_count = 1
    stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}  # the stream may say other than the container
    try:
        container.seek(0)
        for frame in decoded(container, stream):
            return quarter_turns(frame) * 90
    except DECODE_ERRORS:
        return 0  # what cannot be decoded is reported by whoever reads it
    return 0


def quarter_turns(frame: Any) -> int:
    """How many quarters a player turns this frame counter-clockwise: 0 … 3."""
    return round((frame.rotation or 0) / 90) % 4
