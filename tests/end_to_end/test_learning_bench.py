"""The comparisons of ``tools/bench/learning.py``: one of them at its tiny size, from recordings to the JSON."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from support.recipes import ROOT


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
