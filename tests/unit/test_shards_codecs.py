"""Every pair of codecs: the sound stays with its picture, readers find the stretch, equal input makes equal bytes."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image
from support.media import encode, moving_pattern, numbered_picture, tone, write_clip, write_flash
from typer.testing import CliRunner

from mmcl.media.clip import MediaReader
from mmcl.media.probe import probe
from mmcl.media.windows import Window
from mmcl.shards import MakeOptions, ShardReader, load_manifest, make_shards, parse_sample
from mmcl.shards.commands import app
from mmcl.shards.cut import cut_rows
from mmcl.shards.engine import Crew
from mmcl.shards.inputs import Row
from mmcl.shards.make import describe_plan
from mmcl.shards.members import Sample
from mmcl.shards.pool import run_jobs
from mmcl.shards.prepare import Job, load_staged, prepare, staged_path
from mmcl.shards.reader import RawSample
from mmcl.shards.transcode import MediaOptions
from mmcl.shards.verify import verify_shards
from mmcl.types import AudioSpec, ConfigError, Source, VideoSpec

CODECS, AUDIO_CODECS = ("h264", "mjpeg", "copy"), ("aac", "opus", "flac", "wav", "copy")
PAIRS = list(itertools.product(CODECS, AUDIO_CODECS))
FPS, RATE = 25, 32_000


def prepared(row: Row, media: MediaOptions, folder: Path) -> RawSample:
    """What ``make`` writes for a row, without its processes."""
    result = prepare(Job(row, media, None, str(folder)))
    assert not result.reason, result
    staged = load_staged(staged_path(folder, result.content_hash))
    assert staged is not None
    return RawSample(row.key, dict(staged.members), Source(0, 0))


def opened(sample: Sample, decoder: str = "pyav") -> MediaReader:
    return MediaReader(
        video=sample.video,
        image=sample.image,
        audio=sample.audio,
        decoder=decoder,
        duration_seconds=sample.duration_seconds,
        source_size=sample.video_size,
        window_seconds=sample.window_seconds,
    )


def flash_and_beep(sample: Sample, decoder: str) -> tuple[float | None, float | None]:
    """When the picture turns white and when the beep begins, as a run would see it."""
    with opened(sample, decoder) as media:
        window = Window(0.0, media.duration_seconds)
        count = round(window.seconds * 200)
        frames, times = media.read_video(window, VideoSpec(count, 16, 200.0, fit="squash"))
        wave = media.read_audio(window, AudioSpec(RATE, window.seconds))
    bright, loud = frames.mean(axis=(1, 2, 3)) > 120, np.abs(wave) > 0.3
    flash = float(times[bright.argmax()]) if bright.any() else None
    return flash, float(loud.argmax()) / RATE if loud.any() else None


@pytest.fixture(scope="module")
def flash_files(tmp_path_factory) -> dict[str, Path]:
    """The flash is at 2.6 s. With B-frames and few key frames; with a clock that starts late; not in MP4."""
    folder = tmp_path_factory.mktemp("flash")
    return {
        "mp4": write_flash(folder / "a.mp4", flash_seconds=2.6, b_frames=2, gop=250),
        "mkv": write_flash(folder / "a.mkv", flash_seconds=2.6, gop=50, sample_rate_hz=48_000, audio_codec="libopus"),
        "ts": write_flash(folder / "a.ts", flash_seconds=2.6, clock_starts_seconds=5.0),
    }


@pytest.fixture(scope="module")
def windows_of_files(flash_files) -> dict[str, list[Row]]:
    rows = [Row("k", path.name, str(path)) for path in flash_files.values()]
    cut = cut_rows(rows, (1.5, 1.3), Crew(run_jobs, 2, 60))
    assert [row.start_seconds for row in cut] == [0.0, 1.3] * len(rows)
    return {name: [row for row in cut if row.path == str(path)] for name, path in flash_files.items()}


@pytest.mark.parametrize("cut", ["columns", "windows"])
@pytest.mark.parametrize("name", ["mp4", *[pytest.param(name, marks=pytest.mark.slow) for name in ("mkv", "ts")]])
@pytest.mark.parametrize(("codec", "audio_codec"), PAIRS)
def test_the_beep_stays_at_the_flash(flash_files, windows_of_files, tmp_path, codec, audio_codec, name, cut):
    limit = (960 / 48_000 if audio_codec == "opus" else 1024 / RATE) + 0.5 / FPS
    late = 1024 / RATE if name == "ts" else 0.0  # the codec's first, silent frame, which only MP4 can hide
    path = flash_files[name]
    rows = [Row("k", path.name, str(path), start_seconds=1.3, end_seconds=3.37)]
    for row in windows_of_files[name] if cut == "windows" else rows:
        sample = parse_sample(prepared(row, MediaOptions(codec=codec, audio_codec=audio_codec), tmp_path))
        assert sample.duration_seconds == pytest.approx(
            row.end_seconds - row.start_seconds, abs=0.5 / FPS + late + 1e-6
        )
        assert (sample.window_seconds is not None) == ("copy" in (codec, audio_codec))
        flash, beep = flash_and_beep(sample, "decord" if name == "mp4" else "pyav")
        if row.start_seconds == 0.0:
            assert flash is None and beep is None
            continue
        assert abs(flash - beep) < limit and abs(beep - (2.6 + late - row.start_seconds)) < 0.01, (flash, beep)


WANTED = {
    ("h264", "aac"): {"mp4": ("h264", "aac")},
    ("h264", "opus"): {"mp4": ("h264", "opus")},
    ("mjpeg", "flac"): {"mp4": ("mjpeg", "flac")},
    ("mjpeg", "wav"): {"mp4": ("mjpeg", None), "wav": (None, "pcm_s16le")},
    ("copy", "wav"): {"mp4": ("hevc", None), "wav": (None, "pcm_s16le")},
    ("copy", "aac"): {"mp4": ("hevc", "aac")},
    ("h264", "copy"): {"mkv": ("h264", "pcm_s16le")},
    ("copy", "copy"): {"mkv": ("hevc", "pcm_s16le")},
}


@pytest.mark.parametrize("codecs", WANTED)
def test_members_hold_what_was_asked_for(tmp_path, codecs):
    path = write_clip(tmp_path / "a.mkv", colour="red", seconds=1.0, codec="libx265", audio_codec="pcm_s16le")
    raw = prepared(Row("k", "a.mkv", str(path)), MediaOptions(codec=codecs[0], audio_codec=codecs[1]), tmp_path)
    found = {}
    for extension, data in raw.members.items():
        if extension not in ("json", "txt"):
            info = probe(data)
            found[extension] = (info.video and info.video.codec, info.audio and info.audio.codec)
    assert found == WANTED[codecs]
    assert (raw.members.get("mkv") == path.read_bytes()) == (codecs == ("copy", "copy"))


@pytest.mark.parametrize(
    ("audio_codec", "extension"), [("aac", "m4a"), ("opus", "opus"), ("flac", "flac"), ("wav", "wav"), ("copy", "m4a")]
)
def test_sound_alone(tmp_path, audio_codec, extension):
    rate = 48_000 if audio_codec == "opus" else 16_000
    path = encode(tmp_path / "a.m4a", None, tone(440, 2.0, rate), sample_rate_hz=rate)
    row = Row("k", "a.m4a", str(path), start_seconds=0.5, end_seconds=1.5)
    raw = prepared(row, MediaOptions(audio_codec=audio_codec), tmp_path)
    assert extension in raw.members
    sample = parse_sample(raw)
    with opened(sample) as media:
        wave = media.read_audio(Window(0.0, 1.0), AudioSpec(16_000, 1.0))
    assert abs(np.argmax(np.abs(np.fft.rfft(wave))) - 440) <= 1 and np.abs(wave[-200:]).max() > 0.2


def test_a_copied_picture_and_a_copied_gif_are_the_same_bytes(tmp_path):
    Image.new("RGB", (300, 200), (255, 0, 0)).save(tmp_path / "p.png")
    encode(tmp_path / "a.gif", moving_pattern((200, 0, 0), 6, (32, 48)), None, codec="gif", pix_fmt="rgb8")
    for name in ("p.png", "a.gif"):
        raw = prepared(Row("k", name, str(tmp_path / name)), MediaOptions(codec="copy"), tmp_path)
        assert raw.members[name[2:]] == (tmp_path / name).read_bytes()


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "settings.json")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.mark.parametrize(
    ("codec", "audio_codec"),
    [
        ("copy", "flac"),
        *[
            pytest.param(*pair, marks=pytest.mark.slow)
            for pair in (("mjpeg", "opus"), ("h264", "wav"), ("mjpeg", "copy"), ("copy", "aac"), ("copy", "copy"))
        ],
    ],
)
def test_the_number_of_workers_changes_no_byte(tmp_path, codec, audio_codec):
    for colour in ("red", "green", "blue", "white"):
        write_clip(tmp_path / f"in/{colour}.mp4", colour=colour, seconds=1.0)
    media = MediaOptions(codec=codec, audio_codec=audio_codec)
    for workers in (1, 3):
        options = MakeOptions(media, windows=(0.5, 0.5), workers=workers, max_count=3)
        report = make_shards(tmp_path / "in", tmp_path / str(workers), options)
        assert (report.samples, report.failures) == (8, {})
    assert contents(tmp_path / "1") == contents(tmp_path / "3")
    report = verify_shards(tmp_path / "1")
    assert report.ok, report.lines()
    with pytest.raises(ConfigError, match=r"codec: .* there, "):
        make_shards(tmp_path / "in", tmp_path / "1", MakeOptions(windows=(0.5, 0.5), max_count=3))


def test_copies_of_one_source_are_said(tmp_path):
    encode(tmp_path / "in/a.mp4", [numbered_picture(i) for i in range(75)], None, fps=25)
    options = MakeOptions(MediaOptions(codec="copy"), windows=(1.0, 1.0), workers=1)
    assert any(
        "2 samples store a source once more" in line for line in describe_plan(tmp_path / "in", tmp_path / "o", options)
    )
    report = make_shards(tmp_path / "in", tmp_path / "o", options)
    assert any("2 samples store a source once more" in line for line in report.lines(tmp_path / "o"))
    reader = ShardReader(load_manifest(tmp_path / "o"))
    assert {parse_sample(reader.read(0, i)).window_seconds for i in range(3)} == {(0, 1), (1, 2), (2, 3)}


def test_what_cannot_be_copied_is_named(tmp_path):
    write_clip(tmp_path / "a.mp4", colour="red", seconds=0.5)
    write_clip(tmp_path / "a.wmv", colour="red", seconds=0.5, codec="msmpeg4", audio=False)
    rows = [
        {"path": "a.mp4", "crop_x": 0, "crop_y": 0, "crop_w": 20, "crop_h": 20},
        {"path": "a.wmv"},
        {"path": "a.mp4"},
    ]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = make_shards(tmp_path / "t.jsonl", tmp_path / "o", MakeOptions(MediaOptions(codec="copy"), workers=1))
    assert report.failures == {"cannot_copy": 2} and report.samples == 1


def test_a_damaged_source_is_not_copied(damaged_media, tmp_path):
    def reason(name):
        row = Row("k", name, str(damaged_media[name]))
        return prepare(Job(row, MediaOptions(codec="copy"), None, str(tmp_path))).reason

    wanted = {"truncated": "not_media", "damaged_moov": "no_streams", "zeroed_range": "decode", "empty": "empty"}
    assert {name: reason(name) for name in wanted} == wanted


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--codec copy --gop 8 --fps 5 --short-side 64", "short_side=64, fps=5.0, gop=8: cannot be set, codec=copy"),
        ("--codec copy --crop 0:0:32:32", "crop=0:0:32:32: cannot be set"),
        ("--codec copy --crf 20", "crf=20: cannot be set"),
        ("--codec mjpeg --gop 8", "gop=8: cannot be set, every picture"),
        ("--codec copy --audio-rate 16000", "audio_rate_hz=16000: cannot be set, audio_codec=copy"),
        ("--audio-codec opus --audio-rate 44100", "audio_rate_hz=44100: for opus one of 8000"),
        ("--codec vp9", "codec=vp9: one of h264, mjpeg, copy"),
        ("--audio-codec mp3", "audio_codec=mp3: one of aac"),
    ],
)
def test_contradictions_are_one_clear_line(tmp_path, arguments, message):
    result = CliRunner().invoke(app, ["make", str(tmp_path), "--out", str(tmp_path / "o"), *arguments.split()])
    assert isinstance(result.exception, ConfigError)
    assert str(result.exception).startswith(message) and "\n" not in str(result.exception)


@pytest.mark.parametrize("audio_codec", AUDIO_CODECS)
@pytest.mark.parametrize(("start", "end"), [(None, None), (1.5, 3.5)])
def test_a_picture_that_begins_late_keeps_its_sound(tmp_path, audio_codec, start, end):
    whole = write_flash(tmp_path / "a.mp4", flash_seconds=2.6)
    path = tmp_path / "late.mkv"
    with av.open(str(whole)) as source, av.open(str(path), "w") as out:
        streams = {stream.index: out.add_stream_from_template(stream) for stream in source.streams}
        for packet in source.demux():
            if packet.dts is not None and (packet.stream.type == "audio" or packet.pts * packet.time_base > 0.63):
                packet.stream = streams[packet.stream.index]
                out.mux(packet)
    row = Row("k", path.name, str(path), start_seconds=start, end_seconds=end)
    sample = parse_sample(prepared(row, MediaOptions(codec="copy", audio_codec=audio_codec), tmp_path))
    flash, beep = flash_and_beep(sample, "pyav")
    assert abs(flash - beep) < 0.5 / FPS + 0.01
    assert start is None or abs(beep - (2.6 + 1024 / RATE - start)) < 0.01  # AAC's first frame, as above
