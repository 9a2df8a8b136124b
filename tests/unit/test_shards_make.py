"""``make_shards`` is a pure function of its input, whatever the workers, interruptions and hostile files on the way."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import av
import pytest
import webdataset as wds
from support.media import write_clip

from mmcl.shards import MakeOptions, ShardReader, load_manifest, make_shards, parse_sample
from mmcl.shards.make import describe_plan
from mmcl.shards.pool import Lost, run_jobs
from mmcl.types import ConfigError, RunError


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "settings.json"
    }


def samples_of(folder: Path):
    reader = ShardReader(load_manifest(folder))
    sizes = enumerate(reader.manifest.sizes)
    return [parse_sample(reader.read(shard, index)) for shard, size in sizes for index in range(size)]


def write_table(path: Path, rows: list[dict]) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture(scope="module")
def few_clips(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("few")
    for number, colour in enumerate(["red", "green", "blue", "yellow", "white", "cyan"]):
        write_clip(folder / f"{colour}.mp4", colour=colour, seconds=0.5, audio=number % 2 == 0)
    return folder


def rows_of(folder: Path) -> list[dict]:
    return [{"path": str(path), "caption": path.stem} for path in sorted(folder.glob("*.mp4"))]


def test_the_fixture_holds_every_clip_once(shards_folder, media_folder):
    train, test = samples_of(shards_folder / "train"), samples_of(shards_folder / "test")
    assert (len(train), len(test)) == (16, 8)
    assert len({sample.key for sample in train + test}) == 24
    red = next(sample for sample in test if sample.group == "red")
    assert red.captions == ("a red clip, deep tone",) and red.video_size == (48, 64)
    assert red.duration_seconds == 4.0 and red.metadata["audio"]["sample_rate_hz"] == 16_000
    assert red.metadata["source"]["path"] == "red_2.mp4"
    silent = [sample for sample in train if sample.metadata["audio"] is None]
    assert len(silent) == 2
    assert (shards_folder / "failures.jsonl").read_bytes() == b"" and not (shards_folder / ".make").exists()


def test_webdataset_reads_them(shards_folder):
    urls = sorted(map(str, (shards_folder / "train").glob("*.tar")))
    seen = [sample["__key__"] for sample in wds.WebDataset(urls, shardshuffle=False)]
    assert seen == [sample.key for sample in samples_of(shards_folder / "train")]


def test_the_number_of_workers_changes_no_byte(few_clips, tmp_path):
    for workers in (1, 3):
        make_shards(few_clips, tmp_path / str(workers), MakeOptions(max_count=2, workers=workers))
    assert contents(tmp_path / "1") == contents(tmp_path / "3")
    report = make_shards(few_clips, tmp_path / "1", MakeOptions(max_count=2, workers=2))
    assert (report.samples, report.reused) == (6, 6)
    assert contents(tmp_path / "1") == contents(tmp_path / "3")


def test_shuffle_is_a_seed_and_can_be_off(few_clips, tmp_path):
    orders = {}
    for shuffle in (None, 0, 1):
        make_shards(few_clips, tmp_path / str(shuffle), MakeOptions(shuffle=shuffle))
        orders[shuffle] = [sample.group for sample in samples_of(tmp_path / str(shuffle))]
    assert orders[None] == sorted(orders[None]) and len(set(map(tuple, orders.values()))) == 3


def test_rows_that_come_and_go_encode_nothing_twice(few_clips, tmp_path):
    rows = rows_of(few_clips)
    options = MakeOptions(max_count=2, workers=2, shuffle=None)
    table = write_table(tmp_path / "t.jsonl", rows[2:])
    make_shards(table, tmp_path / "out", options)
    write_table(table, rows)
    assert make_shards(table, tmp_path / "out", options).reused == 4
    make_shards(table, tmp_path / "fresh", options)
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")
    write_table(table, rows[:2])
    assert make_shards(table, tmp_path / "out", options).reused == 2
    assert len(list((tmp_path / "out").glob("*.tar"))) == len(list((tmp_path / "out").glob("*.members"))) == 1


def test_while_shards_change_there_is_no_manifest(few_clips, tmp_path):
    rows, options = rows_of(few_clips), MakeOptions(max_count=2, shuffle=None)
    table = write_table(tmp_path / "t.jsonl", rows[2:])
    make_shards(table, tmp_path / "out", options)
    write_table(table, rows)
    (tmp_path / "out/.shard-000001.tar.part").symlink_to("/dev/full")
    with pytest.raises(RunError, match="disk is full"):
        make_shards(table, tmp_path / "out", options)
    with pytest.raises(ConfigError, match="unfinished"):
        load_manifest(tmp_path / "out")
    make_shards(table, tmp_path / "out", options)
    make_shards(table, tmp_path / "fresh", options)
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def test_a_changed_file_is_encoded_again(few_clips, tmp_path):
    folder = tmp_path / "in"
    shutil.copytree(few_clips, folder)
    make_shards(folder, tmp_path / "out")
    write_clip(folder / "red.mp4", colour="red", seconds=1.0)
    assert make_shards(folder, tmp_path / "out").reused == 5
    assert [s.duration_seconds for s in samples_of(tmp_path / "out") if s.group == "red.mp4"] == [1.0]


def test_other_settings_are_refused_with_the_difference(few_clips, tmp_path):
    make_shards(few_clips, tmp_path / "out", MakeOptions(max_count=2))
    before = contents(tmp_path / "out")
    with pytest.raises(ConfigError, match="max_count: 2 there, 3 asked"):
        make_shards(few_clips, tmp_path / "out", MakeOptions(max_count=3))
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign/a.tar").write_bytes(b"")
    with pytest.raises(ConfigError, match="not made by this command"):
        make_shards(few_clips, tmp_path / "foreign")
    assert contents(tmp_path / "out") == before


def test_splits_labels_and_failures(few_clips, damaged_media, tmp_path):
    bad = [{"path": str(path), "split": "train"} for name, path in damaged_media.items() if "only" not in name]
    rows = [
        {**row, "split": "test" if number < 2 else "train", "label": row["caption"], "mood": number}
        for number, row in enumerate(rows_of(few_clips))
    ]
    table = write_table(tmp_path / "t.jsonl", [bad[0], *rows, *bad[1:], {"path": "gone.mp4"}, {"caption": "x"}])
    report = make_shards(table, tmp_path / "out", MakeOptions(workers=2))
    lines = [json.loads(line) for line in (tmp_path / "out/failures.jsonl").read_text().splitlines()]
    assert sum(report.failures.values()) == len(lines) and report.samples + len(lines) == len(rows) + len(bad) + 2
    assert [line["row"] for line in lines] == sorted(line["row"] for line in lines)
    reasons = {Path(line["path"]).name: line["reason"] for line in lines}
    assert reasons["truncated.mp4"] == "not_media" and reasons["empty.mp4"] == "empty"
    assert reasons["gone.mp4"] == "missing_file" and reasons[""] == "bad_row"
    test = samples_of(tmp_path / "out/test")
    classes = json.loads((tmp_path / "out/labels.json").read_text())["classes"]
    assert classes == sorted(row["caption"] for row in rows)
    assert all(classes[sample.label] == sample.captions[0] for sample in test) and len(test) == 2
    assert {sample.metadata["mood"] for sample in test} == {0, 1}


def test_nothing_usable_is_one_clear_line(tmp_path):
    table = write_table(tmp_path / "t.jsonl", [{"path": "gone.mp4"}])
    with pytest.raises(RunError, match=r"none of the 1 rows .*gone\.mp4: missing_file"):
        make_shards(table, tmp_path / "out")
    assert list(tmp_path.rglob("*.tar")) == []


def test_dry_run_writes_nothing(few_clips, tmp_path):
    table = write_table(tmp_path / "t.jsonl", [*rows_of(few_clips), {"path": "gone.mp4"}, {"caption": "x"}])
    text = "\n".join(describe_plan(table, tmp_path / "out"))
    assert "8 rows" in text and "1 files are missing and 1 rows cannot be used" in text
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written_is_one_clear_line(few_clips, tmp_path):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file/below", Path("/proc/nothing/here")):
        with pytest.raises(RunError) as caught:
            make_shards(few_clips, out)
        assert "\n" not in str(caught.value)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/.shard-000000.tar.part").symlink_to("/dev/full")
    with pytest.raises(RunError, match="disk is full"):
        make_shards(few_clips, tmp_path / "full")
    assert list((tmp_path / "full").glob("shard-*")) == []


def write_endless(path: Path) -> Path:
    """Hours of video in a small file: the packets of one second again and again."""
    second = write_clip(path.with_suffix(".second.mp4"), colour="red", seconds=1.0, audio=False)
    with av.open(str(second)) as source, av.open(str(path), "w") as out:
        stream = source.streams.video[0]
        packets = [(packet.pts, bytes(packet), packet.is_keyframe) for packet in source.demux(stream) if packet.size]
        copied = out.add_stream_from_template(stream)
        for turn in range(20_000):
            for pts, data, is_keyframe in packets:
                packet = av.Packet(data)
                packet.pts = packet.dts = pts + round(turn / stream.time_base)
                packet.time_base, packet.stream, packet.is_keyframe = stream.time_base, copied, is_keyframe
                out.mux(packet)
    second.unlink()
    return path


def test_a_file_that_takes_too_long_is_named_and_skipped(few_clips, tmp_path):
    folder = tmp_path / "in"
    shutil.copytree(few_clips, folder)
    write_endless(folder / "hours.mp4")
    report = make_shards(folder, tmp_path / "out", MakeOptions(workers=2, timeout_seconds=2))
    assert (report.samples, report.failures) == (6, {"timeout": 1})


RUN = """
import sys
from mmcl.shards import MakeOptions, make_shards
if __name__ == "__main__":
    options = MakeOptions(max_count=2, workers=2)
    make_shards(sys.argv[1], sys.argv[2], options, progress=lambda *counts: print(*counts, flush=True))
