"""The moving average of a model: its formula, its folder, and that a run with one goes on bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.recipes import tiny_config

import mmcl
from mmcl.evaluation.embed import default_clips
from mmcl.folders import model_folder
from mmcl.recipe import EmaOptions, RunConfig
from mmcl.training.average import WeightAverage
from mmcl.training.launch import pretrain
from mmcl.types import ConfigError


def config(shards: Path, out: Path, *overrides: str) -> RunConfig:
    few = ("train.steps=6", "train.log_every=1", "train.checkpoint_every=1", "train.global_batch=8")
    return tiny_config(
        *few, "train.keep_checkpoints=9", "train.ema={decay: 0.5, start_step: 2}", *overrides, shards=shards, out=out
    )


def weights(out: Path, step: int, part: str = "") -> dict[str, torch.Tensor]:
    return load_file(out / f"checkpoints/step_{step:08d}" / part / "model.safetensors")


@pytest.fixture(scope="module")
def finished(shards_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("averaged") / "run"
    pretrain(config(shards_folder / "train", out, "evaluate.clips=3"))
    return out


def test_it_is_its_formula_from_the_first_step_on(finished: Path) -> None:
    wanted = weights(finished, 2)
    for step in range(1, 7):
        own = weights(finished, step)
        found = weights(finished, step, "ema")
        wanted = own if step <= 2 else {name: 0.5 * value + 0.5 * own[name] for name, value in wanted.items()}
        assert found.keys() == own.keys()
        for name in found:
            torch.testing.assert_close(found[name], wanted[name], rtol=1e-6, atol=1e-7)
    assert any(not torch.equal(found[name], own[name]) for name in found)


def test_it_is_a_model_like_any_other(finished: Path) -> None:
    model = mmcl.MultimodalModel.from_pretrained(finished / "ema")
    for name, value in weights(finished, 6, "ema").items():
        assert torch.equal(model.state_dict()[name], value)
    assert model_folder(finished / "ema") == finished / "checkpoints/step_00000006/ema"
    assert default_clips(finished / "ema") == 3


def test_a_run_that_keeps_none_says_so(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "checkpoints/step_00000001").mkdir(parents=True)
    (tmp_path / "checkpoints/latest").write_text("step_00000001\n")
    (tmp_path / "checkpoints/step_00000001/config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"keeps no moving average; train\.ema"):
        model_folder(tmp_path / "ema")


def test_a_resumed_run_has_the_same_average(shards_folder: Path, finished: Path, tmp_path: Path) -> None:
    resumed = config(shards_folder / "train", tmp_path / "run")
    pretrain(resumed, resume=str(finished / "checkpoints/step_00000003"))
    for part in ("", "ema"):
        left, right = weights(tmp_path / "run", 6, part), weights(finished, 6, part)
        assert all(torch.equal(left[name], right[name]) for name in right)


def test_weights_come_back_bit_for_bit(finished: Path) -> None:
    model = mmcl.MultimodalModel.from_pretrained(finished)
    average = WeightAverage(model, EmaOptions())
    average.load(weights(finished, 6, "ema"))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(KeyError), average.in_place():
        within = {name: value.clone() for name, value in model.state_dict().items()}
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()  # as moving it does
        raise KeyError
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(value, average.values[name]) for name, value in within.items())
    with pytest.raises(ValueError, match="ema"):
        average.load({"nothing": torch.zeros(1)})
