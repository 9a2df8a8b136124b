"""The claim of the README, shortened: a run on two processes is that on one, gradient by gradient."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from support.launched import environment
from support.recipes import ROOT

BENCH = ROOT / "tools/bench"


@pytest.mark.slow
def test_two_processes_are_one_in_losses_gradients_and_retrieval(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(BENCH / "same_run.py"), "--quick", "--out", str(tmp_path / "out.json")],
        capture_output=True,
        text=True,
        check=False,
        timeout=250,
        env=environment(),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (line,) = json.loads((tmp_path / "out.json").read_text())["runs"]
    assert line["same"] and line["processes"] == 2
    assert line["loss"][1] < line["loss"][0]
