"""Video question answering from questions to scores: the picture is what answers them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from support.recipes import ROOT


@pytest.mark.slow
def test_answers_need_the_video(tmp_path: Path) -> None:
    """Trained with the picture it answers; without, or before black frames, it guesses among four."""
    out = tmp_path / "qa.json"
    command = [
        sys.executable, str(ROOT / "tools/bench/learning_qa.py"), "--quick", "--seeds", "1",
        "--arms", "answers", "texts alone", "--work", str(tmp_path / "work"), "--out", str(out),
    ]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True, text=True)
    arms = json.loads(out.read_text(encoding="utf-8"))["arms"]
    watching, reading = (arms[name] for name in ("answers", "texts alone"))
    assert watching["accuracy"]["mean"] >= reading["accuracy"]["mean"] + 30
    assert watching["accuracy"]["mean"] >= watching["black frames"]["mean"] + 30
    assert reading["accuracy"]["mean"] < 45 and watching["colour"] == watching["accuracy"]
