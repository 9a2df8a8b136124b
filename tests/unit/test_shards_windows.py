"""Windows of long files: where they lie, that they are cut there, and that they stay one group."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image
from support.media import encode, numbered_picture, read_number, tone, write_clip, write_flash

from mmcl.media.audio import read_audio
from mmcl.media.video import open_video
from mmcl.shards import MakeOptions, ShardReader, load_manifest, make_shards, parse_sample
from mmcl.shards.cut import cut_rows, parse_windows
from mmcl.shards.engine import Crew
from mmcl.shards.inputs import Row, read_rows
from mmcl.shards.make import describe_plan
from mmcl.shards.pool import run_jobs
from mmcl.types import ConfigError

CREW = Crew(run_jobs, 1, 30)


def spans(rows: list[Row]) -> list[tuple[float | None, float | None]]:
    return [(row.start_seconds, row.end_seconds) for row in rows]


def samples_of(folder):
    reader = ShardReader(load_manifest(folder))
    return [parse_sample(reader.read(0, index)) for index in range(len(reader))]


def test_windows_lie_inside_and_keep_what_the_row_says(tmp_path):
    path = write_clip(tmp_path / "long.mp4", colour="red", seconds=7.0, audio=False)
    row = Row("k", "long.mp4", str(path), captions=("a",), group="film")

    def cut(row, *windows):
        return spans(cut_rows([row], windows, CREW))

    assert cut(row, 2.0, 2.0) == [(0, 2), (2, 4), (4, 6)]
    assert cut(row, 3.0, 2.0) == [(0, 3), (2, 5), (4, 7)]
    assert cut(row, 7.0, 1.0) == [(0, 7)]
    assert cut(row, 8.0, 1.0) == [(None, None)]  # shorter than a window: one sample, whole
    stretch = Row("k", "long.mp4", str(path), start_seconds=1.5, end_seconds=5.0)
    assert cut(stretch, 1.0, 1.0) == [(1.5, 2.5), (2.5, 3.5), (3.5, 4.5)]
    rows = cut_rows([row], (2.0, 2.0), CREW)
    assert {(row.captions, row.group) for row in rows} == {(("a",), "film")}


def test_samples_hold_just_their_window(tmp_path):
    pictures = [numbered_picture(i) for i in range(100)]
    encode(tmp_path / "a.mp4", pictures, tone(440, 4.0, 16_000), fps=25)
    options = MakeOptions(windows=(1.0, 0.5), shuffle=None, workers=2)
    report = make_shards(tmp_path, tmp_path / "../out", options)
    assert report.samples == 7 and not report.failures
    samples = samples_of(tmp_path / "../out")
    for number, sample in enumerate(samples):
        reader = open_video(sample.video, decoder="pyav")
        numbers = [read_number(frame) for frame in reader.read(range(len(reader.frame_times_seconds)))]
        reader.close()
        first = round(12.5 * number)
        assert (
            len(numbers) == 25 and abs(numbers[0] - first) <= 1 and numbers == list(range(numbers[0], numbers[0] + 25))
        )
        assert sample.duration_seconds == 1.0 and sample.group == "a.mp4"
        assert sample.metadata["source"]["start_seconds"] == 0.5 * number
    assert len({sample.key for sample in samples}) == 7
    assert make_shards(tmp_path, tmp_path / "../out", options).reused == 7


def test_beep_and_flash_stay_together_in_their_window(tmp_path):
    write_flash(tmp_path / "a.mp4", flash_seconds=2.6, seconds=5.0)
    make_shards(tmp_path, tmp_path / "../cut", MakeOptions(windows=(1.5, 0.5), shuffle=None, workers=1))
    found = []
    for sample in samples_of(tmp_path / "../cut"):
        reader = open_video(sample.video, decoder="pyav")
        bright = reader.read(range(len(reader.frame_times_seconds))).mean(axis=(1, 2, 3)) > 120
        flash = reader.frame_times_seconds[bright.argmax()] if bright.any() else None
        reader.close()
        wave = read_audio(sample.video, start_seconds=0, end_seconds=1.5, sample_rate_hz=32_000)
        loud = np.abs(wave) > 0.3
        beep = loud.argmax() / 32_000 if loud.any() else None
        assert (flash is None) == (beep is None)
        if flash is not None:
            assert abs(flash - beep) < 1024 / 32_000 + 0.02
            found.append(sample.metadata["source"]["start_seconds"] + flash)
    assert found == pytest.approx([2.6, 2.6, 2.6], abs=0.04)


def test_what_cannot_be_measured_is_named_and_pictures_stay(damaged_media, tmp_path):
    Image.new("RGB", (64, 48)).save(tmp_path / "p.png")
    write_clip(tmp_path / "good.mp4", colour="red", seconds=2.0)
    encode(tmp_path / "sound.m4a", None, tone(440, 2.1, 16_000))
    names = ["p.png", "good.mp4", "sound.m4a", str(damaged_media["truncated"]), "gone.mp4"]
    table = tmp_path / "t.jsonl"
    table.write_text("".join(json.dumps({"path": name}) + "\n" for name in names))
    rows = cut_rows(read_rows(table), (1.0, 1.0), CREW)
    assert spans(rows[:5]) == [(None, None), (0, 1), (1, 2), (0, 1), (1, 2)]
    assert [row.problem[0] for row in rows[5:]] == ["not_media", "missing_file"]
    report = make_shards(table, tmp_path / "out", MakeOptions(windows=(1.0, 1.0), workers=2))
    assert report.samples == 5 and report.failures == {"missing_file": 1, "not_media": 1}
    plan = describe_plan(table, tmp_path / "other", MakeOptions(windows=(1.0, 1.0), workers=1))
    assert plan[0].startswith("7 stretches of")
    with pytest.raises(ConfigError, match="windows"):
        make_shards(table, tmp_path / "out", MakeOptions(windows=(1.0, 0.5)))


@pytest.mark.parametrize("text", ["x", "0", "-1", "1:0", "1:x", "nan", "inf", "1:2:3"])
def test_wrong_windows_are_refused(text):
    with pytest.raises(ConfigError, match="windows="):
        parse_windows(text)
