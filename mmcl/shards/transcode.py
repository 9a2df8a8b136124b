"""One source file, or a stretch of it, to training-ready media.

How a shard was encoded matters more for training speed than which library decodes it, so clips are scaled to the size
that training crops from, with a key frame every half second or so, and in what decodes fastest: H.264 without B-frames
(frame times are exact and nothing is decoded ahead), ``tune=fastdecode`` (5 % more bytes for a fifth less decoding
time, measured on 240 frames at 128 px), constant frame rate, mono AAC at a standard sample rate. One thread, so equal
input makes equal bytes.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.video.reformatter import Interpolation, VideoReformatter
from PIL import Image

from mmcl.media.audio import read_audio
from mmcl.media.crop import Crop, Cropper, check_crop
from mmcl.media.image import decode_image
from mmcl.media.probe import (
    MAX_PIXELS,
    MediaInfo,
    best_stream,
    open_container,
    origin_seconds,
    probe,
    quarter_turns,
    short_message,
)
from mmcl.media.video import MAX_FRAMES
from mmcl.shards.members import ROLES
from mmcl.shards.steady import steady_memory
from mmcl.types import ConfigError, SampleError

AUDIO_RATES = (8_000, 11_025, 12_000, 16_000, 22_050, 24_000, 32_000, 44_100, 48_000)
"""hertz that AAC and every player know"""
MAX_FPS = 120.0
_AUDIO_BIT_RATE = 64_000
_AUDIO_STEP_SECONDS = 20.0
_AAC_FRAME = 1024
_ESTIMATED_DURATION = frozenset(
    ("mp3", "mp2", "aac", "ac3", "mpeg", "mpegts", "mpegvideo", "mjpeg", "h264", "hevc", "gif", "apng")
)
"""containers that do not declare how long they are: FFmpeg guesses from the bit rate"""


@dataclass(frozen=True, slots=True)
class MediaOptions:
    """How media are written."""

    short_side: int = 128
    """pixels of the shorter side; smaller sources keep their size"""
    fps: float | None = None
    """at most this many frames per second; None: the source's own rate"""
    gop: int = 16
    """frames from one key frame to the next"""
    crf: int = 23
    """x264's constant quality, 0 (lossless) … 51"""
    audio_rate_hz: int = 32_000
    """at most; the next standard rate above the source's where that is lower"""
    crop: Crop | None = None
    """what is kept of every picture; None: all of it"""

    def __post_init__(self) -> None:
        if self.crop is not None and (min(self.crop[:2]) < 0 or min(self.crop[2:]) < 2):
            raise ConfigError(f"crop={':'.join(map(str, self.crop))}: X:Y:W:H, no side below 2 pixels")
        limits = {"short_side": (16, 4096), "gop": (1, 1000), "crf": (0, 51)}
        for name, (low, high) in limits.items():
            if not low <= getattr(self, name) <= high:
                raise ConfigError(f"{name}={getattr(self, name)}: from {low} to {high}")
        if self.fps is not None and not 0.1 <= self.fps <= MAX_FPS:
            raise ConfigError(f"fps={self.fps}: from 0.1 to {MAX_FPS:g}")
        if self.audio_rate_hz not in AUDIO_RATES:
            raise ConfigError(f"audio_rate_hz={self.audio_rate_hz}: one of {', '.join(map(str, AUDIO_RATES))}")


def parse_crop(text: str) -> Crop | None:
    """``X:Y:W:H`` in pixels; None for an empty text. Raises ``ConfigError``.

    >>> parse_crop("0:10:64:48")
    (0, 10, 64, 48)
    """
    if not text:
        return None
    parts = text.split(":")
    if len(parts) != 4 or not all(part.isascii() and part.isdigit() and len(part) < 7 for part in parts):
        raise ConfigError(f"crop={text[:60]}: X:Y:W:H in whole pixels")
    x, y, width, height = map(int, parts)
    return x, y, width, height


@dataclass(frozen=True, slots=True)
class Transcoded:
    """One encoded medium and what it holds."""

    extension: str
    """``mp4`` (with or without sound), ``m4a`` (sound alone) or ``jpg``"""
    data: bytes
    duration_seconds: float | None
    video: dict[str, Any] | None
    """``width``, ``height``, ``fps``, ``frames``"""
    audio: dict[str, Any] | None
    """``sample_rate_hz``, ``channels``, ``samples``"""


