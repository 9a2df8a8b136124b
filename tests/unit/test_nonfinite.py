"""A loss or gradient that is not finite changes nothing, is written down, and ends the run or costs the step."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.recipes import tiny_config

from mmcl.objectives.base import Term
from mmcl.recipe import RunConfig
from mmcl.training.launch import pretrain
from mmcl.training.step import TrainStep
from mmcl.types import RunError


def config(shards: Path, out: Path, *overrides: str) -> RunConfig:
    few = ("train.steps=6", "train.log_every=1", "train.checkpoint_every=1", "train.global_batch=8")
    return tiny_config(*few, "train.keep_checkpoints=9", *overrides, shards=shards / "train", out=out)


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """Optimizer steps, counted from 1, whose loss becomes NaN."""
    steps: set[int] = set()
    forward = TrainStep.forward

    def poison(self: TrainStep, batch: object, cache: object = None, optimizer_step: int | None = None) -> object:
        term = forward(self, batch, cache, optimizer_step)  # type: ignore[arg-type]
        if optimizer_step is not None and optimizer_step + 1 in steps:
            assert isinstance(term, Term)
            loss = term.loss * torch.nan
            return dataclasses.replace(term, loss=loss, metrics={**term.metrics, "cross_modal": loss.detach()})
        return term

    monkeypatch.setattr(TrainStep, "forward", poison)
    return steps


def test_the_batch_and_its_figures_are_written_down(shards_folder: Path, tmp_path: Path, poisoned: set[int]) -> None:
    poisoned.add(3)
    with pytest.raises(RunError, match=r"step 3: not finite: objective cross_modal"):
        pretrain(config(shards_folder, tmp_path / "run"))
    record = json.loads((tmp_path / "run/nonfinite/step_00000003.json").read_text())
    assert record["draws"] == list(range(16, 24))
    assert len(record["keys"]) == 8 and any(record["keys"])
    assert record["terms"][0]["cross_modal"] == record["terms"][0]["loss"] == "nan"
    assert isinstance(record["terms"][0]["negatives"], float)
    assert any(name.endswith("frame.0.weight") for name in record["gradients"])


def test_a_skipped_step_changes_nothing(shards_folder: Path, tmp_path: Path, poisoned: set[int]) -> None:
    poisoned.update({2, 3})
    out = tmp_path / "run"
    pretrain(config(shards_folder, out, "train.nonfinite=skip", "train.nonfinite_limit=2"))
    weights = {n: load_file(out / f"checkpoints/step_{n:08d}/model.safetensors") for n in (1, 3, 4)}
    assert all(torch.equal(weights[1][name], weights[3][name]) for name in weights[1])
    assert not all(torch.equal(weights[1][name], weights[4][name]) for name in weights[1])
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["nonfinite"] for line in lines] == [0, 1, 2, 2, 2, 2]
    assert lines[1]["loss"] == "nan"


def test_too_many_in_a_row_end_the_run(shards_folder: Path, tmp_path: Path, poisoned: set[int]) -> None:
    poisoned.update({1, 3, 4, 5})
    with pytest.raises(RunError, match=r"step 5: not finite: .*3 steps in a row, train\.nonfinite_limit: 2"):
        pretrain(config(shards_folder, tmp_path / "run", "train.nonfinite=skip", "train.nonfinite_limit=2"))
