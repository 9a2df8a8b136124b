"""How media are written into shards: the settings, what contradicts what, and which container holds which codecs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from mmcl.media.crop import Crop
from mmcl.types import ConfigError

Codec: TypeAlias = Literal["h264", "mjpeg", "copy"]
AudioCodec: TypeAlias = Literal["aac", "opus", "flac", "wav", "copy"]

AUDIO_RATES = (8_000, 11_025, 12_000, 16_000, 22_050, 24_000, 32_000, 44_100, 48_000)
"""hertz that AAC and every player know"""
OPUS_RATES = (8_000, 12_000, 16_000, 24_000, 48_000)
MAX_FPS = 120.0

_VIDEO_IN_MP4 = frozenset(("h264", "hevc", "av1", "vp9", "mpeg4", "mpeg1video", "mpeg2video", "mjpeg"))
_AUDIO_IN_MP4 = frozenset(("aac", "opus", "flac", "mp3", "mp2", "ac3", "eac3", "alac"))
"""what MP4 holds in a way that players and decord know"""
_EXTENSIONS = {
    "matroska": "mkv",
    "avi": "avi",
    "mpegts": "ts",
    "mpeg": "mpg",
    "mpegvideo": "mpg",
    "flv": "flv",
    "live_flv": "flv",
    "gif": "gif",
    "wav": "wav",
    "w64": "wav",
    "flac": "flac",
    "mp3": "mp3",
    "mp2": "mp3",
    "aac": "aac",
    "ogg": "ogg",
}
"""FFmpeg's container -> a member's extension"""


@dataclass(frozen=True, slots=True)
class MediaOptions:
    """How media are written; what is None takes the default of its codec. Raises ``ConfigError`` on a contradiction."""

    short_side: int | None = None
    """pixels of the shorter side (128); smaller sources keep their size"""
    fps: float | None = None
    """at most this many frames per second; None: the source's own rate"""
    gop: int | None = None
    """frames from one key frame to the next (16); every picture of ``mjpeg`` is one"""
    crf: int | None = None
    """x264's constant quality (23), 0 (lossless) … 51"""
    audio_rate_hz: int | None = None
    """at most (32,000; 48,000 for ``opus``); the next rate of the codec above the source's where that is lower"""
    crop: Crop | None = None
    """what is kept of every picture; None: all of it"""
    codec: Codec = "h264"
    """``copy``: the source's own stream, the whole of it; where a row is cut, its window stands in the JSON"""
    audio_codec: AudioCodec | None = None
    """``wav`` is a file of its own beside the video. None: ``aac``, with ``codec="copy"`` also ``copy``"""
    motion: bool = False
    """store the motion vectors of each video beside it, as ``KEY.motion.npy`` (``mmcl.media.motion_file``)"""

    def __post_init__(self) -> None:
        if self.audio_codec is None:
            object.__setattr__(self, "audio_codec", "copy" if self.codec == "copy" else "aac")
        for name, allowed in (("codec", Codec), ("audio_codec", AudioCodec)):
            if getattr(self, name) not in get_args(allowed):
                raise ConfigError(f"{name}={getattr(self, name)}: one of {', '.join(get_args(allowed))}")
        self._check_contradictions()
        defaults = {"short_side": 128, "gop": 16, "crf": 23, "audio_rate_hz": 48_000 if self._is_opus else 32_000}
        for name, default in defaults.items():
            if getattr(self, name) is None and name not in self._meaningless:
                object.__setattr__(self, name, default)
        self._check_limits()

    @property
    def _is_opus(self) -> bool:
        return self.audio_codec == "opus"

    @property
    def _meaningless(self) -> dict[str, str]:
        """Settings that these codecs have no use for, and why."""
        found: dict[str, str] = {}
        if self.codec == "copy":
            why = "codec=copy stores the source's pictures as they are"
            found |= dict.fromkeys(("short_side", "fps", "gop", "crf", "crop"), why)
        elif self.codec == "mjpeg":
            found |= {
                "gop": "every picture of codec=mjpeg is a key frame",
                "crf": "codec=mjpeg has a fixed quality",
            }
        if self.audio_codec == "copy":
            found["audio_rate_hz"] = "audio_codec=copy stores the source's sound as it is"
        return found

    def _check_contradictions(self) -> None:
        if self.motion and self.codec == "mjpeg":
            raise ConfigError("motion: pictures of codec=mjpeg refer to no others, there are no vectors to store")
        wrong = {name: why for name, why in self._meaningless.items() if getattr(self, name) is not None}
        if wrong:
            given = ", ".join(f"{name}={_shown(getattr(self, name))}" for name in wrong)
            raise ConfigError(f"{given}: cannot be set, {' and '.join(dict.fromkeys(wrong.values()))}")

    def _check_limits(self) -> None:
        if self.crop is not None and (min(self.crop[:2]) < 0 or min(self.crop[2:]) < 2):
            raise ConfigError(f"crop={_shown(self.crop)}: X:Y:W:H, no side below 2 pixels")
        limits = {"short_side": (16, 4096), "gop": (1, 1000), "crf": (0, 51)}
        for name, (low, high) in limits.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise ConfigError(f"{name}={value}: from {low} to {high}")
        if self.fps is not None and not 0.1 <= self.fps <= MAX_FPS:
            raise ConfigError(f"fps={self.fps}: from 0.1 to {MAX_FPS:g}")
        if self.audio_rate_hz is not None and self.audio_rate_hz not in self.audio_rates:
            rates = ", ".join(map(str, self.audio_rates))
            raise ConfigError(f"audio_rate_hz={self.audio_rate_hz}: for {self.audio_codec} one of {rates}")

    @property
    def audio_rates(self) -> tuple[int, ...]:
        """hertz that the codec of the sound has"""
        return OPUS_RATES if self._is_opus else AUDIO_RATES

    def lines(self) -> list[str]:
        """For people."""
        fps = "at the source's frame rate" if self.fps is None else f"at {self.fps:g} frames per second at most"
        video = {
            "h264": f"H.264, short side {self.short_side} px at most, {fps}, a key frame every {self.gop} frames",
            "mjpeg": f"MJPEG, short side {self.short_side} px at most, {fps}",
            "copy": "the source's own stream, whole; where a row is cut, its window stands in the JSON",
        }[self.codec]
        names = {"aac": "AAC", "opus": "Opus", "flac": "FLAC", "wav": "WAV beside the video"}
        sound = f"{names.get(str(self.audio_codec))}, mono, {self.audio_rate_hz} Hz at most"
        if self.audio_codec == "copy":
            sound = "the source's own stream, whole"
        lines = [f"video: {video}; sound: {sound}"]
        if self.motion:
            lines.append("motion: vectors of each video of H.264 or MPEG-4, in a member of their own")
        if self.crop is not None:
            lines.append(f"of each picture only {_shown(self.crop)} (X:Y:W:H)")
        return lines


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


def container_for(*codecs: str) -> tuple[str, str]:
    """(FFmpeg's format, the member's extension) of a video file that holds these codecs.

    >>> container_for("h264", "aac"), container_for("vp8", "opus")
    (('mp4', 'mp4'), ('matroska', 'mkv'))
    """
    return ("mp4", "mp4") if (_VIDEO_IN_MP4 | _AUDIO_IN_MP4).issuperset(codecs) else ("matroska", "mkv")


def extension_of(container_name: str, *, has_video: bool) -> str | None:
    """The extension under which a file of FFmpeg's format is stored as it is; None: shards have none for it.

    >>> extension_of("mov,mp4,m4a,3gp,3g2,mj2", has_video=False), extension_of("asf", has_video=True)
    ('m4a', None)
    """
    name = container_name.split(",")[0]
    if name == "mov":
        return "mp4" if has_video else "m4a"
    if name == "ogg" and has_video:  # readers take such a file for sound
        return None
    return _EXTENSIONS.get(name)


def _shown(value: object) -> str:
    return ":".join(map(str, value)) if isinstance(value, tuple) else str(value)
