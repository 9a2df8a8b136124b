"""Scene changes at known instants: where rows are cut, that sound is cut there too, and what is no cut."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from support.media import COLOURS, encode, moving_pattern, tone, write_clip
from typer.testing import CliRunner

from mmcl.media.audio import read_audio
from mmcl.media.video import open_video
from mmcl.shards import MakeOptions, ShardReader, load_manifest, make_shards, parse_sample
from mmcl.shards.commands import app
from mmcl.shards.engine import Crew
from mmcl.shards.inputs import Row
from mmcl.shards.pool import run_jobs
from mmcl.shards.scenes import cut_scenes, find_cuts
from mmcl.types import ConfigError

FPS = 25
CREW = Crew(run_jobs, 1, 60)
SCENES = [("red", 30), ("green", 43), ("blue", 17), ("white", 35)]
"""colour and number of frames"""
CUTS = [30, 73, 90]


def film(path: Path, scenes=SCENES, *, sound: bool = True, **options) -> Path:
    """Moving stripes; the tone changes with the colour."""
    pictures = [p for i, (c, n) in enumerate(scenes) for p in moving_pattern(COLOURS[c][0], n, (72, 96), seed=i)]
    wave = np.concatenate([tone(COLOURS[colour][2], count / FPS, 32_000) for colour, count in scenes])
    return encode(path, pictures, wave if sound else None, fps=FPS, sample_rate_hz=32_000, **options)


def cuts_of(path: Path, detector: str = "pyav") -> list[float]:
    found = find_cuts((str(path), ()), detector=detector)
    assert isinstance(found, tuple), found
    return found[0]


@pytest.mark.parametrize(
    ("detector", "options"),
    [("pyav", {}), ("pyav", {"codec": "mpeg4"}), ("pyav", {"b_frames": 2}), ("scenedetect", {})],
)
def test_hard_cuts_are_found_within_a_frame(tmp_path, detector, options):
    path = film(tmp_path / "a.mp4", sound=False, **options)
    assert cuts_of(path, detector) == pytest.approx([cut / FPS for cut in CUTS], abs=0.5 / FPS)


def test_at_a_frame_rate_that_varies_and_on_a_clock_of_its_own(tmp_path):
    pictures = [p for i, (c, n) in enumerate(SCENES) for p in moving_pattern(COLOURS[c][0], n, (72, 96), seed=i)]
    steps = np.where(np.arange(len(pictures)) % 3 == 0, 0.08, 0.03)
    times = 100.0 + np.concatenate([[0.0], np.cumsum(steps)[:-1]])
    path = encode(tmp_path / "a.ts", pictures, None, fps=FPS, times=times)
    assert cuts_of(path) == pytest.approx([times[cut] - times[0] for cut in CUTS], abs=1e-3)


def test_motion_and_flashes_are_no_cuts(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (80, 72, 96, 3), np.uint8)
    encode(tmp_path / "noise.mp4", list(noise), None, fps=FPS)
    calm = list(moving_pattern(COLOURS["blue"][0], 60, (72, 96)))
    flash = [*calm[:30], np.full((72, 96, 3), 255, np.uint8), np.full((72, 96, 3), 255, np.uint8), *calm[32:]]
    encode(tmp_path / "flash.mp4", flash, None, fps=FPS)
    wide = np.random.default_rng(1).integers(40, 220, (72, 400, 3), np.uint8).repeat(4, 1)
    encode(tmp_path / "pan.mp4", [wide[:, 10 * i : 10 * i + 96] for i in range(80)], None, fps=FPS)
    for name in ("noise", "flash", "pan"):
        assert cuts_of(tmp_path / f"{name}.mp4") == [], name


def test_samples_are_scenes_and_their_sound(tmp_path):
    film(tmp_path / "a.mp4")
    table = tmp_path / "t.csv"
    table.write_text("path,caption,group\na.mp4,a film,films\n")
    options = MakeOptions(scenes="pyav", shuffle=None, workers=2)
    assert make_shards(table, tmp_path / "out", options).samples == 4
    reader = ShardReader(load_manifest(tmp_path / "out"))
    for number, (colour, count) in enumerate(SCENES):
        sample = parse_sample(reader.read(0, number))
        assert sample.key.startswith(f"a-{number:04d}-") and sample.group == "films"
        assert sample.captions == ("a film",)
        video = open_video(sample.video, decoder="pyav")
        frames = video.read(range(len(video.frame_times_seconds))).astype(int)
        video.close()
        assert abs(len(frames) - count) <= 1
        hue = frames.mean(axis=(2, 3))
        assert np.abs(hue - hue.mean(axis=0)).max() < 12, "a frame of another scene"
        wave = read_audio(sample.video, start_seconds=0, end_seconds=count / FPS, sample_rate_hz=32_000)
        for part in (wave[2048 : len(wave) // 2], wave[len(wave) // 2 : -2048]):
            heard = np.abs(np.fft.rfft(part)).argmax() * 32_000 / len(part)
            assert heard == pytest.approx(COLOURS[colour][2], abs=20)
        assert abs(len(wave) / 32_000 - sample.duration_seconds) <= 1 / FPS
    again = make_shards(table, tmp_path / "out", options)
    assert (again.samples, again.reused) == (4, 4)
    with pytest.raises(ConfigError, match="scenes: pyav there, None asked"):
        make_shards(table, tmp_path / "out", MakeOptions(shuffle=None))


def test_short_scenes_stretches_and_what_has_no_scenes(tmp_path, damaged_media):
    row = Row("k", "a.mp4", str(film(tmp_path / "a.mp4", sound=False)), group="g")

    def spans(row: Row, min_seconds: float) -> list:
        rows = cut_scenes([row], "pyav", CREW, min_seconds=min_seconds)
        return [(part.start_seconds, part.end_seconds, part.part) for part in rows]

    assert spans(row, 0.7) == [(None, 1.2, 0), (1.2, 2.92, 1), (2.92, None, 2)]  # 0.68 s from 2.92 to 3.6
    assert spans(row, 1.5) == [(None, 2.92, 0), (2.92, None, 1)]
    assert spans(row, 9.0) == [(None, None, 0)]
    stretch = Row("k", "a.mp4", row.path, start_seconds=1.0, end_seconds=3.0)
    assert spans(stretch, 0.0) == [(1.0, 1.2, 0), (1.2, 2.92, 1), (2.92, 3.0, 2)]
    rows = [
        Row("k", "s.m4a", str(encode(tmp_path / "s.m4a", None, tone(440, 2.0, 16_000)))),
        Row("k", "t.mp4", str(damaged_media["text_file"])),
        Row("k", "g.mp4", str(tmp_path / "gone.mp4")),
    ]
    cut = cut_scenes(rows, "pyav", CREW, min_seconds=0.5)
    assert (cut[0].start_seconds, cut[0].problem) == (None, None)
    assert [part.problem[0] for part in cut[1:] if part.problem] == ["not_media", "missing_file"]


def test_scenes_of_windows(tmp_path):
    """Scenes first, then windows of each: none holds a cut."""
    film(tmp_path / "a.mp4", sound=False)
    options = MakeOptions(scenes="pyav", windows=(0.4, 0.4), shuffle=None, workers=1)
    assert make_shards(tmp_path, tmp_path / "../scene_windows", options).samples == 3 + 4 + 1 + 3


def test_a_detector_that_is_not_there(monkeypatch):
    with pytest.raises(ConfigError, match="scenes=x: pyav or scenedetect"):
        MakeOptions(scenes="x")
    with pytest.raises(ConfigError, match="choose one"):
        MakeOptions(scenes="pyav", subtitles=True)
    monkeypatch.setitem(sys.modules, "scenedetect", None)
    with pytest.raises(ConfigError, match=r'pip install "mmcl\[scenes\]"'):
        MakeOptions(scenes="scenedetect")


def test_a_clip_that_is_one_scene(tmp_path):
    path = write_clip(tmp_path / "a.mp4", colour="red", seconds=2.0)
    assert cuts_of(path) == []


def test_the_command(tmp_path):
    film(tmp_path / "in.mp4", sound=False)
    (tmp_path / "t.csv").write_text("path\nin.mp4\n")
    options = ["--scenes", "--scene-detector", "scenedetect", "--min-scene", "1", "--dedup", "--workers", "1"]
    command = ["make", str(tmp_path / "t.csv"), "--out", str(tmp_path / "out"), *options]
    planned = CliRunner().invoke(app, [*command, "--dry-run"])
    assert planned.exit_code == 0 and "3 stretches of" in planned.output
    made = CliRunner().invoke(app, command)
    assert made.exit_code == 0 and "3 samples (0 were there)" in made.output, made.output
    assert "scenedetect" in (tmp_path / "out/settings.json").read_text()
