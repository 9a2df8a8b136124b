"""Rows of the same media, stretch and crop: always named, left out when asked."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from pathlib import Path

import pytest
from support.media import write_clip

from mmcl.shards import MakeOptions, ShardReader, load_manifest, make_shards


@pytest.fixture
def table(tmp_path: Path) -> Path:
    write_clip(tmp_path / "a.mp4", colour="red", seconds=2.0)
    write_clip(tmp_path / "b.mp4", colour="blue", seconds=2.0)
    shutil.copy(tmp_path / "a.mp4", tmp_path / "copy.mp4")
    rows = [
        {"path": "a.mp4", "caption": "one", "split": "train"},
        {"path": "b.mp4", "split": "train"},
        {"path": "copy.mp4", "caption": "two", "split": "test"},
        {"path": "a.mp4", "start_seconds": 0, "split": "train", "caption": "whole too"},
        {"path": "a.mp4", "end_seconds": 1, "split": "train"},
        {"path": "copy.mp4", "end_seconds": 1, "split": "train"},
        {"path": "a.mp4", "crop_x": 0, "crop_y": 0, "crop_w": 32, "crop_h": 32, "split": "test"},
        {"path": "gone.mp4", "split": "train"},
    ]
    path = tmp_path / "t.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def named(out: Path) -> list[tuple[int, int]]:
    lines = [json.loads(line) for line in (out / "duplicates.jsonl").read_text().splitlines()]
    return [(line["row"], line["same_as_row"]) for line in lines]


def test_duplicates_are_named_and_kept(table, tmp_path):
    report = make_shards(table, tmp_path / "out", MakeOptions(workers=2))
    assert (report.samples, report.duplicates, report.failures) == (7, 3, {"missing_file": 1})
    assert named(tmp_path / "out") == [(2, 0), (3, 0), (5, 4)]
    assert f"duplicates: 3, kept; --dedup leaves them out; see {tmp_path / 'duplicates.jsonl'}" in report.lines(
        tmp_path
    )
    assert make_shards(table, tmp_path / "out", MakeOptions(workers=2)).duplicates == 3  # all in shards already


def test_dedup_leaves_out_all_but_the_first_of_the_input(table, tmp_path):
    options = MakeOptions(workers=2, dedup=True)
    report = make_shards(table, tmp_path / "out", options)
    assert (report.samples, report.duplicates, report.failures) == (4, 3, {"missing_file": 1})
    assert named(tmp_path / "out") == [(2, 0), (3, 0), (5, 4)]
    line = json.loads((tmp_path / "out/duplicates.jsonl").read_text().splitlines()[0])
    assert (line["path"], line["same_as_path"], line["left_out"]) == ("copy.mp4", "a.mp4", True)
    folders = {name: ShardReader(load_manifest(tmp_path / "out" / name)) for name in ("train", "test")}
    assert {name: len(reader) for name, reader in folders.items()} == {"train": 3, "test": 1}
    again = make_shards(table, tmp_path / "out", options)
    assert (again.samples, again.reused) == (4, 4)


def test_a_member_of_a_tar_is_what_a_file_is(tmp_path):
    clip = write_clip(tmp_path / "a.mp4", colour="red", seconds=1.0).read_bytes()
    for name in ("0.tar", "1.tar"):
        with tarfile.open(tmp_path / name, "w") as tar:
            info = tarfile.TarInfo("k.mp4")
            info.size = len(clip)
            tar.addfile(info, io.BytesIO(clip))
    report = make_shards(tmp_path / "*.tar", tmp_path / "out", MakeOptions(workers=1, dedup=True))
    assert (report.samples, report.duplicates) == (1, 1)


def test_a_split_of_duplicates_alone_has_no_folder(table, tmp_path):
    lines = table.read_text().splitlines()
    table.write_text("\n".join([lines[0], lines[2]]))
    report = make_shards(table, tmp_path / "out", MakeOptions(workers=1, dedup=True))
    assert report.samples == 1 and report.folders == (tmp_path / "out/train",)
