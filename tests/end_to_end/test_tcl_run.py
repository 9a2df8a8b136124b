"""A run of all five terms of tcl: two processes and micro-batches give its losses, a resume its very bits."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.recipes import ROOT

import mmcl
from mmcl.training.checkpoint import find_checkpoint, load_tensors
from mmcl.training.launch import pretrain

CONFIG = ROOT / "configs/pretrain/tcl.yaml"
SIZES = (
    "model.towers.text.dropout=0",
    "objectives.0.queue=20",
    "objectives.0.ramp_batches=4",
    "objectives.0.fusion.chunk=7",
    "data.decoder=pyav",
    "data.in_process=true",
    "train.threads=1",
    "train.steps=6",
    "train.global_batch=8",
    "train.log_every=1",
    "train.checkpoint_every=3",
)


def settings(shards: Path, out: Path, *more: str) -> list[str]:
    return [*SIZES, f"data.shards={shards / 'train'}", f"train.out={out}", *more]


def train(shards: Path, out: Path, *more: str, resume: str | None = None) -> Path:
    pretrain(mmcl.load_config(CONFIG, settings(shards, out, *more)), resume=resume)
    return out


def logged(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def assert_close(out: Path, reference: Path) -> None:
    ours, theirs = logged(out), logged(reference)
    assert len(ours) == len(theirs) == 6
    for line, wanted in zip(ours, theirs, strict=True):
        for name, value in wanted.items():
            if name == "loss" or name.startswith("tcl/"):
                assert line[name] == pytest.approx(value, rel=1e-4), (line["step"], name)


@pytest.mark.slow
def test_processes_micro_batches_and_a_resume_change_nothing(shards_folder: Path, tmp_path: Path) -> None:
    one = train(shards_folder, tmp_path / "one")
    assert all(logged(one)[3][f"tcl/loss/{term}/video-text"] > 0.01 for term in ("cma", "imc", "lmi", "itm", "mlm"))
    assert_close(train(shards_folder, tmp_path / "cached", "train.micro_batch=4"), one)

    launch = ["-m", "accelerate.commands.launch", "--config_file", str(ROOT / "configs/accelerate/cpu_2.yaml")]
    arguments = settings(shards_folder, tmp_path / "two", "train.processes=2")
    done = subprocess.run(
        [sys.executable, *launch, str(ROOT / "pipelines/pretrain.py"), str(CONFIG), *arguments],
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert_close(tmp_path / "two", one)

    checkpoint = str(one / "checkpoints/step_00000003")
    again = train(shards_folder, tmp_path / "again", resume=checkpoint)
    for name in ("model", "objectives"):
        first, second = (load_tensors(find_checkpoint(out) / f"{name}.safetensors") for out in (one, again))  # type: ignore[operator]
        assert first.keys() == second.keys()
        for key, value in first.items():
            assert torch.equal(value, second[key]), key
    assert int(first["objectives.tcl.pairs.video-text.queue.keys.0.filled"]) == 20