def transcode(
    path: str | Path,
    options: MediaOptions,
    *,
    start_seconds: float | None = None,
    end_seconds: float | None = None,
    with_sound: bool = True,
) -> Transcoded:
    """Encodes the half-open stretch ``[start, end)`` of a file; picture and sound are cut at the same instants.

    ``with_sound=False`` leaves out the sound of a video.

    Raises ``SampleError``: ``missing_file``, ``unreadable``, ``empty``, ``not_media``, ``not_an_image``,
    ``no_streams``, ``too_large``, ``window_outside``, ``crop_outside``, ``truncated``, ``decode``.
    """
    if ROLES.get(Path(path).suffix[1:].lower()) == "image":
        return _picture(path, options)
    info = probe(path)
    if not with_sound and info.video is not None:
        info = replace(info, audio=None)
    start = start_seconds or 0.0
    end = math.inf if end_seconds is None else end_seconds
    if info.duration_seconds and start >= info.duration_seconds:
        raise SampleError("window_outside", f"starts at {start:g} s of {info.duration_seconds:g} s")
    try:
        with steady_memory():
            return _Encoder(str(path), info, options, start, end).run()
    except av.FFmpegError as error:
        raise SampleError("decode", short_message(error)) from error


def _picture(path: str | Path, options: MediaOptions) -> Transcoded:
    image = Image.fromarray(decode_image(path).transpose(1, 2, 0))
    if options.crop is not None:
        x, y, width, height = check_crop(options.crop, image.width, image.height)
        image = image.crop((x, y, x + width, y + height))
    scale = min(1.0, options.short_side / min(image.size))
    width, height = (max(1, round(side * scale)) for side in image.size)
    if scale < 1:
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    out = io.BytesIO()
    image.save(out, "JPEG", quality=92)
    return Transcoded("jpg", out.getvalue(), None, {"width": width, "height": height, "fps": 0.0, "frames": 1}, None)


