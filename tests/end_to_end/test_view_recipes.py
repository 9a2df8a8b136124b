"""What methods on views of one tower own is saved and taken up again, and is the same in micro-batches."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.recipes import ROOT, TINY, tiny_config, tiny_overrides

from mmcl.recipe import RunConfig
from mmcl.training.checkpoint import find_checkpoint, load_tensors
from mmcl.training.launch import pretrain
from mmcl.training.processes import build_accelerator
from mmcl.training.trainer import Trainer

MIX = (
    "objectives=[{name: cross_modal}, "
    "{name: intra_modal, tower: video, windows: different, method: {name: moco, queue: 40, hidden: 16, out: 8}}, "
    "{name: persistency, tower: audio, method: {name: byol, hidden: 16, out: 8, predictor_hidden: 8}}, "
    "{name: persistency, tower: video, rho: 3, method: {name: swav, hidden: 16, out: 8, prototypes: 6, queue: 24}}]"
)


def losses(out: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]


SIZES = ("train.steps=6", "train.log_every=1", "train.checkpoint_every=3", "train.global_batch=8")


def mixed(shards: Path, out: Path, *overrides: str) -> RunConfig:
    return tiny_config(MIX, *SIZES, *overrides, shards=shards / "train", out=out)


def test_a_mix_goes_on_bit_for_bit_and_micro_batches_change_nothing(shards_folder: Path, tmp_path: Path) -> None:
    pretrain(mixed(shards_folder, tmp_path / "whole"))
    pretrain(mixed(shards_folder, tmp_path / "part", "train.steps=6"))
    checkpoint = tmp_path / "part/checkpoints/step_00000003"
    pretrain(mixed(shards_folder, tmp_path / "resumed"), resume=str(checkpoint))
    for name in ("model", "objectives"):
        whole, again = (
            load_tensors(find_checkpoint(tmp_path / run) / f"{name}.safetensors")  # type: ignore[operator]
            for run in ("whole", "resumed")
        )
        assert whole.keys() == again.keys()
        for key, value in whole.items():
            assert torch.equal(value, again[key]), key
    assert any("queue.filled" in key for key in whole) and int(max(v for k, v in whole.items() if "filled" in k)) > 20
    pretrain(mixed(shards_folder, tmp_path / "cached", "train.micro_batch=3"))
    assert losses(tmp_path / "cached") == pytest.approx(losses(tmp_path / "whole"), rel=1e-4)
    assert len(set(losses(tmp_path / "whole"))) == 6


@pytest.mark.slow
def test_two_processes_with_micro_batches_equal_one(shards_folder: Path, tmp_path: Path) -> None:
    pretrain(mixed(shards_folder, tmp_path / "one"))
    launch = ["-m", "accelerate.commands.launch", "--config_file", str(ROOT / "configs/accelerate/cpu_2.yaml")]
    overrides = tiny_overrides(MIX, *SIZES, "train.micro_batch=3", shards=shards_folder / "train", out=tmp_path / "two")
    done = subprocess.run(
        [sys.executable, *launch, str(ROOT / "pipelines/pretrain.py"), str(TINY), *overrides, "train.processes=2"],
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)


def test_momentum_copies_follow_in_a_run(shards_folder: Path, tmp_path: Path) -> None:
    """One step moves a copy by 1 − m of what its tower moved; the optimizer does not know it."""
    config = mixed(shards_folder, tmp_path / "run", "train.momentum={start: 0.75, schedule: constant}")
    trainer = Trainer(config, build_accelerator(config))
    optimized = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    pairs = trainer.model.ema_pairs() + trainer.mix.ema_pairs()
    assert len(pairs) == 6, "two towers, their two heads, two projectors"
    before = [[p.clone() for p in copied.parameters()] for _, copied in pairs]
    trainer.optimizer_step([next(iter(trainer.stream))])
    moved = 0.0
    for (online, copied), old in zip(pairs, before, strict=True):
        for source, target, start in zip(online.parameters(), copied.parameters(), old, strict=True):
            torch.testing.assert_close(target, 0.75 * start + 0.25 * source)
            assert id(target) not in optimized
            moved += float((target - start).norm())
    assert moved > 0