"""


def test_killed_in_mid_make_and_started_again(few_clips, tmp_path):
    table = write_table(
        tmp_path / "t.jsonl", [row | {"end_seconds": e} for row in rows_of(few_clips) for e in (0.3, 1)]
    )
    make_shards(table, tmp_path / "whole", MakeOptions(max_count=2))
    (tmp_path / "run.py").write_text(RUN)
    command = [sys.executable, str(tmp_path / "run.py"), str(table), str(tmp_path / "out")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": "."}) as process:
        for line in process.stdout:
            if int(line.split()[0]) >= 5:
                process.send_signal(signal.SIGKILL)
                break
    with pytest.raises(ConfigError, match="unfinished"):
        load_manifest(tmp_path / "out")
    deadline = time.monotonic() + 60
    while True:  # the orphaned workers finish their sample and go
        try:
            report = make_shards(table, tmp_path / "out", MakeOptions(max_count=2))
            break
        except RunError:
            assert time.monotonic() < deadline
    assert report.samples == 12 and report.reused >= 4
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def job(number: int) -> int:
    if number == 3:
        os.kill(os.getpid(), signal.SIGSEGV)
    if number == 5:
        time.sleep(60)
    if number == 100:
        raise ZeroDivisionError("ours")
    return number * number


def test_a_dying_and_a_hanging_worker_cost_one_job_each():
    results = list(run_jobs(job, range(8), workers=2, timeout_seconds=1))
    assert [result for result in results if not isinstance(result, Lost)] == [0, 1, 4, 16, 36, 49]
    assert results[3].reason == "worker_died" and "SIGSEGV" in results[3].detail
    assert results[5].reason == "timeout"


def test_our_own_errors_are_raised():
    with pytest.raises(ZeroDivisionError, match="ours"):
        list(run_jobs(job, [1, 100, 2], workers=2, timeout_seconds=10))
