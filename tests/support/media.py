"""Encoded media with known answers, written by PyAV: colour = word = tone, numbered frames, damaged files."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

COLOURS: dict[str, tuple[tuple[int, int, int], str, float]] = {
    "red": ((220, 40, 40), "deep", 200.0),
    "green": ((40, 180, 60), "low", 320.0),
    "blue": ((40, 60, 220), "dull", 500.0),
    "yellow": ((220, 210, 40), "middle", 800.0),
    "purple": ((150, 40, 180), "warm", 1250.0),
    "orange": ((240, 140, 30), "bright", 2000.0),
    "white": ((230, 230, 230), "high", 3200.0),
    "cyan": ((40, 200, 210), "shrill", 5000.0),
}
"""word -> (RGB, word for the tone, tone in hertz)"""

NUMBER_BITS = 10


def tone(hertz: float, seconds: float, sample_rate_hz: int, *, amplitude: float = 0.4) -> np.ndarray:
    """float32 ``(S,)``"""
    times = np.arange(round(seconds * sample_rate_hz)) / sample_rate_hz
    return (amplitude * np.sin(2 * np.pi * hertz * times)).astype(np.float32)


def moving_pattern(rgb: Sequence[int], count: int, size: tuple[int, int], *, seed: int = 0) -> Iterable[np.ndarray]:
    """uint8 ``(H, W, 3)`` pictures: stripes of one colour in a random direction, moving."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[: size[0], : size[1]]
    angle, wavelength, speed, phase = rng.uniform([0, 10, 0.2, 0], [np.pi, 24, 0.8, 6])
    across = (np.cos(angle) * x + np.sin(angle) * y) * 2 * np.pi / wavelength
    for i in range(count):
        brightness = 0.7 + 0.3 * np.sin(across + speed * i + phase)
        yield (brightness[..., None] * np.asarray(rgb)).clip(0, 255).astype(np.uint8)


def numbered_picture(number: int, size: tuple[int, int] = (64, 80)) -> np.ndarray:
    """uint8 ``(H, W, 3)``: the number as ten black or white bars, readable after any lossy codec and scaling."""
    picture = np.zeros((*size, 3), np.uint8)
    for bit in range(NUMBER_BITS):
        left, right = size[1] * bit // NUMBER_BITS, size[1] * (bit + 1) // NUMBER_BITS
        picture[:, left:right] = 235 if number >> bit & 1 else 20
    return picture


def read_number(picture: np.ndarray) -> int:
    """The number of a ``(C, H, W)`` picture that shows all bars of ``numbered_picture``."""
    brightness = picture.mean(axis=(0, 1))
    centres = ((np.arange(NUMBER_BITS) + 0.5) * len(brightness) / NUMBER_BITS).astype(int)
    return sum(1 << bit for bit, centre in enumerate(centres) if brightness[centre] > 128)


