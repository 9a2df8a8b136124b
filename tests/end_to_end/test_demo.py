"""`mmcl demo` on one's own clips: interrupted, gone on with, finished; and the same on a few recorded games."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mmcl.demo.run import _config, _read_table, _set, _signals_interrupt, _split_table, _stop, run_demo
from mmcl.recipe import load_config
from mmcl.shipped import shipped
from mmcl.types import ConfigError, RunError

MMCL = [sys.executable, "-m", "mmcl"]


def finish(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*MMCL, *arguments], capture_output=True, text=True, timeout=280, check=False)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_leaves_a_usable_folder_and_the_same_command_goes_on(
    media_folder: Path, tmp_path: Path, number: signal.Signals
) -> None:
    out = tmp_path / "out #1: x"
    arguments = ["demo", "--clips", str(media_folder / "clips.csv"), "--out", str(out), "--steps", "14"]
    process = subprocess.Popen([*MMCL, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 200
    while not (out / "run/metrics.jsonl").exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(number)
    said, errors = process.communicate(timeout=100)
    assert process.returncode == 1, said + errors
    assert "goes on from what is in" in errors
    assert "Traceback" not in errors
    assert not (out / "run/checkpoints/step_00000014").exists()
    assert list((out / "run/checkpoints").glob("step_*"))

    done = finish(arguments)
    assert done.returncode == 0, done.stderr
    assert "24 samples (24 were there)" in done.stdout
    assert "text->video" in done.stdout
    report = json.loads((out / "report/report.json").read_text())
    assert len(report["directions"]) == 6
    assert (out / "report/report.html").exists()

    other = finish([*arguments, "--seed", "3"])
    assert other.returncode == 2
    assert other.stderr.startswith("error: --seed: ")


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"file,caption\na.mp4,x\n", "needs the columns path,caption[,split]"),
        (b"path,caption,split\na.mp4,x,train\n", "split must hold both train and test"),
        (b"", "found no rows"),
        (b"path,caption\n\xff\xfe.mp4,x\n", "cannot be read"),
        (b"path,caption,split\na.mp4,x,train\nb.mp4\n", "split must hold both train and test, found train"),
        (b"path,caption\na.mp4,x\n", "cannot be split"),
        (b'path,caption\na.mp4,"x\nb.mp4,y\n', "line 2: a quote is not closed"),
        (b"path,path\na.mp4,x\n", "'path' comes twice"),
    ],
)
def test_a_wrong_table_is_one_line(tmp_path: Path, content: bytes, part: str) -> None:
    table = tmp_path / "clips.csv"
    table.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        run_demo(tmp_path / "out", clips=table)
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()  # the mended table starts anew


def split_rows(table: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(_split_table(table, _read_table(table), table.parent).open()))


@pytest.mark.parametrize(("count", "tests"), [(2, 1), (3, 1), (4, 1), (12, 2), (200, 40)])
def test_a_table_without_split_is_split_by_itself(tmp_path: Path, count: int, tests: int) -> None:
    table = tmp_path / "own.csv"
    table.write_text("path,caption\n" + "".join(f"clip{i}.mp4,words {i}\nclip{i}.mp4,again\n" for i in range(count)))
    rows = split_rows(table)
    assert len(rows) == 2 * count
    assert sum(row["split"] == "test" for row in rows) == 2 * tests
    assert all(one["split"] == other["split"] for one, other in zip(rows[::2], rows[1::2], strict=True))
    assert rows[0]["path"] == str(tmp_path / "clip0.mp4")


def test_a_row_of_another_length_keeps_what_it_says(tmp_path: Path) -> None:
    table = tmp_path / "own.csv"
    table.write_text("path,caption\na.mp4\nb.mp4,x,surplus\n,y\n")
    first, second, third = split_rows(table)
    assert (first["caption"], first["split"] in ("train", "test")) == ("", True)
    assert second[None] == ["surplus"]  # type: ignore[index]
    assert third["path"] == ""


def test_a_split_without_a_usable_clip_is_one_line_before_training(media_folder: Path, tmp_path: Path) -> None:
    table = tmp_path / "own.csv"
    clip = next(media_folder.rglob("*.mp4"))
    table.write_text(f"path,caption,split\n{clip},x,train\nmissing.mp4,y,test\n")
    with pytest.raises(RunError, match=r"^no clip of the split test could be used; .*failures\.jsonl") as caught:
        run_demo(tmp_path / "out", clips=table)
    assert "\n" not in str(caught.value)
    (tmp_path / "out/demo.json").write_text('{"steps": ')
    with pytest.raises(ConfigError, match=r"demo\.json is damaged"):
        run_demo(tmp_path / "out", clips=table)


def test_paths_may_hold_what_yaml_has_a_use_for(tmp_path: Path) -> None:
    for name in ("a #b", "c: d", "é 🦊", '"', "1e3", "[x]", "{y}", "back\\slash"):
        config = _config(tmp_path / name, tmp_path / name / "shards", 7, 0)
        assert config.train.out == str(tmp_path / name / "run")
        assert config.data.shards == str(tmp_path / name / "shards/train")
        assert load_config(shipped("configs/pretrain/demo.yaml"), [_set("train.out", config.train.out)])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_stops_the_training_first(tmp_path: Path, number: signal.Signals) -> None:
    """In place of the launcher a process that, as a starting run does, takes the first request away."""
    stop = tmp_path / "stop"
    child = (
        f"import os, time, pathlib; stop = pathlib.Path({str(stop)!r})\n"
        f"os.kill({os.getpid()}, {number:d})\n"
        "while not stop.exists(): time.sleep(0.01)\n"
        f"os.kill({os.getpid()}, {number:d})\n"
        "stop.unlink()\n"
        "while not stop.exists(): time.sleep(0.01)\n"
    )
    before = signal.signal(number, signal.SIG_DFL)  # under `nohup` it is ignored, and stays so
    try:
        with pytest.raises(KeyboardInterrupt), _signals_interrupt():
            launcher = subprocess.Popen([sys.executable, "-c", child], start_new_session=True)
            try:
                launcher.wait(60)
            except KeyboardInterrupt:
                _stop(launcher, stop)
                assert launcher.returncode == 0
                raise
        assert signal.getsignal(number) == signal.SIG_DFL
    finally:
        signal.signal(number, before)
