"""Evaluation in a run: its figures are those of ``mmcl evaluate``, the training does not notice, time is kept to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.recipes import tiny_config
from support.shards import read_shards, write_shards

from mmcl.distributed import Comm
from mmcl.evaluation.run import evaluate_checkpoint
from mmcl.recipe import RunConfig
from mmcl.training.during import Evaluator, untouched
from mmcl.training.launch import pretrain
from mmcl.types import ConfigError


def config(shards: Path, out: Path, *overrides: str) -> RunConfig:
    few = ("train.steps=6", "train.log_every=4", "train.checkpoint_every=3", "train.global_batch=8")
    return tiny_config(*few, "train.keep_checkpoints=9", *overrides, shards=shards / "train", out=out)


def metrics(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def weights(out: Path, step: int = 6) -> dict[str, torch.Tensor]:
    return load_file(out / f"checkpoints/step_{step:08d}/model.safetensors")


@pytest.fixture(scope="module")
def labelled_shards(shards_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The test clips, of two classes, by the length of their colour's name."""
    samples = read_shards(shards_folder / "test")
    for members in samples.values():
        facts = json.loads(members["json"])
        members["json"] = json.dumps({**facts, "label": len(str(facts["group"])) % 2}).encode()
    folder = tmp_path_factory.mktemp("labelled")
    write_shards(folder, samples, max_count=5)
    return folder


@pytest.fixture(scope="module")
def evaluated(shards_folder: Path, labelled_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with dropout that is evaluated after steps 2, 4 and 6, and keeps an average."""
    out = tmp_path_factory.mktemp("evaluated") / "run"
    places = [f"evaluate.shards={labelled_shards}", f"evaluate.knn_shards={labelled_shards}"]
    often = ["evaluate.every_steps=2", "evaluate.max_share=1.0", "evaluate.workers=0", "train.ema={decay: 0.5}"]
    best = ["train.best={metric: eval/mean_R@1, mode: max}"]
    pretrain(config(shards_folder, out, *places, *often, *best, "model.towers.video.drop_path=0.3"))
    return out


def test_the_training_does_not_notice(shards_folder: Path, evaluated: Path, tmp_path: Path) -> None:
    pretrain(config(shards_folder, tmp_path / "run", "train.ema={decay: 0.5}", "model.towers.video.drop_path=0.3"))
    left, right = weights(evaluated), weights(tmp_path / "run")
    assert all(torch.equal(left[name], right[name]) for name in right)


def test_figures_are_those_of_the_command(evaluated: Path, labelled_shards: Path, tmp_path: Path) -> None:
    """Of the moving average, at each evaluated step."""
    lines = {line["step"]: line for line in metrics(evaluated)}
    assert [step for step, line in lines.items() if "eval/mean_R@1" in line] == [2, 4, 6]
    found = evaluate_checkpoint(
        evaluated / "checkpoints/step_00000004/ema", str(labelled_shards), tmp_path / "report", clips=1, workers=1
    )
    directions = found.report.headline.directions
    assert len(directions) == 6
    for name, direction in directions.items():
        for figure in ("R@1", "R@5", "R@10", "MedR"):
            assert lines[4][f"eval/{name}/{figure}"] == pytest.approx(direction.metrics[figure])
    mean = sum(each.metrics["R@1"] for each in directions.values()) / 6
    assert lines[4]["eval/mean_R@1"] == pytest.approx(mean)
    # the bank are the samples themselves: each is its own nearest neighbour
    assert lines[4]["eval/knn/video/top-1"] > 50
    assert "eval/knn/audio/top-1" in lines[4] and lines[4]["eval/seconds"] > 0


def test_the_best_checkpoint_is_that_of_the_best_evaluation(evaluated: Path) -> None:
    hits = {line["step"]: line["eval/mean_R@1"] for line in metrics(evaluated) if "eval/mean_R@1" in line}
    best = max(hits, key=lambda step: (hits[step], -step))
    assert (evaluated / "checkpoints/best").read_text().strip() == f"step_{best:08d}"
    # a checkpoint is there for each evaluation, whatever train.checkpoint_every says
    assert {2, 3, 4, 6} == {int(path.name[5:]) for path in (evaluated / "checkpoints").glob("step_*")}


def test_time_is_kept_to(shards_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    places = [f"evaluate.shards={shards_folder / 'test'}", "evaluate.every_steps=1"]
    evaluator = Evaluator(config(shards_folder, tmp_path, *places, "evaluate.max_share=0.25"), Comm(), sharded=False)
    assert [evaluator.due(step) for step in (1, 2, 6)] == [True] * 3
    now = evaluator._began
    evaluator._clock = lambda: now + 30.0
    assert evaluator.affordable(samples_per_second=0.8)  # 8 samples take 10 s: 10 of 40
    assert not evaluator.affordable(samples_per_second=0.79)
    assert "evaluation skipped: with it 25% of the time" in capsys.readouterr().err
    evaluator._spent_seconds = evaluator._cost_seconds = 6.0
    assert not evaluator.affordable(samples_per_second=100)  # 12 of 36
    evaluator._clock = lambda: now + 42.0
    assert evaluator.affordable(samples_per_second=100)  # 12 of 48


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["train.best={metric: eval/mean_R@1, mode: max}"], r"train\.best\.metric: 'eval/mean_R@1' needs evaluate\.sh"),
        (["evaluate.knn_shards=somewhere"], r"evaluate\.knn_shards: needs evaluate\.shards"),
        (["evaluate.shards=nowhere"], "nowhere"),
    ],
)
def test_what_cannot_be_evaluated_is_said(
    shards_folder: Path, tmp_path: Path, overrides: list[str], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        Evaluator(config(shards_folder, tmp_path, *overrides), Comm(), sharded=False)


def test_random_numbers_and_modes_are_put_back() -> None:
    model = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Dropout().eval())
    torch.manual_seed(0)
    wanted = torch.rand(3)
    torch.manual_seed(0)
    with untouched(model):
        torch.rand(5)
        model.eval()
    assert torch.equal(torch.rand(3), wanted)
    assert [part.training for part in model.modules()] == [True, True, False]
