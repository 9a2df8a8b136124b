"""The comparisons of ``tools/bench/learning.py``: one at its tiny size, recordings to JSON; what others would run."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from support.recipes import ROOT

from mmcl.config import build
from mmcl.recipe import RunConfig, build_model


@pytest.mark.slow
def test_a_comparison_runs_and_its_runs_are_kept(tmp_path: Path) -> None:
    work, out = tmp_path / "work", tmp_path / "learning.json"
    command = [
        sys.executable, str(ROOT / "tools/bench/learning.py"), "--quick", "--distillation", "--seeds", "1",
        "--teachers", "audio", "image",
        "--work", str(work), "--out", str(out),
    ]  # fmt: skip
    first = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = json.loads(out.read_text(encoding="utf-8"))
    arms = found["distillation"]["arms"]
    assert {"untrained", "labels alone", "plain, from sound", "compositional, from pictures"} <= set(arms)
    assert all(0 <= figure["mean"] <= 100 for arm in arms.values() for name, figure in arm.items() if "cpu" not in name)
    assert "classifier" in arms["labels alone"]
    assert "classifier" not in arms["untrained"]
    runs = work / "quick/runs"
    (line,) = (runs / "distillation-labels_alone-0/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(line)["step"] == 4
    kept = runs / "distillation-labels_alone-0/checkpoints"
    written = kept.stat().st_mtime_ns
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout == first
    assert kept.stat().st_mtime_ns == written, "a run that is there is not made again"


@pytest.mark.slow
def test_the_overhead_of_a_mix_is_measured_on_equal_losses(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "tools/bench/mix.py"), "--rows", "16", "--pairs", "4", "--calls", "1"]
    subprocess.run([*command, "--out", str(tmp_path / "mix.json")], check=True, capture_output=True)
    found = json.loads((tmp_path / "mix.json").read_text(encoding="utf-8"))
    for (figures,) in found.values():
        assert len(figures["terms"]) == 5
        low, high = figures["overhead_quartiles"]
        assert -1 < low <= figures["overhead"] <= high


def test_arms_of_the_comparison_of_views_are_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tools/bench"))
    bench = importlib.import_module("learning_views")
    found = {}
    for experiment in bench.FULL.steps:
        for job in bench.jobs_of(experiment, bench.FULL, tmp_path):
            mix = build_model(build(RunConfig, job.tree))[1]
            found[experiment, job.arm, job.seed] = (len(mix.needs), job.tree["train"]["steps"], len(job.bank))
    assert len(found) == 3 * (5 + 3) and {seed for _, _, seed in found} == {0, 1, 2}
    assert [found["draws", f"{n} views", 0] for n in (2, 3, 4)] == [(n, 300, 4) for n in (2, 3, 4)]
    assert found["draws", bench.TWICE, 0] == (2, 600, 4)
    assert [found["modalities", f"{n} views", 0] for n in (2, 3, 4)] == [(n, 200, 1) for n in (2, 3, 4)]
    assert {a for pair in bench.COMPARED for a in pair} <= {arm for _, arm, _ in found}
