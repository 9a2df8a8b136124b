"""Trackers and profiles of a real run: each really writes, without a network."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.launched import MMCL, environment
from support.recipes import TINY, tiny_overrides


def train(shards: Path, out: Path, *more: str, options: tuple[str, ...] = (), env: dict[str, str] | None = None) -> str:
    few = ("train.steps=3", "train.log_every=1", "train.checkpoint_every=3", "train.global_batch=8")
    command = [*MMCL, str(TINY), *tiny_overrides(*few, *more, shards=shards / "train", out=out), *options]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=200, check=False, cwd=out.parent, env=environment(env)
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout + done.stderr


@pytest.mark.slow
def test_tensorboard_wandb_and_trackio_write(shards_folder: Path, tmp_path: Path) -> None:
    """In one run: every figure of every step in event files, an offline folder and a local data base."""
    for module in ("tensorboard", "wandb", "trackio"):
        pytest.importorskip(module, reason=f"{module} is not installed")
    offline = {
        "WANDB_MODE": "offline",
        "TRACKIO_DIR": str(tmp_path / "trackio"),
        "HF_HUB_OFFLINE": "1",
        "HOME": str(tmp_path),
    }
    out = tmp_path / "run"
    train(shards_folder, out, "train.trackers=[tensorboard, wandb, trackio]", env=offline)
    last = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
    assert _tensorboard(out) == pytest.approx(last["loss"], rel=1e-6)
    assert len(list(out.glob("wandb/offline-run-*/*.wandb"))) == 1
    assert max(path.stat().st_size for path in out.glob("wandb/offline-run-*/*.wandb")) > 1000
    assert _trackio(tmp_path / "trackio", offline) == pytest.approx(last["loss"], rel=1e-6)
    assert not (tmp_path / "wandb").exists()


def _tensorboard(out: Path) -> float:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(out / "mmcl"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3]
    assert {"temperature/video-text", "effective_rank/video", "grad_norm/audio"} <= set(events.Tags()["scalars"])
    return float(events.Scalars("loss")[-1].value)


def _trackio(folder: Path, offline: dict[str, str]) -> float:
    code = (
        "import json; from trackio.sqlite_storage import SQLiteStorage as S; "
        "print(json.dumps([[m['step'], m['loss']] for m in S.get_logs('mmcl', 'run')]))"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ, **offline}
    )
    logged = json.loads(found.stdout.splitlines()[-1])
    assert [step for step, _ in logged] == [1, 2, 3] and (folder / "mmcl.db").exists()
    return float(logged[-1][1])


@pytest.mark.slow
def test_a_profile_says_where_a_step_goes(shards_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    more = ("train.steps=15", "train.log_every=4", "train.checkpoint_every=5")
    said = train(shards_folder, out, *more, options=("--profile",))
    assert "profile of 10 steps: " in said
    page = (out / "profile/profile.md").read_text()
    rows = dict(_row(line) for line in page.splitlines() if line.startswith("| ") and "---" not in line)
    parts = ("data wait", "forward: video", "forward: audio", "forward: text", "objectives", "backward", "optimizer")
    for part in (*parts, "logging", "checkpoint"):
        assert float(rows[part]) > 0, part
    assert rows["evaluation"] == rows["gradient cache"] == "–"
    assert any(name.startswith("aten::") for name in rows)
    trace = json.loads((out / "profile/trace.json").read_text())
    names = [event.get("name") for event in trace["traceEvents"]]
    assert names.count("mmcl: backward") == 10
    plain = tmp_path / "plain"
    train(shards_folder, plain, *more)
    kept = "checkpoints/step_00000015/model.safetensors"
    assert (out / kept).read_bytes() == (plain / kept).read_bytes()
    assert not (plain / "profile").exists()


def _row(line: str) -> tuple[str, str]:
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    return cells[0], cells[1]
