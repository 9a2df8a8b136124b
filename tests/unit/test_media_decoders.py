"""All decoders give the same frames at the same times, the same sound, and the same reason where a file is damaged."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support.media import encode, moving_pattern

from mmcl.media.clip import MediaReader
from mmcl.media.probe import probe
from mmcl.media.video import open_video
from mmcl.media.windows import Window
from mmcl.shards import MakeOptions, ShardReader, load_manifest, make_shards, parse_sample
from mmcl.shards.stats import shard_stats
from mmcl.shards.transcode import MediaOptions
from mmcl.types import AudioSpec, VideoSpec

TIMES = np.concatenate([[0.0], np.cumsum(np.random.default_rng(0).uniform(0.01, 0.2, 23))])
FILES = {
    "plain.mp4": {},
    "b_frames.mp4": {"b_frames": 2},
    "b_frames.mkv": {"b_frames": 2, "gop": 250},
    "varying.mp4": {"times": TIMES, "b_frames": 2},
    "varying.mkv": {"times": TIMES},
    "turned_90.mp4": {"rotation": 90},
    "turned_180.mp4": {"rotation": 180},
    "turned_270.mp4": {"rotation": 270, "b_frames": 2},
    "odd.mp4": {"pix_fmt": "yuv444p", "size": (97, 171)},
    "odd.mkv": {"codec": "ffv1", "size": (97, 171)},
    "turned_90.mkv": {"rotation": 90},
    "turned_odd.mp4": {"codec": "mpeg4", "size": (97, 171), "rotation": 90},
    "four_two_two.mp4": {"pix_fmt": "yuv422p", "rotation": 270},
    "four_to_one.mkv": {"codec": "ffv1", "pix_fmt": "yuv410p"},
    "grey.mkv": {"codec": "ffv1", "pix_fmt": "gray"},
    "packed.mov": {"codec": "qtrle", "pix_fmt": "rgb24"},
    "rows_upwards.avi": {"codec": "rawvideo", "pix_fmt": "bgr24"},
    "ten_bits.mp4": {"pix_fmt": "yuv420p10le"},
    "hevc_ten_bits.mp4": {"codec": "libx265", "pix_fmt": "yuv420p10le"},
    "hdr.mp4": {"pix_fmt": "yuv420p10le", "colours": (9, 16, 9)},
    "hd_colours.mp4": {"colours": (1, 1, 1)},
    "full_range.mp4": {"codec": "mjpeg"},
    "full_range.webm": {"codec": "vp9", "full_range": True},
    "vp9.webm": {"codec": "vp9"},
    "large.mp4": {"size": (360, 640)},
    "ready.mp4": {"size": (64, 64)},
}


def loads(module: str) -> bool:
    """torchcodec may be there without the FFmpeg libraries that it needs."""
    try:
        importlib.import_module(module)
    except (ImportError, RuntimeError, OSError):
        return False
    return True


OTHERS = [
    pytest.param("decord", marks=pytest.mark.skipif(not loads("decord"), reason="no decord here")),
    pytest.param("torchcodec", marks=pytest.mark.skipif(not loads("torchcodec.decoders"), reason="no torchcodec here")),
]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("decoders")

    class Files(dict):
        def __missing__(self, name):
            options = dict(FILES[name])
            pictures = moving_pattern((200, 120, 60), 24, options.pop("size", (96, 170)))
            return self.setdefault(name, encode(folder / name, pictures, None, **options))

    return Files()


@pytest.mark.parametrize("decoder", OTHERS)
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in ("b_frames.mp4", "varying.mkv", "turned_90.mp4") else pytest.mark.slow)
        for name in FILES
    ],
)
def test_frames_and_times_are_those_of_pyav(files, name, decoder):
    asked = [0, 3, 4, 5, 11, 12, 13, 23]
    for size, fit in ((64, "crop"), (64, "squash"), (96, "squash"), (112, "squash"), (None, "crop")):
        one, other = (open_video(files[name], decoder=each, size=size, fit=fit) for each in ("pyav", decoder))
        assert other.frame_times_seconds == pytest.approx(one.frame_times_seconds, abs=2e-6)
        # decord takes another length for the last frame of a stream of varying rate.
        assert other.duration_seconds == pytest.approx(one.duration_seconds, abs=0.1 if "varying" in name else 2e-3)
        assert np.abs(other.read(asked).astype(int) - one.read(asked)).max() <= 2
        one.close()
        other.close()


@pytest.mark.parametrize("decoder", OTHERS)
@pytest.mark.parametrize(("rate", "codec", "suffix"), [(44_100, "aac", "mp4"), (48_000, "libopus", "mkv")])
def test_the_sound_is_the_same(tmp_path, decoder, rate, codec, suffix):
    wave = np.random.default_rng(0).uniform(-0.5, 0.5, 3 * rate).astype(np.float32)
    path = encode(
        tmp_path / f"a.{suffix}",
        moving_pattern((200, 120, 60), 36, (48, 64)),
        np.convolve(wave, np.ones(8) / 8, "same"),
        sample_rate_hz=rate,
        audio_codec=codec,
    )
    waves = []
    for each in ("pyav", decoder):
        with MediaReader(video=path, decoder=each) as media:
            wanted = [(Window(0.7, 1.7), AudioSpec(16_000, 1.0)), (Window(0.7, 1.7), VideoSpec(4, 32, 4.0))]
            waves.append(media.read_all(wanted)[0])
    assert np.abs(waves[0] - waves[1]).max() <= 1e-3 and np.abs(waves[0]).max() > 0.1


READ = """
import sys
from mmcl.media.video import open_video
from mmcl.types import SampleError
for path in sys.argv[2:]:
    try:
        reader = open_video(path, decoder=sys.argv[1], size=32)
        reader.read(range(len(reader.frame_times_seconds)))
        print("read")
    except SampleError as error:
        print(error.reason)
