"""Every decoder gives the frames that were asked for: right numbers, right times, right shape, or one clear error."""

from __future__ import annotations

import importlib
import struct
import subprocess
import sys
import types
from contextlib import closing

import numpy as np
import pytest
from support.media import encode, moving_pattern, numbered_picture, read_number, write_clip

from mmcl.media.frames import scaled_size
from mmcl.media.video import open_video
from mmcl.media.windows import frame_indices
from mmcl.types import ConfigError, SampleError


def loads(module: str) -> bool:
    """torchcodec may be there without the FFmpeg libraries that it needs."""
    try:
        importlib.import_module(module)
    except (ImportError, RuntimeError, OSError):
        return False
    return True


DECODERS = [
    "pyav",
    pytest.param("decord", marks=pytest.mark.skipif(not loads("decord"), reason="no decord here")),
    pytest.param("torchcodec", marks=pytest.mark.skipif(not loads("torchcodec.decoders"), reason="no torchcodec here")),
]
ASKED = [0, 7, 7, 15, 16, 17, 40, 59, 3]
VARYING = np.concatenate([[0.0], np.cumsum(np.random.default_rng(0).uniform(0.01, 0.2, 59))])


def numbered(path, **options):
    return encode(path, [numbered_picture(i) for i in range(60)], None, fps=20, **options)


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("gop.mp4", {}),
        ("b_frames.mp4", {"b_frames": 2}),
        ("b_frames.mkv", {"b_frames": 2}),
        ("one_gop.mp4", {"gop": 250}),
        ("mjpeg.avi", {"codec": "mjpeg"}),
        ("mjpeg.mov", {"codec": "mjpeg"}),
        ("mpeg4.avi", {"codec": "mpeg4"}),
        ("b_frames.ts", {"b_frames": 2}),
        ("vp8.webm", {"codec": "vp8"}),
    ],
)
def test_frames_are_the_ones_asked_for(tmp_path, decoder, name, options):
    path = numbered(tmp_path / name, **options)
    for data in (path, path.read_bytes()):
        reader = open_video(data, decoder=decoder, size=32, fit="squash")
        assert reader.frame_times_seconds == pytest.approx(np.arange(60) / 20, abs=1e-3)
        assert reader.frame_times_seconds.dtype == np.float64
        assert reader.duration_seconds == pytest.approx(3.0, abs=0.06)
        frames = reader.read(ASKED)
        assert frames.dtype == np.uint8 and frames.shape == (len(ASKED), 3, 32, 32) and frames.flags.c_contiguous
        assert [read_number(frame) for frame in frames] == ASKED
        assert [read_number(frame) for frame in reader.read(np.array([58, 2]))] == [58, 2]  # and backwards again
        reader.close()


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("name", ["varying.mp4", "varying.mkv"])
@pytest.mark.parametrize("b_frames", [0, 2])
def test_varying_frame_rate(tmp_path, decoder, name, b_frames):
    path = numbered(tmp_path / name, times=VARYING, b_frames=b_frames)
    reader = open_video(path, decoder=decoder, size=32, fit="squash")
    assert reader.frame_times_seconds == pytest.approx(VARYING, abs=1e-3)
    wanted = np.linspace(0, VARYING[-1], 25) + 1e-3
    expected = np.searchsorted(VARYING, wanted, side="right") - 1
    frames = reader.read(frame_indices(reader.frame_times_seconds, wanted))
    clear = np.abs(VARYING[:, None] - wanted).min(0) > 2e-3  # not within a millisecond of a border
    assert clear.sum() > 15
    assert np.array([read_number(frame) for frame in frames])[clear].tolist() == expected[clear].tolist()


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_cut_by_edit_list_shows_no_hidden_frame(tmp_path, decoder):
    path = numbered(tmp_path / "a.mp4")
    data = bytearray(path.read_bytes())
    entry = data.index(b"elst") + 4 + 8  # duration, media time, rate
    duration, _, rate = struct.unpack_from(">III", data, entry)
    timescale = 10_240 if b"\x00\x00\x28\x00" in data else 0
    assert timescale  # what FFmpeg's muxer writes for 20 frames per second
    struct.pack_into(">III", data, entry, duration // 2, timescale, rate)  # begin one second into the media
    reader = open_video(bytes(data), decoder=decoder, size=32, fit="squash")
    frames = reader.read(range(len(reader.frame_times_seconds)))
    assert reader.frame_times_seconds[0] == pytest.approx(0.0, abs=1e-6)
    assert [read_number(frame) for frame in frames][:5] == [20, 21, 22, 23, 24]


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize(("rotation", "corner"), [(0, (4, 4)), (90, (-4, 4)), (180, (-4, -4)), (270, (4, -4))], ids=str)
def test_turned_as_a_player_turns_it(tmp_path, decoder, rotation, corner):
    picture = np.full((48, 80, 3), 30, np.uint8)
    picture[:16, :20, 0] = 250
    path = encode(tmp_path / "a.mp4", [picture] * 6, None, rotation=rotation)
    whole = open_video(path, decoder=decoder).read([3])[0]
    assert whole.shape == ((3, 48, 80) if rotation % 180 == 0 else (3, 80, 48))
    squashed = open_video(path, decoder=decoder, size=32, fit="squash").read([3])[0]
    assert whole[0][corner] > 150 and squashed[0][corner] > 150
    cropped = open_video(path, decoder=decoder, size=48, fit="crop").read([3])[0]
    centre = whole[:, 16:-16] if rotation % 180 else whole[:, :, 16:-16]
    assert np.abs(cropped.astype(int) - centre).max() <= 8  # nothing is scaled here


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("known", [None, (48, 96)])
def test_crop_keeps_the_aspect_and_the_centre(tmp_path, decoder, known):
    picture = np.full((48, 96, 3), 20, np.uint8)
    picture[:, 24:72] = 220  # exactly what a square from the centre shows
    path = encode(tmp_path / "a.mp4", [picture] * 4, None)
    frame = open_video(path, decoder=decoder, size=24, fit="crop", source_size=known).read([1])[0]
    assert frame.shape == (3, 24, 24) and frame[:, :, 1:-1].min() > 190
    squashed = open_video(path, decoder=decoder, size=24, fit="squash", source_size=known).read([1])[0]
    assert squashed[:, :, :4].max() < 60 and squashed[:, :, 8:16].min() > 190
    for fit, dark, bright in (("crop_start", slice(11), slice(13, None)), ("crop_end", slice(13, None), slice(11))):
        side = open_video(path, decoder=decoder, size=24, fit=fit, source_size=known).read([1])[0]
        assert side.shape == (3, 24, 24) and side[:, :, dark].max() < 60 and side[:, :, bright].min() > 190


def test_more_threads_give_the_same_frames(tmp_path):
    path = numbered(tmp_path / "a.mp4", b_frames=2)
    one, two = (open_video(path, decoder="pyav", threads=n).read(ASKED) for n in (1, 2))
    assert np.array_equal(one, two)


@pytest.mark.parametrize("decoder", DECODERS)
def test_numbers_outside_are_a_programming_error(tmp_path, decoder):
    reader = open_video(numbered(tmp_path / "a.mp4"), decoder=decoder, size=32)
    for wrong in ([-1], [60]):
        with pytest.raises(IndexError, match="0 … 59"):
            reader.read(wrong)
    assert reader.read([]).shape[0] == 0


@pytest.mark.parametrize(
    ("name", "reasons"),
    [
        ("truncated", {"not_media"}),
        ("bit_flipped", {"decode"}),
        ("damaged_moov", {"no_video_stream", "not_media", "decode"}),
        ("zeroed_range", {"decode"}),
        ("empty", {"empty"}),
        ("text_file", {"not_media"}),
        ("audio_only", {"no_video_stream"}),
    ],
)
def test_damaged_files_raise_one_clear_line(damaged_media, name, reasons):
    with pytest.raises(SampleError) as caught:
        reader = open_video(damaged_media[name], decoder="pyav", size=32)
        reader.read(range(len(reader.frame_times_seconds)))
    assert caught.value.reason in reasons and "\n" not in str(caught.value)


def test_a_file_cut_after_its_index_is_damaged(tmp_path):
    path = numbered(tmp_path / "a.mp4", container_options={"movflags": "faststart"})
    data = path.read_bytes()
    with pytest.raises(SampleError, match=r"truncated: .* of 60 frames"):
        open_video(data[: len(data) * 2 // 3], decoder="pyav", size=32)


def test_random_damage_never_escapes(tmp_path):
    good = numbered(tmp_path / "a.mp4", b_frames=2).read_bytes()
    rng = np.random.default_rng(1)
    raised = 0
    for _ in range(40):
        data = np.frombuffer(good, np.uint8).copy()
        places = rng.integers(0, len(data), rng.integers(1, 60))
        data[places] = rng.integers(0, 256, len(places))
        try:
            reader = open_video(data.tobytes(), decoder="pyav", size=32)
            reader.read(range(0, len(reader.frame_times_seconds), 4))
        except SampleError:
            raised += 1
    assert raised > 0


def test_declared_numbers_allocate_nothing(tmp_path):
    data = bytearray(write_clip(tmp_path / "a.mp4", colour="red", audio=False, codec="mjpeg").read_bytes())
    struct.pack_into(">II", data, data.index(b"stsz") + 8, 1, 10**9)  # a thousand million samples of one byte
    struct.pack_into(">I", data, data.index(b"stsc") + 16, 10**9)
    (tmp_path / "b.mp4").write_bytes(data)
    program = (
        "import resource, sys; from mmcl.media.video import open_video; from mmcl.types import SampleError\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try: print(len(open_video(sys.argv[1], decoder='pyav', size=32).frame_times_seconds))\n"
        "except SampleError: pass\n"
        "assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000\n"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "b.mp4")], check=True, timeout=60)


def test_limits_on_pixels():
    assert scaled_size(100, 200, 50, "crop") == (50, 100)
    assert scaled_size(100, 200, 50, "squash") == (50, 50)
    for height, width, size in ((20_000, 20_000, 64), (1, 60_000, 224)):
        with pytest.raises(SampleError, match="too_large"):
            scaled_size(height, width, size, "crop")


def test_unknown_names_are_refused(tmp_path):
    path = numbered(tmp_path / "a.mp4")
    with pytest.raises(ConfigError, match="decord"):
        open_video(path, decoder="opencv")
    with pytest.raises(ConfigError, match="squash"):
        open_video(path, decoder="pyav", fit="stretch")


@pytest.mark.skipif(loads("torchcodec.decoders"), reason="torchcodec is installed")
def test_a_decoder_that_is_not_installed_says_how_to_get_it(tmp_path):
    with pytest.raises(ConfigError, match="pip install"):
        open_video(numbered(tmp_path / "a.mp4"), decoder="torchcodec")


def test_an_old_torchcodec_says_which_is_needed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchcodec", types.ModuleType("torchcodec"))
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", types.ModuleType("torchcodec.decoders"))
    with pytest.raises(ConfigError, match=r"0\.17"):
        open_video(numbered(tmp_path / "a.mp4"), decoder="torchcodec")


def test_without_decord_pyav_reads(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "decord", None)  # what Python itself does for a module that cannot be imported
    reader = open_video(numbered(tmp_path / "a.mp4"), size=32, fit="squash")
    assert [read_number(frame) for frame in reader.read(ASKED)] == ASKED


def test_frames_that_nothing_needs_stay_undecoded(tmp_path, monkeypatch):
    """Pictures are the same to the last bit, wherever the wanted ones lie among those that others refer to."""
    data = encode(
        tmp_path / "a.mp4", moving_pattern((255, 120, 60), 90, (48, 64)), None, fps=25, gop=30, b_frames=3
    ).read_bytes()
    decoded = []
    with closing(open_video(data, decoder="pyav")) as reader:
        monkeypatch.setattr(reader, "_skips", False)
        every = reader.read(range(90))
        monkeypatch.setattr(reader, "_skips", True)
        for asked in ([0], [1], [29], [30], [31], [89], [3, 4, 58, 88], list(range(90))):
            assert np.array_equal(reader.read(asked), every[asked]), asked
        real = reader._frames
        monkeypatch.setattr(reader, "_frames", lambda needed: (decoded.append(1) or frame for frame in real(needed)))
        reader.read([59])
        assert 1 < len(decoded) < 20, "of the 30 frames between two keyframes"
