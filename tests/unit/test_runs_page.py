"""``mmcl runs``: what folders tell, whatever state they are in, and a page that nothing in a name can break."""

from __future__ import annotations

import fcntl
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mmcl.cli import app
from mmcl.evaluation.runs import find_runs, run_lines, write_runs
from mmcl.types import ConfigError


def make(folder: Path, lines: list[object], steps: int | None = 20) -> Path:
    folder.mkdir(parents=True)
    text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text)
    if steps is not None:
        (folder / "config.yaml").write_text(f"train: {{steps: {steps}}}\n")
    return folder


def line(step: int, **more: object) -> dict[str, object]:
    return {"step": step, "samples": 8 * step, "loss": 1 / step, "samples_per_second": 123.4, **more}


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    hits = {"eval/mean_R@1": 40.0}
    make(tmp_path / "a", [line(10, **hits), line(20, **{"eval/mean_R@1": 30.0})])
    make(tmp_path / "b", [line(10), line(12, loss="nan"), '{"step": 13, "lo', "[1]", "[" * 100_000])
    make(tmp_path / "c", [])
    make(tmp_path / "d", ["\x00garbage"], steps=None)
    make(tmp_path / "<script>alert(1)</script>\x1b[31m".replace("/", "|"), [line(1, **{"<b>&x": 2.0})])
    (tmp_path / "nothing").mkdir()
    return tmp_path


def test_every_state_has_a_line(folders: Path) -> None:
    runs = {run.name: run for run in find_runs([folders])}
    assert len(runs) == 5
    assert runs["a"].cells() == ("a", "finished", "20 of 20", "0.05", "30", "40", "123", "–")
    assert runs["b"].state == "unfinished, 3 of 5 lines of metrics.jsonl cannot be read"
    assert runs["b"].cells()[2:4] == ("12 of 20", "0.1")  # NaN is no number
    assert runs["c"].state == "empty"
    assert runs["d"].state == "damaged, 1 of 1 lines of metrics.jsonl cannot be read"
    table = run_lines(list(runs.values()))
    assert len(table) == 6 and not any("\x1b" in row for row in table)


def test_a_run_that_is_being_written_is_told_from_one_that_stopped(folders: Path) -> None:
    with (folders / "c/.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert find_runs([folders / "c"])[0].state == "running"
    assert find_runs([folders / "c"])[0].state == "empty"


def test_the_page_draws_all_and_runs_nothing(folders: Path, tmp_path: Path) -> None:
    runs = find_runs([folders])
    text = write_runs(runs, tmp_path / "out/runs.html").read_text()
    assert "default-src 'none'" in text and "<script" not in text
    assert "&lt;script&gt;" in text and "&lt;b&gt;&amp;x" in text and "<b>&x" not in text
    loss = text.split('<figcaption dir="auto">loss</figcaption>')[1].split("</figure>")[0]
    assert loss.count('<path class="line') == 3  # of runs without a step none
    assert "http://" not in text.replace("http://www.w3.org", "") and "https://" not in text


def test_names_that_are_equal_are_told_apart(tmp_path: Path) -> None:
    left, right = (make(tmp_path / side / "run", [line(1)]) for side in ("x", "y"))
    assert [run.name for run in find_runs([left, right, left])] == [str(left), str(right)]


def test_what_is_no_run_is_said_in_a_line(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for folder, words in ((tmp_path / "empty", "neither a run"), (tmp_path / "none", "no such folder")):
        with pytest.raises(ConfigError, match=words):
            find_runs([folder])


def test_the_command_prints_and_writes(folders: Path, tmp_path: Path) -> None:
    out = tmp_path / "curves.html"
    done = CliRunner().invoke(app, ["runs", str(folders / "a"), str(folders / "b"), "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert done.output.splitlines()[0].startswith("run  state") and done.output.splitlines()[-1] == str(out)
    assert out.read_text().count("<figure>") >= 3
