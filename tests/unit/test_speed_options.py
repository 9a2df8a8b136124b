"""fp16's loss scale, fetching ahead, channels last: what they must leave as it is, and where they are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.recipes import tiny_config
from torch import nn
from torch.amp import GradScaler

from mmcl.encoders.slow import SlowOptions, SlowR50
from mmcl.recipe import RunConfig
from mmcl.training import launch, trainer
from mmcl.training.layout import channels_last
from mmcl.training.loss_scale import LossScale
from mmcl.training.prefetch import on_device, one_ahead
from mmcl.training.processes import build_accelerator
from mmcl.types import ConfigError


def config(shards: Path, out: Path, *overrides: str) -> RunConfig:
    few = ("train.steps=4", "train.log_every=1", "train.checkpoint_every=2", "train.global_batch=8")
    return tiny_config(*few, *overrides, shards=shards / "train", out=out)


def weights(out: Path, step: int = 4) -> dict[str, torch.Tensor]:
    return load_file(out / f"checkpoints/step_{step:08d}/model.safetensors")


def same(left: Path, right: Path) -> bool:
    a, b = weights(left), weights(right)
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def plain(shards_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("plain") / "run"
    launch.pretrain(config(shards_folder, out))
    return out


def scaled_run(
    monkeypatch: pytest.MonkeyPatch, shards: Path, out: Path, start: float, *overrides: str, resume: str | None = None
) -> None:
    """A run whose losses are scaled as those of fp16 are."""
    scale = lambda _: LossScale(GradScaler("cpu", init_scale=start, growth_interval=3))  # noqa: E731
    monkeypatch.setattr(trainer, "LossScale", scale)
    launch.pretrain(config(shards, out, *overrides), resume=resume)
    monkeypatch.undo()


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), ("train.micro_batch=2",)])
def test_a_scale_of_a_power_of_two_changes_nothing(
    shards_folder: Path, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: tuple[str, ...]
) -> None:
    out, other = tmp_path / "scaled", plain
    if more:
        other = tmp_path / "plain"
        launch.pretrain(config(shards_folder, other, *more))
    scaled_run(monkeypatch, shards_folder, out, 1024.0, *more)
    left, right = weights(out), weights(other)
    for name, value in left.items():
        torch.testing.assert_close(value, right[name], rtol=1e-5, atol=1e-7)
    state = json.loads((out / "checkpoints/step_00000004/state.json").read_text())
    assert state["loss_scale"]["scale"] == 2048 and state["loss_scale"]["_growth_tracker"] == 1


def test_a_step_that_overflows_is_counted_changes_nothing_and_halves_the_scale(
    shards_folder: Path, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    more = ("train.keep_checkpoints=9", "train.checkpoint_every=1", "objectives.0.weight=8")  # gradients above 1
    scaled_run(monkeypatch, shards_folder, out, 2.0**127, *more)
    states = [json.loads((out / f"checkpoints/step_{n:08d}/state.json").read_text()) for n in (1, 2, 3, 4)]
    skipped = [state["progress"]["overflowed"] for state in states]
    assert skipped[-1] < 4
    assert skipped[0] == 1 and states[0]["loss_scale"]["scale"] == 2.0**126
    assert states[0]["progress"]["nonfinite"] == 0
    assert not (out / "nonfinite").exists()
    start = weights(out, 1)
    for step, count in enumerate(skipped, start=1):
        moved = any(not torch.equal(value, start[name]) for name, value in weights(out, step).items())
        assert moved == (count < step)


@pytest.mark.slow
def test_the_scale_is_taken_up_again(shards_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scaled_run(monkeypatch, shards_folder, tmp_path / "whole", 64.0)
    scaled_run(
        monkeypatch, shards_folder, tmp_path / "b", 9.0, resume=str(tmp_path / "whole/checkpoints/step_00000002")
    )
    states = [
        json.loads((tmp_path / name / "checkpoints/step_00000004/state.json").read_text()) for name in ("whole", "b")
    ]
    assert states[0]["loss_scale"] == states[1]["loss_scale"] and states[0]["loss_scale"]["scale"] == 128
    assert same(tmp_path / "whole", tmp_path / "b")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_fp16_needs_a_gpu(shards_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.precision: fp16 needs a GPU"):
        launch.pretrain(config(shards_folder, tmp_path / "run", "train.precision=fp16"))


def test_tf32_is_as_the_configuration_says(shards_folder: Path, tmp_path: Path) -> None:
    before = (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32)
    try:
        for wanted in (True, False):
            build_accelerator(config(shards_folder, tmp_path, f"train.tf32={str(wanted).lower()}"))
            assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32) == (wanted, wanted)
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def test_one_ahead_keeps_the_order_and_begins_before_it_waits() -> None:
    events: list[tuple[str, int]] = []

    def begin(number: int) -> Callable[[], int]:
        events.append(("begin", number))
        return lambda: events.append(("ready", number)) or number  # type: ignore[func-returns-value]

    found = list(one_ahead(iter([1, 2, 3]), begin))  # type: ignore[arg-type]
    assert found == [1, 2, 3]
    assert events == [("begin", 1), ("begin", 2), ("ready", 1), ("begin", 3), ("ready", 2), ("ready", 3)]
    batches = iter([1, 2])
    assert on_device(batches, torch.device("cpu")) is batches  # type: ignore[comparison-overlap,arg-type]


def test_a_run_that_fetches_ahead_saves_the_position_of_its_steps(
    shards_folder: Path, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ahead(batches: object, device: object) -> object:
        return one_ahead(batches, lambda batch: lambda: batch)  # type: ignore[arg-type]

    monkeypatch.setattr(trainer, "on_device", ahead)
    launch.pretrain(config(shards_folder, tmp_path / "first"))
    state = json.loads((tmp_path / "first/checkpoints/step_00000002/state.json").read_text())
    assert state["stream"]["draws"] == state["progress"]["samples"] == 16
    launch.pretrain(
        config(shards_folder, tmp_path / "second"), resume=str(tmp_path / "first/checkpoints/step_00000002")
    )
    assert same(tmp_path / "first", plain) and same(tmp_path / "second", plain)


def test_channels_last_computes_the_same() -> None:
    torch.manual_seed(0)
    modules = [
        (SlowR50(SlowOptions(depth=(1, 1, 1, 1), channels=8, size=32)), torch.randint(256, (2, 8, 3, 32, 32)).byte()),
        (nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.Conv2d(8, 4, 3)), torch.randn(2, 3, 16, 16)),
    ]
    for module, x in modules:
        module.eval()
        state = {name: value.clone() for name, value in module.state_dict().items()}

        def out(module: nn.Module = module, x: torch.Tensor = x) -> torch.Tensor:
            found = module(x)
            return found if isinstance(found, torch.Tensor) else found.pooled

        before = out()
        channels_last(module)
        weight = next(p for p in module.parameters() if p.ndim >= 4 and p.shape[1] > 1 and p.shape[-1] > 1)
        assert not weight.is_contiguous()
        torch.testing.assert_close(out(), before, rtol=1e-4, atol=1e-5)
        assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())


@pytest.mark.slow
def test_a_run_with_channels_last_goes_on_bit_for_bit(shards_folder: Path, plain: Path, tmp_path: Path) -> None:
    for name, resume in (("whole", None), ("resumed", "whole/checkpoints/step_00000002")):
        launch.pretrain(
            config(shards_folder, tmp_path / name, "train.channels_last=true"),
            resume=None if resume is None else str(tmp_path / resume),
        )
    assert same(tmp_path / "whole", tmp_path / "resumed")
    for name, value in weights(tmp_path / "whole").items():
        torch.testing.assert_close(value, weights(plain)[name], rtol=1e-2, atol=1e-3)
