"""One source file, or a stretch of it, to training-ready media.

How a shard was encoded matters more for training speed than which library decodes it, so clips are scaled to the size
that training crops from, with a key frame every half second or so, and in what decodes fastest: H.264 without B-frames
(frame times are exact and nothing is decoded ahead), ``tune=fastdecode`` (5 % more bytes for a fifth less decoding
time, measured on 240 frames at 128 px), constant frame rate, mono sound at a standard sample rate. One thread, so equal
input makes equal bytes.

A stream that is copied is kept whole: it cannot be cut between key frames without encoding it again. A stretch is then
a window that stands in the sample's JSON, and the stream beside it is whole, too, so that one clock serves both.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import av
from PIL import Image

from mmcl.media.crop import check_crop
from mmcl.media.image import decode_image
from mmcl.media.probe import MediaInfo, best_stream, open_container, probe, short_message
from mmcl.shards.encoding import MediaOptions as MediaOptions
from mmcl.shards.encoding import container_for, extension_of
from mmcl.shards.encoding import parse_crop as parse_crop
from mmcl.shards.members import ROLES
from mmcl.shards.pictures import Pictures, constant_rate, frame_rate
from mmcl.shards.steady import steady_memory
from mmcl.shards.tracks import CopiedTrack, EncodedSound, Track, open_output, sound_steps, stream_end
from mmcl.types import SampleError

_ESTIMATED_DURATION = frozenset(
    ("mp3", "mp2", "aac", "ac3", "mpeg", "mpegts", "mpegvideo", "mjpeg", "h264", "hevc", "gif", "apng")
)
"""containers that do not declare how long they are: FFmpeg guesses from the bit rate"""
_SOUND_ALONE = {"aac": ("mp4", "m4a"), "opus": ("opus", "opus"), "flac": ("flac", "flac"), "wav": ("wav", "wav")}
"""codec -> FFmpeg's container, extension"""
_NOTICEABLE_SECONDS = 0.1
_TICKS = 1024
"""of a frame that is not as long as the others"""
_MJPEG_QUALITY = 3
"""2 (best) … 31"""


@dataclass(frozen=True, slots=True)
class Transcoded:
    """One encoded medium and what it holds."""

    extension: str
    """``mp4`` (with or without sound), ``m4a``, ``opus``, ``flac``, ``wav`` (sound alone), ``jpg``, a copied file's"""
    data: bytes
    duration_seconds: float | None
    video: dict[str, Any] | None
    """``width``, ``height``, ``fps``, ``frames``"""
    audio: dict[str, Any] | None
    """``sample_rate_hz``, ``channels``, ``samples``"""
    beside: Mapping[str, bytes] = field(default_factory=dict)
    """other members: the sound as ``wav``"""
    hdr: str = ""
    """the source's HDR tag, which is not followed"""
    window_seconds: tuple[float, float] | None = None
    """what of the file the sample is; None: all of it"""


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
    ``no_streams``, ``too_large``, ``window_outside``, ``crop_outside``, ``truncated``, ``decode``, ``cannot_copy``.
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
            made = _Encoder(str(path), info, options, start, end).run()
    except av.FFmpegError as error:
        raise SampleError("decode", short_message(error)) from error
    return replace(made, hdr=info.video.hdr) if info.video is not None and info.video.hdr else made


def _picture(path: str | Path, options: MediaOptions) -> Transcoded:
    picture = decode_image(path)
    facts: dict[str, Any] = {"width": picture.shape[2], "height": picture.shape[1], "fps": 0.0, "frames": 1}
    if options.short_side is None:
        return Transcoded(Path(path).suffix[1:].lower(), Path(path).read_bytes(), None, facts, None)
    image = Image.fromarray(picture.transpose(1, 2, 0))
    if options.crop is not None:
        x, y, width, height = check_crop(options.crop, image.width, image.height)
        image = image.crop((x, y, x + width, y + height))
    scale = min(1.0, options.short_side / min(image.size))
    width, height = (max(1, round(side * scale)) for side in image.size)
    if scale < 1:
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    out = io.BytesIO()
    image.save(out, "JPEG", quality=92)
    return Transcoded("jpg", out.getvalue(), None, facts | {"width": width, "height": height}, None)


