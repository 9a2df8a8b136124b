"""Cues of subtitles become captioned samples; what is no subtitle file is named."""

from __future__ import annotations

import json

import pytest
from support.media import write_clip

from mmcl.shards import MakeOptions, ShardReader, load_manifest, make_shards, parse_sample
from mmcl.shards.subtitles import MAX_BYTES, Cue, merge_cues, parse_subtitles
from mmcl.types import ConfigError, RunError, SampleError

SRT = """\ufeff1\r
00:00:00,500 --> 00:00:01,500\r
<i>A red</i> clip\r
{\\an8}on two lines\r
\r
2
00:00:01,500 --> 00:00:02,250 X1:10
salt &amp; pepper

3
00:00:02,000 --> 00:00:01,000
backwards

4
00:00:02,500 --> 00:00:02,900

"""
VTT = """WEBVTT - a title

NOTE 00:01.000 is no cue

STYLE
::cue { color: red }

intro
00:01.000 --> 00:02.000 align:start
<v Ann>Hello <c.loud>there</c>

01:00:03.5 --> 01:00:04.5
late
"""


def test_srt_and_webvtt():
    assert parse_subtitles(SRT.encode()) == [
        Cue(0.5, 1.5, "A red clip on two lines"),
        Cue(1.5, 2.25, "salt & pepper"),
    ]
    assert parse_subtitles(VTT.encode()) == [Cue(1.0, 2.0, "Hello there"), Cue(3603.5, 3604.5, "late")]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "bad_subtitles"),
        (b"just text\n\nmore text", "bad_subtitles"),
        (b"\xff\xfe1\x00", "subtitles_not_utf8"),
        (b"x" * (MAX_BYTES + 1), "too_large"),
        (b"00:00:01,000 --> \n" * 10_000, "bad_subtitles"),
        (b"<" * 1_000_000, "bad_subtitles"),
    ],
)
def test_what_is_no_subtitle_file_is_named(data, reason):
    with pytest.raises(SampleError) as caught:
        parse_subtitles(data)
    assert caught.value.reason == reason


def test_merged_cues_lose_no_word():
    cues = [Cue(i, i + 0.8, f"w{i}") for i in range(10)]
    merged = merge_cues(cues, 2.5)
    assert " ".join(cue.text for cue in merged) == " ".join(cue.text for cue in cues)
    assert [(cue.start_seconds, cue.end_seconds) for cue in merged] == [(0, 2.8), (3, 5.8), (6, 8.8), (9, 9.8)]
    assert merge_cues(cues, 0.0) == cues


def test_shards_from_subtitles(tmp_path):
    for name in ("a", "b", "c"):
        write_clip(tmp_path / f"{name}.mp4", colour="red", seconds=4.0)
    (tmp_path / "a.srt").write_bytes(SRT.encode())
    (tmp_path / "b.vtt").write_text("no cues")
    out = tmp_path.parent / f"{tmp_path.name}-out"
    options = MakeOptions(subtitles=True, shuffle=None, workers=2)
    report = make_shards(tmp_path, out, options)
    assert report.samples == 3 and report.failures == {"bad_subtitles": 1}
    reader = ShardReader(load_manifest(out))
    samples = [parse_sample(reader.read(0, index)) for index in range(3)]
    assert [sample.captions for sample in samples] == [("A red clip on two lines",), ("salt & pepper",), ()]
    assert [sample.duration_seconds for sample in samples] == pytest.approx([1.0, 0.75, 4.0], abs=0.01)
    assert [sample.group for sample in samples] == ["a.mp4", "a.mp4", "c.mp4"]
    assert len({sample.key for sample in samples}) == 3
    assert make_shards(tmp_path, out, options).reused == 3
    table = tmp_path / "t.jsonl"
    table.write_text(json.dumps({"path": "a.mp4", "start_seconds": 1.0}))
    part = make_shards(table, tmp_path.parent / f"{tmp_path.name}-part", options)
    assert part.samples == 1


def test_a_stretch_without_a_cue_is_a_failure_with_its_reason(tmp_path):
    write_clip(tmp_path / "a.mp4", colour="red", seconds=1.0, audio=False)
    (tmp_path / "a.srt").write_bytes(SRT.encode())
    table = tmp_path / "t.jsonl"
    table.write_text(json.dumps({"path": "a.mp4", "start_seconds": 0.1, "end_seconds": 0.2}))
    with pytest.raises(RunError, match=r"none of the 1 rows .* no_cue"):
        make_shards(table, tmp_path / "out", MakeOptions(subtitles=True, workers=1))


def test_merging_needs_subtitles():
    for wrong in ({"merge_cues_seconds": 2.0}, {"merge_cues_seconds": -1.0, "subtitles": True}):
        with pytest.raises(ConfigError, match="merge_cues_seconds"):
            MakeOptions(**wrong)