"""


@pytest.mark.slow
def test_damaged_and_missing_files_have_one_reason(damaged_media, tmp_path):
    cut = encode(
        tmp_path / "cut.mp4",
        moving_pattern((9, 200, 9), 60, (48, 64)),
        None,
        container_options={"movflags": "faststart"},
    )
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size * 2 // 3])
    paths = [*map(str, damaged_media.values()), str(cut), str(tmp_path / "gone.mp4"), str(tmp_path)]
    reasons = {}
    for each in ("pyav", "decord", "torchcodec"):
        if loads({"pyav": "av", "torchcodec": "torchcodec.decoders"}.get(each, each)):
            run = subprocess.run([sys.executable, "-c", READ, each, *paths], capture_output=True, text=True, timeout=60)
            reasons[each] = run.stdout.split()
    assert all(found == reasons["pyav"] for found in reasons.values()), reasons
    assert reasons["pyav"][-3:] == ["truncated", "missing_file", "unreadable"] and "decode" in reasons["pyav"]


@pytest.mark.slow
def test_hdr_tags_are_named(files, tmp_path):
    assert probe(files["hdr.mp4"]).video.hdr == "smpte2084" and probe(files["plain.mp4"]).video.hdr == ""
    (tmp_path / "in").mkdir()
    for name in ("hdr.mp4", "plain.mp4"):
        (tmp_path / "in" / name).write_bytes(files[name].read_bytes())
    make_shards(tmp_path / "in", tmp_path / "out", MakeOptions(MediaOptions(codec="copy"), workers=1, shuffle=None))
    reader = ShardReader(load_manifest(tmp_path / "out"))
    sources = [parse_sample(reader.read(0, index)).metadata["source"] for index in range(2)]
    assert [source.get("hdr_ignored") for source in sources] == ["smpte2084", None]
    stats = shard_stats(tmp_path / "out", workers=1)
    assert stats.document["hdr_tags_ignored"] == {"smpte2084": 1}
    assert any(line.startswith("HDR tags that readers ignore") for line in stats.lines())
