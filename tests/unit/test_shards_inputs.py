"""Rows mean the same from every kind of table; a table that cannot be read and a row that cannot be used are named."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from mmcl.shards.inputs import class_numbers, read_rows
from mmcl.shards.make import make_shards
from mmcl.shards.make_options import MakeOptions
from mmcl.types import ConfigError

RECORDS = [
    {"path": "a/x.mp4", "captions": ["one", "two"], "start_seconds": 1.5, "end_seconds": 3, "label": "dog"},
    {"path": "a/x.mp4", "captions": ["three"], "group": "g", "split": "test", "label": "cat", "mood": "blue"},
    {"path": "b.é.mp4"},
]


def write_table(folder, kind, records=RECORDS):
    path = folder / f"clips.{kind}"
    if kind == "jsonl":
        path.write_text("\n".join(json.dumps(record) for record in records), encoding="utf-8")
    elif kind == "parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(_all_columns(records)), path)
    else:
        comma = "," if kind == "csv" else "\t"
        lines = [comma.join(_all_columns(records)[0])]
        for record in _all_columns(records):
            cells = [json.dumps(v) if isinstance(v, list) else "" if v is None else str(v) for v in record.values()]
            lines.append(comma.join('"' + cell.replace('"', '""') + '"' for cell in cells))
        path.write_text("\ufeff" + "\r\n".join(lines), encoding="utf-8")
    return path


def _all_columns(records):
    columns = list(dict.fromkeys(name for record in records for name in record))
    return [{name: record.get(name) for name in columns} for record in records]


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet"])
def test_every_table_gives_the_same_rows(tmp_path, kind):
    first, second, third = read_rows(write_table(tmp_path, kind))
    assert first.path == str(tmp_path / "a/x.mp4") and first.name == first.group == "a/x.mp4"
    assert first.captions == ("one", "two") and (first.start_seconds, first.end_seconds) == (1.5, 3.0)
    assert (second.group, second.split, second.label) == ("g", "test", "cat")
    assert dict(second.metadata) == {"mood": "blue"} and dict(third.metadata) == {} and third.captions == ()
    assert class_numbers([first, second, third]) == {"cat": 0, "dog": 1}
    keys = [row.key for row in (first, second, third)]
    assert len(set(keys)) == 3 and all(not set(key) & set("./\\ é") for key in keys)
    assert all(row.problem is None for row in (first, second, third))


def test_a_row_keeps_its_key_when_others_come(tmp_path):
    before = {row.name: row.key for row in read_rows(write_table(tmp_path, "jsonl", RECORDS[1:]))}
    extended = [{"path": "new.mp4"}, *RECORDS[1:]]
    after = {row.name: row.key for row in read_rows(write_table(tmp_path, "jsonl", extended))}
    assert before.items() <= after.items()


def test_folder_with_sidecars(tmp_path):
    for name in ("b.mp4", "sub/a.MKV", "c.wav", "d.jpg", "e.webm", ".hidden/f.mp4", "notes.pdf"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "b.txt").write_text("a dog\n")
    (tmp_path / "c.json").write_text('{"captions": ["x", "y"], "label": 3, "mood": 1}')
    (tmp_path / "d.txt").write_bytes(b"")
    (tmp_path / "e.txt").write_bytes(b"\xff")
    rows = {row.name: row for row in read_rows(tmp_path)}
    assert list(rows) == ["b.mp4", "c.wav", "d.jpg", "e.webm", "sub/a.MKV"]
    assert rows["b.mp4"].captions == ("a dog",) and rows["sub/a.MKV"].captions == ()
    assert rows["c.wav"].captions == ("x", "y") and rows["c.wav"].label == 3 and rows["c.wav"].metadata == {"mood": 1}
    assert rows["d.jpg"].problem[0] == "caption_empty" and rows["e.webm"].problem[0] == "caption_not_utf8"


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"path": "a.mp4", "start_seconds": "x"}, "start_seconds"),
        ({"path": "a.mp4", "start_seconds": -1}, "start_seconds"),
        ({"path": "a.mp4", "end_seconds": 0}, "end_seconds"),
        ({"path": "a.mp4", "start_seconds": 2, "end_seconds": 1}, "not after"),
        ({"path": "a.mp4", "captions": 7}, "captions"),
        ({"path": "a.mp4", "label": [1]}, "label"),
        ({"path": "a.mp4", "split": "../x"}, "split"),
        ({"path": ""}, "no path"),
        ({"path": "a\0.mp4"}, "no path"),
        ({"caption": "x"}, "no path"),
        ({"path": "a.mp4", "mood": ["\ud800"]}, "UTF-8"),
        ({"path": "a.mp4", "group": "\udfff"}, "UTF-8"),
        ({"path": "\udcff.mp4"}, "UTF-8"),
    ],
)
def test_a_bad_row_carries_its_problem(tmp_path, record, words):
    good, bad = read_rows(write_table(tmp_path, "jsonl", [{"path": "good.mp4"}, record]))
    assert good.problem is None
    assert bad.problem[0] == "bad_row" and words in bad.problem[1]


def test_repeated_rows_are_named_other_captions_are_not(tmp_path):
    records = [{"path": "a.mp4", "caption": "x"}, {"path": "a.mp4", "caption": "y"}, {"path": "a.mp4", "caption": "x"}]
    rows = read_rows(write_table(tmp_path, "jsonl", records))
    assert [row.problem and row.problem[0] for row in rows] == [None, None, "duplicate_row"]
    assert rows[0].key != rows[1].key and rows[0].group == rows[1].group


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.csv", b"file,caption\nx,y\n", "no column 'path'"),
        ("a.csv", b"", "no column 'path'"),
        ("a.csv", b"path\n", "no rows"),
        ("a.csv", b'path,caption\na.mp4,x\nb.mp4,"y\nc.mp4,z\n', "line 3: a quote is not closed"),
        ("a.tsv", b'path\tcaption\na.mp4\t"y\nb.mp4\t"z"\n', "line 2: "),
        ("a.csv", b"path,caption,caption\na.mp4,x,y\n", "'caption' comes twice"),
        ("a.csv", b"path,caption\na.mp4,\xe9t\xe9\n", "not UTF-8"),
        ("a.jsonl", b'{"path": "\xe9"}\n', "not UTF-8"),
        ("a.jsonl", b'{"file": "x"}\n', "no row has a path"),
        ("a.parquet", b"not parquet", "not Parquet"),
        ("a.xlsx", b"", "a table"),
    ],
)
def test_a_table_that_cannot_be_read_is_one_clear_line(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=words) as caught:
        read_rows(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_nothing_there(tmp_path):
    with pytest.raises(ConfigError, match="no media"):
        read_rows(tmp_path)
    with pytest.raises(ConfigError, match="not there"):
        read_rows(tmp_path / "x.csv")


def test_a_broken_line_costs_one_row(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"path": "a.mp4"}\n{"path": \n\n{"path": "b.mp4"}\n')
    rows = read_rows(tmp_path / "a.jsonl")
    assert [row.problem is None for row in rows] == [True, False, True] and "line 2" in rows[1].problem[1]


def test_numbers_as_labels_stay_numbers(tmp_path):
    (tmp_path / "a.csv").write_text("path,label\na.mp4,7\nb.mp4,\nc.mp4,2\n")
    rows = read_rows(tmp_path / "a.csv")
    assert class_numbers(rows) == {} and [row.label for row in rows] == ["7", None, "2"]


def test_columns_without_a_name_mean_nothing(tmp_path):
    (tmp_path / "a.csv").write_text(",path,caption,\n0,a.mp4,x,\n\n1,b.mp4\n2,c.mp4,z,,surplus\n")
    first, second, third = read_rows(tmp_path / "a.csv")
    assert first.problem is second.problem is None
    assert (first.captions, second.captions, dict(first.metadata)) == (("x",), (), {})
    assert third.problem == ("bad_row", "line 5 has 1 more fields than the header")


def test_files_that_cannot_be_read_are_named_failures(tmp_path, media_folder):
    source = tmp_path / "in"
    source.mkdir()
    (source / "good.mp4").symlink_to(next(media_folder.rglob("*.mp4")).resolve())
    (source / "nowhere.mp4").symlink_to("missing.mp4")
    (source / "loop.mp4").symlink_to("loop.mp4")
    os.mkfifo(source / "pipe.mp4")
    names = {"nowhere.mp4": "unreadable", "loop.mp4": "unreadable", "pipe.mp4": "unreadable"}
    try:
        (source / os.fsdecode(b"\xff.mp4")).write_bytes(b"x")
        names["?.mp4"] = "bad_row"
    except OSError:
        pass  # this file system knows UTF-8 alone
    rows = {row.name: row.problem for row in read_rows(source)}
    assert rows.pop("good.mp4") is None and len(rows) == len(names)
    report = make_shards(source, tmp_path / "out", MakeOptions(workers=1))
    assert report.samples == 1
    failures = [json.loads(line) for line in (tmp_path / "out/failures.jsonl").read_text().splitlines()]
    assert {Path(line["path"]).name: line["reason"] for line in failures} == names


@pytest.mark.parametrize("wrong", [{"timeout_seconds": float("inf")}, {"timeout_seconds": 1e300}, {"shuffle": 10**23}])
def test_numbers_beyond_all_bounds_are_refused(wrong):
    with pytest.raises(ConfigError, match=f"^{next(iter(wrong))}="):
        MakeOptions(**wrong)
