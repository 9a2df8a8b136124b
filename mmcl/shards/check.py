"""Whether the files of one sample can be used: every frame, every sound, every caption."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from typing import Any, NamedTuple

from mmcl.media.audio import TRUNCATED_SECONDS
from mmcl.media.image import decode_image
from mmcl.media.motion_file import MEMBER, StoredMotion
from mmcl.media.probe import (
    DECODE_ERRORS,
    MAX_PIXELS,
    best_stream,
    decoded,
    open_container,
    origin_seconds,
    quarter_turns,
    read_only,
    short_message,
)
from mmcl.media.video import open_video
from mmcl.shards.members import Bytes, Sample, decode_text, parse_sample, role_of
from mmcl.shards.reader import RawSample
from mmcl.shards.vectors import read_vector
from mmcl.types import DEFAULT_DECODER, Decoder, SampleError

_FRAMES_AT_ONCE = 64
_PIXELS = 64
"""pixels of the frames that the training decoder is asked for"""


class Problem(NamedTuple):
    """What is wrong with a file of a sample, or with the sample (``member`` is "")."""

    member: str
    reason: str
    detail: str


@dataclass(frozen=True, slots=True)
class Decoded:
    """What decoding a media file to its end told."""

    video_seconds: float | None = None
    """when the last frame disappears; None: no picture"""
    audio_seconds: float | None = None
    """when the last sound ends; None: no sound track"""
    size: tuple[int, int] | None = None
    """(height, width) as displayed"""


def check_files(raw: RawSample, *, decoder: Decoder = DEFAULT_DECODER, tolerance_seconds: float = 0.5) -> list[Problem]:
    """Decodes all media of a sample to the end and reads its text; what is wrong, by file.

    Every frame is decoded twice: by PyAV, which tells damage from concealment, and by ``decoder``, with which a run
    would read it (decord ends the process on some files: call this in a child). Picture and sound, and the length that
    the JSON states (it is what readers count on), may differ by ``tolerance_seconds``.
    """
    problems: list[Problem] = []
    decoded: dict[str, Decoded] = {}
    for extension, data in raw.members.items():
        role = role_of(extension)
        try:
            if role == "image":
                decode_image(data)
            elif role in ("video", "audio"):
                decoded.setdefault(role, decode_media(data, decoder, needs_audio=role == "audio"))
            elif role == "embedding":
                if extension == f"{MEMBER}.npy":
                    StoredMotion(data)
                else:
                    read_vector(data)
            elif role == "text" and not decode_text(data).strip():
                problems.append(Problem(extension, "caption_empty", "no text in it"))
        except SampleError as error:
            problems.append(Problem(extension, error.reason, error.detail))
        except MemoryError:
            problems.append(Problem(extension, "out_of_memory", f"{len(data)} bytes"))
    try:
        sample = parse_sample(raw)
    except SampleError as error:
        if not any((problem.reason, problem.detail) == (error.reason, error.detail) for problem in problems):
            problems.append(Problem("", error.reason, error.detail))
        return problems
    return problems + _compare(sample, decoded, tolerance_seconds)


def decode_media(data: Bytes, decoder: Decoder, *, needs_audio: bool = False) -> Decoded:
    """Decodes a media file to the end. Raises ``SampleError`` at the first damage."""
    video_seconds, size = None, None
    if not needs_audio and _has_stream(data, "video"):
        with closing(open_video(data, decoder="pyav", size=_PIXELS)) as reader:
            video_seconds = reader.duration_seconds
        size = _decode_all_frames(data)
        if decoder != "pyav":
            _read_all_frames(data, decoder, size)
    audio_seconds = _decode_all_sound(data)
    if audio_seconds is None and needs_audio:
        raise SampleError("no_audio_stream", "the file has no audio stream")
    if audio_seconds is None and video_seconds is None:
        raise SampleError("no_streams", "neither a video nor an audio stream")
    return Decoded(video_seconds, audio_seconds, size)


def _compare(sample: Sample, decoded: dict[str, Decoded], tolerance_seconds: float) -> list[Problem]:
    """Where the files contradict each other or the JSON."""
    problems = []
    video, sound = decoded.get("video"), decoded.get("audio", decoded.get("video"))
    shown = video.video_seconds if video is not None else None
    heard = sound.audio_seconds if sound is not None else None
    if sample.window_seconds is not None:
        shown, heard = (_within(end, *sample.window_seconds) for end in (shown, heard))
    if shown is not None and heard is not None and abs(shown - heard) > tolerance_seconds:
        problems.append(Problem("", "durations_differ", f"{shown:.2f} s of picture, {heard:.2f} s of sound"))
    length, stated = shown if shown is not None else heard, sample.duration_seconds
    if length is not None and stated is not None and abs(length - stated) > tolerance_seconds:
        problems.append(Problem("json", "wrong_duration", f"states {stated:.2f} s, the file is {length:.2f} s long"))
    if video is not None and video.size is not None and sample.video_size not in (None, video.size):
        stated_size = "×".join(map(str, (sample.video_size or ())[::-1]))
        problems.append(
            Problem("json", "wrong_size", f"states {stated_size} pixels, the file has {video.size[1]}×{video.size[0]}")
        )
    for name, found in (("video", shown), ("audio", heard)):
        if video is not None and found is None and isinstance(sample.metadata.get(name), dict):
            problems.append(Problem("json", f"no_{name}_stream", f"states {name}, the file has none"))
    return problems


def _within(reached: float | None, start: float, end: float) -> float | None:
    """What of a window a stream fills that ends there."""
    return None if reached is None else max(0.0, min(reached, end) - start)


def _has_stream(data: Bytes, kind: str) -> bool:
    with closing(open_container(data)) as container:
        return best_stream(container, kind) is not None


def _decode_all_frames(data: Bytes) -> tuple[int, int]:
    """(height, width) of the first frame as displayed."""
    size: tuple[int, int] | None = None
    with closing(open_container(data)) as container:
        stream = best_stream(container, "video")
        stream.codec_context.thread_count = 1
        stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}
        read_only(container, stream)
        try:
            for frame in decoded(container, stream):
                if frame.is_corrupt:
                    raise SampleError("decode", f"a damaged frame at {frame.time} s")
                if size is None:
                    turned = quarter_turns(frame) % 2
                    size = (frame.width, frame.height) if turned else (frame.height, frame.width)
        except DECODE_ERRORS as error:
            raise SampleError("decode", short_message(error)) from error
    if size is None:
        raise SampleError("decode", "no frame could be decoded")
    return size


def _read_all_frames(data: Bytes, decoder: Decoder, size: tuple[int, int]) -> None:
    with closing(open_video(data, decoder=decoder, size=_PIXELS, source_size=size)) as reader:
        count = len(reader.frame_times_seconds)
        for first in range(0, count, _FRAMES_AT_ONCE):
            reader.read(range(first, min(first + _FRAMES_AT_ONCE, count)))


def _decode_all_sound(data: Bytes) -> float | None:
    """When the last sound ends; None without a sound track."""
    with closing(open_container(data)) as container:
        stream = best_stream(container, "audio")
        if stream is None:
            return None
        stream.codec_context.thread_count = 1
        read_only(container, stream)
        end, origin = 0.0, origin_seconds(container)
        try:
            for frame in decoded(container, stream):
                if frame.sample_rate and frame.samples:
                    begin = end if frame.time is None else frame.time - origin
                    end = max(end, begin + frame.samples / frame.sample_rate)
        except DECODE_ERRORS as error:
            raise SampleError("decode", f"audio: {short_message(error)}") from error
        stated = _stated_end(container, stream, origin)
    if not end:
        raise SampleError("decode", "audio: no sound could be decoded")
    if stated - end > TRUNCATED_SECONDS:
        raise SampleError("truncated", f"the sound ends at {end:.2f} s of {stated:.2f} s")
    return end


def _stated_end(container: Any, stream: Any, origin: float) -> float:
    """What the file says, where that can be held against the data: only MP4 and QuickTime state it, others estimate."""
    if not stream.duration or not container.format.name.startswith("mov"):
        return 0.0
    return float(((stream.start_time or 0) + stream.duration) * stream.time_base) - origin
