"""Shards are made of whatever codec and container PyAV reads; every frame and the sound come through."""

from __future__ import annotations

import json
from pathlib import Path

import av
import numpy as np
import pytest
from support.media import encode, numbered_picture, read_number, tone

from mmcl.media.audio import read_audio
from mmcl.media.probe import probe
from mmcl.media.video import open_video
from mmcl.shards import MakeOptions, ShardReader, load_manifest, make_shards, parse_sample
from mmcl.shards.transcode import MediaOptions

pytestmark = pytest.mark.slow

FPS, COUNT, RATE = 25, 40, 48_000
# name of the file -> (codec as FFmpeg names it, its encoder, sound's encoder or None, options of the encoder)
SOURCES = {
    "h264.mp4": ("h264", "libx264", "aac"),
    "h264.mkv": ("h264", "libx264", "flac"),
    "h264.avi": ("h264", "libx264", "libmp3lame"),
    "h264.ts": ("h264", "libx264", "aac"),
    "h264.flv": ("h264", "libx264", "aac"),
    "h264.mov": ("h264", "libx264", "pcm_s16le"),
    "hevc.mp4": ("hevc", "libx265", "aac"),
    "hevc.mkv": ("hevc", "libx265", "libopus"),
    "hevc.ts": ("hevc", "libx265", "aac"),
    "vp8.webm": ("vp8", "libvpx", "libopus"),
    "vp9.webm": ("vp9", "libvpx-vp9", "libopus"),
    "vp9.mp4": ("vp9", "libvpx-vp9", "aac"),
    "av1.mp4": ("libdav1d", "libsvtav1", "aac"),
    "av1.webm": ("libdav1d", "libsvtav1", "libopus"),
    "av1.mkv": ("libdav1d", "libsvtav1", "libopus"),
    "mpeg1.mpg": ("mpeg1video", "mpeg1video", "mp2"),
    "mpeg2.mpg": ("mpeg2video", "mpeg2video", "mp2"),
    "mpeg2.vob": ("mpeg2video", "mpeg2video", "mp2"),
    "mpeg2.ts": ("mpeg2video", "mpeg2video", "mp2"),
    "mpeg2.mkv": ("mpeg2video", "mpeg2video", "mp2"),
    "mpeg4.avi": ("mpeg4", "mpeg4", "libmp3lame"),
    "mjpeg.avi": ("mjpeg", "mjpeg", "pcm_s16le"),
    "mjpeg.mp4": ("mjpeg", "mjpeg", "aac"),
    "mjpeg.mkv": ("mjpeg", "mjpeg", "pcm_s16le"),
    "animation.gif": ("gif", "gif", None),
}


def has_encoder(name: str) -> bool:
    try:
        av.codec.Codec(name, "w")
    except ValueError:
        return False
    return True


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> dict[str, tuple[Path, dict]]:
    """By name of the source: the source, and its samples encoded and copied."""
    folder = tmp_path_factory.mktemp("formats")
    pictures = [numbered_picture(i, (64, 80)) for i in range(COUNT)]
    wave = tone(440, COUNT / FPS, RATE)
    for name, (_, encoder, sound) in SOURCES.items():
        if has_encoder(encoder) and (sound is None or has_encoder(sound)):
            options = {"pix_fmt": "rgb8"} if encoder == "gif" else {}
            encode(
                folder / "in" / name,
                pictures,
                None if sound is None else wave,
                fps=FPS,
                codec={"libx264": "h264"}.get(encoder, encoder),
                gop=12,
                b_frames=2 if name in ("h264.mp4", "h264.mkv", "h264.ts", "mpeg2.mpg", "mpeg2.ts") else 0,
                sample_rate_hz=RATE,
                audio_codec=sound or "aac",
                **options,
            )
    names = sorted(path.name for path in (folder / "in").iterdir())
    table = folder / "in.jsonl"
    table.write_text("".join(json.dumps({"path": f"in/{name}", "group": name}) + "\n" for name in names))
    found: dict[str, tuple[Path, dict]] = {path.name: (path, {}) for path in (folder / "in").iterdir()}
    for codec in ("h264", "copy"):
        report = make_shards(table, folder / codec, MakeOptions(MediaOptions(codec=codec), workers=2))
        assert not report.failures, (folder / codec / "failures.jsonl").read_text()
        reader = ShardReader(load_manifest(folder / codec))
        for index in range(len(reader)):
            sample = parse_sample(reader.read(0, index))
            found[str(sample.group)][1][codec] = sample
    return found


@pytest.mark.parametrize("codec", ["h264", "copy"])
@pytest.mark.parametrize("name", SOURCES)
def test_every_frame_and_the_sound_come_through(made, name, codec):
    wanted, encoder, sound = SOURCES[name]
    if name not in made:
        pytest.skip(f"PyAV has no encoder {encoder} or {sound} here")
    path, samples = made[name]
    assert probe(path).video.codec == wanted
    sample = samples[codec]
    reader = open_video(sample.video)
    numbers = [read_number(picture) for picture in reader.read(range(len(reader.frame_times_seconds)))]
    reader.close()
    # Whose container states a later start of the picture than of the sound, holds its first frame for as long.
    late = len(numbers) - COUNT
    assert 0 <= late <= 2 and numbers[late:] == list(range(COUNT)), numbers
    assert sample.duration_seconds == pytest.approx(COUNT / FPS, abs=0.1)
    if sound is not None:
        wave = read_audio(sample.video, start_seconds=0.3, end_seconds=1.3, sample_rate_hz=16_000)
        assert abs(np.argmax(np.abs(np.fft.rfft(wave))) - 440) <= 1