def encode(
    path: Path,
    pictures: Iterable[np.ndarray] | None,
    wave: np.ndarray | None,
    *,
    fps: int = 12,
    codec: str = "h264",
    gop: int = 16,
    b_frames: int = 0,
    times: Sequence[float] | None = None,
    rotation: int = 0,
    sample_rate_hz: int = 16_000,
    audio_codec: str = "aac",
    audio_start_seconds: float = 0.0,
    container_options: dict[str, str] | None = None,
    pix_fmt: str | None = None,
    colours: tuple[int, int, int] | None = None,
    full_range: bool = False,
) -> Path:
    """Writes pictures and / or a wave ``(S,)`` or ``(channels, S)``; ``times``: when each picture appears.

    ``colours``: FFmpeg's numbers of primaries, transfer curve and matrix, as tags; so is ``full_range``.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    encoders = {"h264": "libx264", "vp9": "libvpx-vp9", "vp8": "libvpx"}
    with av.open(str(path), "w", container_options=container_options or {}) as container:
        video = sound = None
        shown = list(pictures) if pictures is not None else []
        if shown:
            video = container.add_stream(encoders.get(codec, codec), rate=fps)
            video.height, video.width = shown[0].shape[:2]
            video.pix_fmt = pix_fmt or ("yuvj420p" if codec == "mjpeg" else "yuv420p")
            video.gop_size = gop
            video.codec_context.thread_count = 1
            video.codec_context.max_b_frames = b_frames
            if codec == "h264":
                video.options = {"preset": "veryfast", "crf": "18", "bf": str(b_frames), "sc_threshold": "0"}
            if colours is not None:
                context = video.codec_context
                context.color_primaries, context.color_trc, context.colorspace = colours
            if full_range:
                video.codec_context.color_range = 2
            if times is not None:
                video.codec_context.time_base = Fraction(1, 90_000)
            if rotation:
                video.set_display_rotation(rotation)
        if wave is not None:
            wave = np.atleast_2d(wave).astype(np.float32)
            layout = "mono" if len(wave) == 1 else "stereo"
            sound = container.add_stream(audio_codec, rate=sample_rate_hz, layout=layout)
        # One second of each in turn, so that the file is interleaved like a real one.
        packets: list[tuple[float, av.Packet]] = []
        if video is not None:
            packets += _video_packets(video, shown, times, fps)
        if sound is not None and wave is not None:
            packets += _audio_packets(sound, wave, sample_rate_hz, audio_start_seconds)
        for _, packet in sorted(packets, key=lambda timed: timed[0]):
            container.mux(packet)
    return path


def _timed(packets: Iterable[av.Packet]) -> list[tuple[float, av.Packet]]:
    return [(float(packet.dts * packet.time_base), packet) for packet in packets]


def _video_packets(stream, pictures, times, fps) -> list[tuple[float, av.Packet]]:
    packets = []
    for i, picture in enumerate(pictures):
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
        frame.pts = i if times is None else round(times[i] * 90_000)
        frame.time_base = Fraction(1, fps) if times is None else Fraction(1, 90_000)
        packets += _timed(stream.encode(frame))
    return packets + _timed(stream.encode(None))


def _audio_packets(stream, wave, sample_rate_hz, start_seconds) -> list[tuple[float, av.Packet]]:
    packets = []
    resampler = av.AudioResampler(
        format=stream.codec_context.format, layout=stream.codec_context.layout, rate=sample_rate_hz
    )
    layout = "mono" if len(wave) == 1 else "stereo"
    for first in range(0, wave.shape[1], 1024):
        piece = np.ascontiguousarray(wave[:, first : first + 1024])
        frame = av.AudioFrame.from_ndarray(piece, format="fltp", layout=layout)
        frame.sample_rate, frame.time_base = sample_rate_hz, Fraction(1, sample_rate_hz)
        frame.pts = first + round(start_seconds * sample_rate_hz)
        for converted in resampler.resample(frame):
            packets += _timed(stream.encode(converted))
    return packets + _timed(stream.encode(None))


def write_clip(
    path: Path,
    *,
    colour: str,
    seconds: float = 3.0,
    tone_hz: float | None = None,
    size: tuple[int, int] = (48, 64),
    fps: int = 12,
    audio: bool = True,
    seed: int = 0,
    **options,
) -> Path:
    """A clip of moving stripes in a colour of ``COLOURS`` with its tone; ``options`` as for ``encode``."""
    rgb, _, colour_hz = COLOURS[colour]
    rate = options.get("sample_rate_hz", 16_000)
    wave = tone(tone_hz or colour_hz, seconds, rate) if audio else None
    return encode(path, moving_pattern(rgb, round(seconds * fps), size, seed=seed), wave, fps=fps, **options)


def write_flash(
    path: Path,
    *,
    flash_seconds: float,
    seconds: float = 4.0,
    fps: int = 25,
    sample_rate_hz: int = 32_000,
    clock_starts_seconds: float = 0.0,
    **options,
) -> Path:
    """Dark and silent, but for 0.2 s of white and of a beep that begin at the same instant.

    ``clock_starts_seconds``: the file's clock reads that much at its beginning, as in a recording of a broadcast.
    """
    first, last = round(flash_seconds * fps), round((flash_seconds + 0.2) * fps)
    pictures = [np.full((48, 64, 3), 235 if first <= i < last else 16, np.uint8) for i in range(round(seconds * fps))]
    wave = np.zeros(round(seconds * sample_rate_hz), np.float32)
    beep = tone(1000, 0.2, sample_rate_hz, amplitude=0.8)
    start = round(flash_seconds * sample_rate_hz)
    wave[start : start + len(beep)] = beep
    if clock_starts_seconds:
        options["times"] = clock_starts_seconds + np.arange(len(pictures)) / fps
        options["audio_start_seconds"] = clock_starts_seconds
    return encode(path, pictures, wave, fps=fps, sample_rate_hz=sample_rate_hz, **options)


def make_media_folder(folder: Path, *, per_colour: int = 3) -> Path:
    """``per_colour`` clips of each colour, the last of each for the test, two without sound; and ``clips.csv``."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "clips.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "caption", "split", "group"])
        for c, (colour, (_, word, _)) in enumerate(COLOURS.items()):
            for i in range(per_colour):
                name = f"{colour}_{i}.mp4"
                silent = i == 0 and colour in ("green", "purple")
                seed = 100 * c + i
                write_clip(folder / name, colour=colour, seconds=3.0 + 0.5 * i, audio=not silent, seed=seed)
                split = "test" if i == per_colour - 1 else "train"
                writer.writerow([name, f"a {colour} clip, {word} tone", split, colour])
    return folder


@pytest.fixture(scope="session")
def media_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 clips of 3 to 4 s, 8 colours × 3 (2 train, 1 test), 64×48, 12 fps, H.264 + AAC; ``clips.csv`` lists them."""
    return make_media_folder(tmp_path_factory.mktemp("media"))


@pytest.fixture(scope="session")
def damaged_media(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Files that are damaged or lack something, by name."""
    folder = tmp_path_factory.mktemp("damaged")
    good = write_clip(folder / "good.mp4", colour="red", seconds=4.0).read_bytes()
    moov, mdat = good.index(b"moov"), good.index(b"mdat")
    rng = np.random.default_rng(0)

    def changed(first: int, last: int, values: np.ndarray | int) -> bytes:
        data = np.frombuffer(good, np.uint8).copy()
        data[first:last] = values
        return data.tobytes()

    flipped = np.frombuffer(good, np.uint8).copy()
    places = rng.integers(mdat + 8, moov - 8, (moov - mdat) // 20)
    flipped[places] ^= rng.integers(1, 256, len(places)).astype(np.uint8)
    middle = (mdat + moov) // 2
    contents = {
        "truncated": good[: len(good) // 2],
        "bit_flipped": flipped.tobytes(),
        "damaged_moov": changed(moov + 100, moov + 600, rng.integers(0, 256, 500)),
        "zeroed_range": changed(mdat + 8, middle, 0),
        "empty": b"",
        "text_file": b"this is not a video\n" * 50,
    }
    paths = {name: folder / f"{name}.mp4" for name in (*contents, "audio_only", "video_only")}
    for name, content in contents.items():
        paths[name].write_bytes(content)
    encode(paths["audio_only"], None, tone(440, 2.0, 16_000))
    write_clip(paths["video_only"], colour="blue", audio=False)
    return paths