class _Encoder:
    """One file on its way through; times are seconds on the source's clock."""

    def __init__(self, path: str, info: MediaInfo, options: MediaOptions, start: float, end: float) -> None:
        self.path, self.info, self.options, self.start, self.end = path, info, options, start, end
        self.audio_end = start
        self.audio_rate = 0
        if info.audio is not None:
            enough = [rate for rate in AUDIO_RATES if rate >= info.audio.sample_rate_hz]
            self.audio_rate = min(options.audio_rate_hz, *enough, AUDIO_RATES[-1])
            self.audio_end = max(start, min(end, _stream_end(path, "audio", start, end)))
        self.audio_samples = round((self.audio_end - start) * self.audio_rate)
        self.audio_done = 0

    def run(self) -> Transcoded:
        buffer = io.BytesIO()
        video: dict[str, Any] | None = None
        video_seconds = 0.0
        extension = "mp4" if self.info.video is not None else "m4a"
        if self.info.video is None:
            self._check_length(self.audio_end)
        # "bitexact" keeps the library's version out of the bytes
        with av.open(buffer, "w", format="mp4", container_options={"fflags": "+bitexact"}) as out:
            sound = self._add_sound(out) if self.audio_samples else None
            if self.info.video is not None:
                video, video_seconds = self._encode_video(out, sound)
            if sound is not None:
                self._encode_audio(out, sound, math.inf)
                out.mux(sound.encode(None))
        if self.info.video is None and sound is None:
            raise SampleError("truncated", "no sound could be read")
        audio = None
        if sound is not None:
            audio = {"sample_rate_hz": self.audio_rate, "channels": 1, "samples": self.audio_samples}
        seconds = video_seconds or self.audio_samples / self.audio_rate
        return Transcoded(extension, buffer.getvalue(), round(seconds, 6), video, audio)

    def _check_length(self, reached: float) -> None:
        """Refuses a file that ends well before it says: what is left of a broken download."""
        declared = 0.0 if _container_name(self.path) in _ESTIMATED_DURATION else self.info.duration_seconds
        wanted = min(self.end, declared)
        if wanted - reached > max(0.5, 0.1 * (wanted - self.start)):
            raise SampleError("truncated", f"ends at {reached:.2f} s, {wanted:.2f} s were announced")

    def _add_sound(self, out: Any) -> Any:
        sound = out.add_stream("aac", rate=self.audio_rate, layout="mono")
        sound.bit_rate = _AUDIO_BIT_RATE
        sound.codec_context.thread_count = 1
        sound.codec_context.flags |= av.codec.context.Flags.bitexact
        return sound

    def _encode_audio(self, out: Any, sound: Any, until: float) -> None:
        """Sound up to ``until`` seconds, in steps, so that an hour of it is never in memory at once."""
        step = round(_AUDIO_STEP_SECONDS * self.audio_rate / _AAC_FRAME) * _AAC_FRAME
        while self.audio_done < self.audio_samples and self.start + self.audio_done / self.audio_rate <= until:
            count = min(step, self.audio_samples - self.audio_done)
            begin = self.start + self.audio_done / self.audio_rate
            wave = read_audio(
                self.path,
                start_seconds=begin,
                end_seconds=begin + count / self.audio_rate,
                sample_rate_hz=self.audio_rate,
            )
            assert wave is not None
            for first in range(0, count, _AAC_FRAME):
                piece = np.ascontiguousarray(wave[None, first : first + _AAC_FRAME])
                frame = av.AudioFrame.from_ndarray(piece, format="fltp", layout="mono")
                frame.sample_rate, frame.time_base = self.audio_rate, Fraction(1, self.audio_rate)
                frame.pts = self.audio_done + first
                out.mux(sound.encode(frame))
            self.audio_done += count

    def _encode_video(self, out: Any, sound: Any) -> tuple[dict[str, Any], float]:
        with closing(open_container(self.path)) as container:
            stream = best_stream(container, "video")
            rate = _frame_rate(stream, self.options.fps)
            picture: Any = None
            count = 0
            pictures = _Pictures(container, stream, self.options, self.start, self.end)
            for number, frame in _constant_rate(pictures, rate):
                if picture is None:
                    picture = self._add_picture(out, frame, rate)
                if sound is not None:
                    self._encode_audio(out, sound, self.start + float(number / rate))
                frame.pts, frame.time_base = number, 1 / rate
                frame.pict_type = av.video.frame.PictureType.NONE
                out.mux(picture.encode(frame))
                count = number + 1
            if picture is None:
                raise SampleError("truncated", "no picture could be read")
            out.mux(picture.encode(None))
        self._check_length(max(pictures.reached, self.audio_end if self.end == math.inf else 0.0))
        if _container_name(self.path) not in _ESTIMATED_DURATION:
            self._check_video_length(pictures)
        facts = {"width": picture.width, "height": picture.height, "fps": float(round(rate, 6)), "frames": count}
        return facts, count / float(rate)

    def _check_video_length(self, pictures: _Pictures) -> None:
        """The picture alone, where the stream itself says how long it is."""
        wanted = min(self.end, pictures.declared_end)
        if wanted - pictures.reached > max(0.5, 0.1 * (wanted - self.start)):
            raise SampleError("truncated", f"the picture ends at {pictures.reached:.2f} s of {wanted:.2f} s")

    def _add_picture(self, out: Any, frame: Any, rate: Fraction) -> Any:
        picture = out.add_stream("libx264", rate=rate)
        picture.width, picture.height, picture.pix_fmt = frame.width, frame.height, "yuv420p"
        context = picture.codec_context
        context.thread_count, context.gop_size, context.max_b_frames = 1, self.options.gop, 0
        context.flags |= av.codec.context.Flags.bitexact
        picture.options = {"preset": "veryfast", "tune": "fastdecode", "crf": str(self.options.crf), "bf": "0"}
        return picture


