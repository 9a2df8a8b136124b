"""Each shipped configuration trains on the generated clips: 20 steps, finite, and frozen towers stay as they are."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from support.objective_cases import SWITCHES, ways
from support.recipes import ROOT, tiny_config
from support.shards import read_shards, write_shards

import mmcl
from mmcl.model import ModelOptions, MultimodalModel
from mmcl.objectives import OBJECTIVES
from mmcl.recipe import RunConfig, build_model
from mmcl.shards.questions import Question, Subtitle, write_member
from mmcl.shards.vectors import write_vector
from mmcl.training.launch import pretrain

CONFIGS = sorted(path.stem for path in ROOT.glob("configs/pretrain/*.yaml"))
FROM_PACKAGES = ("distill_video", "locked_towers")
"""recipes on pretrained weights: end_to_end/test_pretrained_recipes.py runs them"""
QUICK = [
    "train.steps=20",
    "train.global_batch=8",
    "train.log_every=1",
    "train.checkpoint_every=20",
    "train.threads=1",
    "data.decoder=pyav",
    "data.in_process=true",
]
IN_THE_DEFAULT_SUITE = ("compositional_distillation", "mutual")
GROWS_HARDER = ("contrastive", "moco", "mutual", "swav", "tcl")
"""parts of names: queues and banks fill meanwhile, prototypes begin to learn"""


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with the towers of ``tiny_cpu.yaml``, not trained: what counts here is that it stays as it is."""
    torch.manual_seed(5)
    sizes = ("model.towers.audio.width=64", "model.towers.audio.seconds=1.0")
    return build_model(tiny_config(*sizes))[0].save_pretrained(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def taught_shards(shards_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The training shards with an embedding ``sound`` of 32 numbers in all samples but one, and a question in each."""
    folder, random = tmp_path_factory.mktemp("taught"), np.random.default_rng(0)
    samples = read_shards(shards_folder / "train")
    for members in list(samples.values())[1:]:
        members["sound.npy"] = write_vector(random.normal(size=32))
    for number, members in enumerate(samples.values()):
        members["qa.json"] = write_member([_question(number, len(samples))])
    write_shards(folder, samples, max_count=5)
    return folder


def _question(number: int, count: int) -> Question:
    """Its answer is the same in all clips, so that a few steps learn it."""
    other = f"what is in clip {(number + 1) % count}"
    said = (Subtitle(0.0, 1.5, "a colour"), Subtitle(1.5, 3.0, "and a tone"))
    return Question(f"what is in clip {number}", ("yes", "no", "two", "one"), 1, said, (0.0, 1.0), "what", (other,))


def taught_by(model: ModelOptions) -> list[str]:
    """Towers that start from an earlier run."""
    return [name for name, tower in model.towers.items() if getattr(tower, "pretrained", None) is not None]


def quick(name: str, shards: Path, taught: Path, teacher: Path, out: Path) -> RunConfig:
    """The shipped file, small: 20 steps of 8 rows, pictures of 32 pixels."""
    path = ROOT / f"configs/pretrain/{name}.yaml"
    model = mmcl.load_config(path).model
    small = [
        f"model.towers.{tower}={{name: tiny_video, width: 32, channels: 16, size: 32, frames: 2, fps: 4}}"
        for tower, options in model.towers.items()
        if options.name == "tiny_video"
    ]
    stored = name == "video_qa" or any(options.name == "precomputed" for options in model.towers.values())
    weights = [f"model.towers.{tower}.pretrained={teacher}" for tower in taught_by(model)]
    places = [f"data.shards={taught if stored else shards / 'train'}", f"train.out={out}"]
    return mmcl.load_config(path, [*QUICK, *small, *weights, *places])


@pytest.mark.parametrize(
    "name",
    [
        name if name in IN_THE_DEFAULT_SUITE else pytest.param(name, marks=pytest.mark.slow)
        for name in CONFIGS
        if name not in FROM_PACKAGES
    ],
)
def test_it_trains(name: str, shards_folder: Path, taught_shards: Path, teacher: Path, tmp_path: Path) -> None:
    config = quick(name, shards_folder, taught_shards, teacher, tmp_path / "run")
    pretrain(config)
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 21))
    assert all(math.isfinite(value) for line in lines for value in line.values())
    first, last = (sum(line["loss"] for line in part) for part in (lines[:5], lines[-5:]))
    warm = config.train.optimizer.warmup_steps < 20
    if warm and not any(part in name for part in GROWS_HARDER):
        assert last < first
    trained = MultimodalModel.from_pretrained(tmp_path / "run")
    for tower in taught_by(config.model):
        before = MultimodalModel.from_pretrained(teacher).towers[tower]
        for p, q in zip(trained.towers[tower].parameters(), before.parameters(), strict=True):
            assert torch.equal(p, q)
    if name == "mutual":
        assert set(trained.momentum_towers) == {"video", "audio"}
        copies = zip(trained.towers.parameters(), trained.momentum_towers.parameters(), strict=True)
        assert any(not torch.equal(p, q) for p, q in copies)


def test_every_objective_and_every_method_has_one() -> None:
    """… so that adding an objective without a configuration is noticed."""
    listed = [x for name in CONFIGS for x in mmcl.load_config(ROOT / f"configs/pretrain/{name}.yaml").objectives]
    chosen = {(x.name, switch, getattr(way, "name", way)) for x in listed for switch, way in x if switch in SWITCHES}
    wanted = {(name, *way) for name, entry in OBJECTIVES.items() for way in ways(entry.options)}
    # the collection of distillers has one file, whose method is a word to change
    assert {way for way in wanted - chosen if way[0] != "distillation"} == set()
    assert {objective.name for objective in listed} == OBJECTIVES.keys()


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
