"""Each shipped configuration of an objective trains on the generated clips: 20 steps, finite, and the teacher stays."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from support.recipes import ROOT, tiny_config

import mmcl
from mmcl.model import MultimodalModel
from mmcl.recipe import build_model
from mmcl.training.launch import pretrain

QUICK = [
    "data.decoder=pyav",
    "data.in_process=true",
    "train.threads=1",
    "train.log_every=1",
    "train.checkpoint_every=20",
]
TAUGHT = ("compositional_distillation", "contrastive_distillation", "distillation")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with the towers of ``tiny_cpu.yaml``, not trained: what counts here is that it stays as it is."""
    torch.manual_seed(5)
    sizes = ("model.towers.audio.width=64", "model.towers.audio.seconds=1.0")
    return build_model(tiny_config(*sizes))[0].save_pretrained(tmp_path_factory.mktemp("teacher"))


@pytest.mark.parametrize(
    "name",
    [TAUGHT[0], *(pytest.param(name, marks=pytest.mark.slow) for name in (*TAUGHT[1:], "mutual"))],
)
def test_it_trains(name: str, shards_folder: Path, teacher: Path, tmp_path: Path) -> None:
    places = [f"data.shards={shards_folder / 'train'}", f"train.out={tmp_path / 'run'}"]
    taught = [f"model.weights.audio={teacher}"] if name in TAUGHT else []
    pretrain(mmcl.load_config(ROOT / f"configs/pretrain/{name}.yaml", [*QUICK, *places, *taught]), resume=None)
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 21))
    assert all(math.isfinite(value) for line in lines for value in line.values())
    first, last = (sum(line["loss"] for line in part) for part in (lines[:5], lines[-5:]))
    if name != "contrastive_distillation":  # whose banks fill, and grow harder, meanwhile
        assert last < first
    if name in TAUGHT:
        trained, before = (MultimodalModel.from_pretrained(path) for path in (tmp_path / "run", teacher))
        for p, q in zip(trained.towers["audio"].parameters(), before.towers["audio"].parameters(), strict=True):
            assert torch.equal(p, q)


@pytest.mark.slow
def test_cross_modal_with_a_sigmoid_and_several_captions_trains(shards_folder: Path, tmp_path: Path) -> None:
    chosen = ["estimator=siglip", "captions=2", "shared_temperature=true", "hard_quantile=0.5"]
    places = {"shards": shards_folder / "train", "out": tmp_path / "run"}
    settings = ["train.steps=20", "train.log_every=1", *(f"objectives.0.{option}" for option in chosen)]
    pretrain(tiny_config(*settings, **places), resume=None)
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert all(math.isfinite(value) for line in lines for value in line.values())
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert "temperature/shared-siglip" in lines[0] and "temperature/video-text" not in lines[0]
    assert abs(lines[0]["temperature"] - 0.1) < 0.01
