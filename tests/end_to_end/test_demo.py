"""`mmcl demo` on one's own clips: interrupted, gone on with, finished; and the same on a few recorded games."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

MMCL = [sys.executable, "-m", "mmcl"]


def finish(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*MMCL, *arguments], capture_output=True, text=True, timeout=280, check=False)


@pytest.mark.slow
def test_ctrl_c_leaves_a_usable_folder_and_the_same_command_goes_on(media_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["demo", "--clips", str(media_folder / "clips.csv"), "--out", str(out), "--steps", "14"]
    process = subprocess.Popen([*MMCL, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 200
    while not (out / "run/metrics.jsonl").exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
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
    ],
)
def test_a_wrong_table_is_one_line(tmp_path: Path, content: bytes, part: str) -> None:
    from mmcl.demo.run import run_demo
    from mmcl.types import ConfigError

    table = tmp_path / "clips.csv"
    table.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        run_demo(tmp_path / "out", clips=table)
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_table_without_split_is_split_by_itself(tmp_path: Path) -> None:
    import csv

    from mmcl.demo.run import _split_table

    table = tmp_path / "clips.csv"
    table.write_text("path,caption\n" + "".join(f"clip{i}.mp4,words {i}\n" for i in range(200)))
    rows = list(csv.DictReader(_split_table(table, tmp_path).open()))
    assert len(rows) == 200
    share = sum(row["split"] == "test" for row in rows) / 200
    assert 0.1 < share < 0.3
    assert rows[0]["path"] == str(tmp_path / "clip0.mp4")