class _Pictures:
    """Cropped, scaled frames that are on screen within ``[start, end)``, as (seconds since start, frame)."""

    def __init__(self, container: Any, stream: Any, options: MediaOptions, start: float, end: float) -> None:
        self._container, self._stream, self._short_side = container, stream, options.short_side
        self._cropper = Cropper(options.crop) if options.crop is not None else None
        self._start, self._end = start, end
        self._origin = origin_seconds(container)
        self._reformatter = VideoReformatter()
        self._size: tuple[int, int] | None = None
        self.reached = start
        """when the last frame that was read disappears"""
        length = float(stream.duration * stream.time_base) if stream.duration else 0.0
        first = float(stream.start_time * stream.time_base) - self._origin if stream.start_time else 0.0
        self.declared_end = first + length
        stream.codec_context.thread_count = 1
        stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}

    def __iter__(self) -> Iterator[tuple[float, Any]]:
        if self._start > 0:
            ticks = int((self._start + self._origin) / self._stream.time_base)
            self._container.seek(ticks, stream=self._stream, backward=True)
        before: Any = None
        step = 1 / float(self._stream.average_rate or 25)
        for frame in self._container.decode(self._stream):
            if frame.pts is None:
                continue
            time = float(frame.pts * frame.time_base) - self._origin
            self.reached = max(self.reached, time + (float(frame.duration * frame.time_base) or step))
            if time >= self._end:
                break
            if time < self._start:
                before = frame
                continue
            if frame.is_corrupt:
                raise SampleError("decode", f"damaged picture at {time:.3f} s")
            if before is not None and time > self._start:
                yield 0.0, self._scale(before)
            before = None
            yield time - self._start, self._scale(frame)
        if before is not None and self.reached > self._start:
            yield 0.0, self._scale(before)  # a stretch shorter than a frame

    def _scale(self, frame: Any) -> Any:
        turns = quarter_turns(frame)
        if self._cropper is not None:
            frame = self._cropper.crop(frame, turns)
        if self._size is None:
            self._size = _target_size(frame, self._stream, self._short_side)
        width, height = self._size
        scaled = self._reformatter.reformat(
            frame,
            width=width,
            height=height,
            format="rgb24" if turns else "yuv420p",
            interpolation=Interpolation.AREA if frame.width > width else Interpolation.BICUBIC,
        )
        if not turns:
            return scaled
        turned = av.VideoFrame.from_ndarray(np.ascontiguousarray(np.rot90(scaled.to_ndarray(), turns)), format="rgb24")
        return turned.reformat(format="yuv420p")


def _target_size(frame: Any, stream: Any, short_side: int) -> tuple[int, int]:
    """(width, height) before turning: square pixels, even, the shorter side at most ``short_side``."""
    aspect = float(stream.sample_aspect_ratio or 1)
    shown = frame.width * (aspect if 0.1 < aspect < 10 else 1.0), float(frame.height)
    scale = min(1.0, short_side / min(shown))
    width, height = (max(2, 2 * round(side * scale / 2)) for side in shown)
    return width, height


def _frame_rate(stream: Any, fps: float | None) -> Fraction:
    rate = Fraction(stream.average_rate or stream.guessed_rate or 25)
    # Where the frame rate varies a little, the rate of the densest frames keeps them all.
    if stream.guessed_rate and rate < stream.guessed_rate <= 2 * rate:
        rate = Fraction(stream.guessed_rate)
    if not 0 < rate <= MAX_FPS:
        rate = Fraction(25)
    limit = Fraction(fps).limit_denominator(1001) if fps is not None else rate
    return min(rate, limit).limit_denominator(60_000)


def _constant_rate(pictures: _Pictures, rate: Fraction) -> Iterator[tuple[int, Any]]:
    """(n, frame) for n = 0, 1, …: what is on screen at n / rate, to the nearest half frame of time."""
    held: Any = None
    slot = 0
    for seconds, frame in pictures:
        # Half a frame off is always the later one: rounding to even would drop and repeat every other frame.
        due = math.floor(seconds * float(rate) + 0.5 + 1e-4)
        if due > MAX_FRAMES:
            raise SampleError("too_large", f"a frame at {seconds:.0f} s, at most {MAX_FRAMES} frames are written")
        while held is not None and slot < due:
            yield slot, held
            slot += 1
        held = frame
    last = round((min(pictures.reached, pictures._end) - pictures._start) * float(rate))
    while held is not None and slot < max(last, 1):
        yield slot, held
        slot += 1


def _stream_end(path: str, kind: str, start: float, end: float) -> float:
    """When the last packet of a stream before ``end`` ends, read from the packets themselves, not the header."""
    with closing(open_container(path)) as container:
        stream, origin = best_stream(container, kind), origin_seconds(container)
        for other in container.streams:
            if other.index != stream.index:
                other.discard = av.stream.Discard.all
        declared = (container.duration or 0) / 1e6
        late = min(end, declared) - 2.0
        for begin in [late, start] if late > start else [start]:
            ticks = int((begin + origin) / stream.time_base)
            if begin > 0:
                container.seek(ticks, stream=stream, backward=True)
            reached = -1.0
            for packet in container.demux(stream):
                if packet.pts is None:
                    continue
                time = float(packet.pts * packet.time_base) - origin
                if time >= end:
                    return end
                reached = max(reached, time + float((packet.duration or 0) * packet.time_base))
            if reached > begin:
                return reached
        return start


def _container_name(path: str) -> str:
    with closing(open_container(path)) as container:
        return str(container.format.name).split(",")[0]