class _Encoder:
    """One file on its way through; times are seconds on the source's clock."""

    def __init__(self, path: str, info: MediaInfo, options: MediaOptions, start: float, end: float) -> None:
        self.path, self.info, self.options, self.start, self.end = path, info, options, start, end
        self.container = _container_name(path)
        self.copied = {
            kind
            for kind, codec, found in (("video", options.codec, info.video), ("audio", options.audio_codec, info.audio))
            if found is not None and codec == "copy"
        }
        self.zero = 0.0
        """where on the source's clock a file begins whose picture is copied and whose sound lies beside it"""
        self.audio_end = start
        self.audio_rate = 0
        if info.audio is not None:
            self.audio_rate = info.audio.sample_rate_hz
            if options.audio_rate_hz is not None:
                enough = [rate for rate in options.audio_rates if rate >= self.audio_rate]
                self.audio_rate = min(options.audio_rate_hz, *enough, options.audio_rates[-1])
            self.audio_end = max(start, min(end, stream_end(path, "audio", start, end)))
        self.audio_samples = round((self.audio_end - start) * self.audio_rate)

    def run(self) -> Transcoded:
        if not self.copied:
            return self._encode()
        looked = self._look()
        if len(self.copied) == (self.info.video is not None) + (self.info.audio is not None):
            made = self._stored(looked)
        else:
            whole = _Encoder(self.path, self.info, self.options, 0.0, math.inf)
            made = whole._encode()
            self.zero = whole.zero
        start, end = max(self.start, self.zero) - self.zero, self.start + (looked.duration_seconds or 0.0) - self.zero
        made = replace(made, duration_seconds=round(end - start, 6))
        if self.start > 0 or self.end < math.inf:
            made = replace(made, window_seconds=(round(start, 6), round(end, 6)))
        return made

    def _look(self) -> Transcoded:
        """Decodes the stretch, so that damage is found as when it is encoded; what it holds, without data."""
        video, seconds = None, 0.0
        if self.info.video is not None:
            video, seconds = self._decode_video()
        elif self.audio_samples:
            self._check_length(self.audio_end)
        if self.audio_samples:
            for _ in sound_steps(self.path, self.start, self.audio_samples, self.audio_rate):
                pass
        if video is None and not self.audio_samples:
            raise SampleError("truncated", "no sound could be read")
        seconds = min(seconds or self.audio_samples / self.audio_rate, self.end - self.start)
        return Transcoded("", b"", round(seconds, 6), video, self._audio_facts())

    def _decode_video(self) -> tuple[dict[str, Any], float]:
        with closing(open_container(self.path)) as container:
            stream = best_stream(container, "video")
            pictures = Pictures(container, stream, self.options, self.start, self.end)
            size, count = (0, 0), 0
            for _, frame in pictures:
                size, count = size if count else pictures.displayed_size(frame), count + 1
            if not count:
                raise SampleError("truncated", "no picture could be read")
            self._check_lengths(pictures)
            self.zero = pictures.first if "video" in self.copied and self.options.audio_codec == "wav" else 0.0
            assert self.info.video is not None
            facts = {"width": size[0], "height": size[1], "fps": round(self.info.video.fps, 6), "frames": count}
            return facts, pictures.reached - self.start

    def _stored(self, looked: Transcoded) -> Transcoded:
        """The file as it is."""
        extension = extension_of(self.container, has_video=self.info.video is not None)
        if extension is None:
            raise SampleError("cannot_copy", f"shards have no extension for the container {self.container}")
        return replace(looked, extension=extension, data=Path(self.path).read_bytes())

    def _encode(self) -> Transcoded:
        if self.info.video is None:
            return self._encode_sound_alone()
        buffer, beside = io.BytesIO(), io.BytesIO()
        apart = self.options.audio_codec == "wav" and self.audio_samples > 0
        codecs = [self._codec_of("video"), *([self._codec_of("audio")] if self.audio_samples and not apart else [])]
        container, extension = container_for(*codecs)
        # "bitexact" keeps the library's version out of the bytes
        with ExitStack() as opened:
            out = opened.enter_context(open_output(buffer, container))
            wav = opened.enter_context(open_output(beside, "wav")) if apart else out
            if "video" in self.copied:
                video, seconds = self._decode_video()
                if apart:
                    self._begin_at(self.zero)
                sound = self._add_sound(wav, opened)
                self._copy_video(opened, out, sound, seconds)
            else:
                sound = self._add_sound(wav, opened)
                video, seconds = self._encode_video(out, sound)
            if sound is not None:
                sound.finish()
        members = {"wav": beside.getvalue()} if apart else {}
        return Transcoded(extension, buffer.getvalue(), round(seconds, 6), video, self._audio_facts(), members)

    def _encode_sound_alone(self) -> Transcoded:
        self._check_length(self.audio_end)
        if not self.audio_samples:
            raise SampleError("truncated", "no sound could be read")
        buffer = io.BytesIO()
        container, extension = _SOUND_ALONE[str(self.options.audio_codec)]
        with ExitStack() as opened:
            out = opened.enter_context(open_output(buffer, container))
            sound = self._add_sound(out, opened)
            assert sound is not None
            sound.finish()
        seconds = self.audio_samples / self.audio_rate
        return Transcoded(extension, buffer.getvalue(), round(seconds, 6), None, self._audio_facts())

    def _begin_at(self, seconds: float) -> None:
        """Leaves out the sound before the picture: a file's clock begins with what is in it."""
        self.start = min(seconds, self.audio_end)
        self.audio_samples = round((self.audio_end - self.start) * self.audio_rate)

    def _codec_of(self, kind: str) -> str:
        if kind not in self.copied:
            return str(self.options.codec if kind == "video" else self.options.audio_codec)
        found = self.info.video if kind == "video" else self.info.audio
        assert found is not None
        return found.codec

    def _add_sound(self, out: Any, opened: ExitStack) -> Track | None:
        if not self.audio_samples:
            return None
        if "audio" in self.copied:
            return opened.enter_context(closing(CopiedTrack(self.path, "audio", out)))
        assert self.options.audio_codec is not None
        return EncodedSound(self.path, self.start, self.audio_samples, self.audio_rate, self.options.audio_codec, out)

    def _audio_facts(self) -> dict[str, Any] | None:
        if not self.audio_samples:
            return None
        assert self.info.audio is not None
        channels = self.info.audio.channels if "audio" in self.copied else 1
        return {"sample_rate_hz": self.audio_rate, "channels": channels, "samples": self.audio_samples}

    def _check_length(self, reached: float) -> None:
        """Refuses a file that ends well before it says: what is left of a broken download."""
        declared = 0.0 if self.container.split(",")[0] in _ESTIMATED_DURATION else self.info.duration_seconds
        wanted = min(self.end, declared)
        if wanted - reached > max(0.5, 0.1 * (wanted - self.start)):
            raise SampleError("truncated", f"ends at {reached:.2f} s, {wanted:.2f} s were announced")

    def _check_lengths(self, pictures: Pictures) -> None:
        self._check_length(max(pictures.reached, self.audio_end if self.end == math.inf else 0.0))
        if self.container.split(",")[0] not in _ESTIMATED_DURATION:
            # The picture alone, where the stream itself says how long it is.
            wanted = min(self.end, pictures.declared_end)
            if wanted - pictures.reached > max(0.5, 0.1 * (wanted - self.start)):
                raise SampleError("truncated", f"the picture ends at {pictures.reached:.2f} s of {wanted:.2f} s")

    def _copy_video(self, opened: ExitStack, out: Any, sound: Track | None, seconds: float) -> None:
        pictures = opened.enter_context(closing(CopiedTrack(self.path, "video", out)))
        for second in range(math.ceil(seconds)):
            pictures.write(float(second))
            if sound is not None:
                sound.write(float(second))
        pictures.finish()

    def _encode_video(self, out: Any, sound: Track | None) -> tuple[dict[str, Any], float]:
        with closing(open_container(self.path)) as container:
            stream = best_stream(container, "video")
            rate = frame_rate(stream, self.options.fps)
            picture: Any = None
            count = 0
            packets: list[Any] = []
            pictures = Pictures(container, stream, self.options, self.start, self.end)
            for number, frame in constant_rate(pictures, rate):
                if picture is None:
                    picture = self._add_picture(out, frame, rate)
                if sound is not None:
                    sound.write(self.start + float(number / rate))
                frame.pts, frame.time_base = number, 1 / rate
                frame.pict_type = av.video.frame.PictureType.NONE
                packets += picture.encode(frame)
                out.mux(packets[:-1])
                count, packets = number + 1, packets[-1:]
            if picture is None:
                raise SampleError("truncated", "no picture could be read")
            packets += picture.encode(None)
            seconds = self._end_last(packets[-1], count, rate, pictures.reached)
            out.mux(packets)
        self._check_lengths(pictures)
        facts = {"width": picture.width, "height": picture.height, "fps": float(round(rate, 6)), "frames": count}
        return facts, seconds

    def _end_last(self, packet: Any, count: int, rate: Any, reached: float) -> float:
        """Lets the last picture end with the stretch, where whole frames miss its end noticeably; how long all last.

        At few frames per second they do: one picture of a slide show would make a window of a second fifteen long.
        """
        seconds, stretch = count / float(rate), min(self.end, reached) - self.start
        if abs(seconds - stretch) < _NOTICEABLE_SECONDS:
            return seconds
        before = (count - 1) / float(rate)
        shown = max(stretch - before, 1e-3)
        packet.time_base = 1 / rate / _TICKS
        packet.pts, packet.dts = packet.pts * _TICKS, packet.dts * _TICKS
        packet.duration = max(1, round(shown * float(rate) * _TICKS))
        return before + shown

    def _add_picture(self, out: Any, frame: Any, rate: Any) -> Any:
        picture = out.add_stream("libx264" if self.options.codec == "h264" else "mjpeg", rate=rate)
        picture.width, picture.height, picture.pix_fmt = frame.width, frame.height, frame.format.name
        context = picture.codec_context
        context.thread_count, context.max_b_frames = 1, 0
        context.flags |= av.codec.context.Flags.bitexact
        if self.options.codec == "h264":
            context.gop_size = self.options.gop
            picture.options = {"preset": "veryfast", "tune": "fastdecode", "crf": str(self.options.crf), "bf": "0"}
        else:
            context.qmin = context.qmax = _MJPEG_QUALITY
            context.color_range = av.video.reformatter.ColorRange.JPEG
        return picture


def _container_name(path: str) -> str:
    with closing(open_container(path)) as container:
        return str(container.format.name)
