"""FSDP2 on two ranks is the one-process run: losses, gradients, steps, checkpoints that go from one to the other."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from support.gloo import GlooPool
from support.objectives import tower_batch
from support.recipes import tiny_config
from torch import Tensor
from torch.distributed.tensor import DTensor

from mmcl.distributed.sharded import read_sharded, write_sharded
from mmcl.recipe import build_model
from mmcl.training.grad_cache import rows_of
from mmcl.training.momentum import advance
from mmcl.training.nonfinite import total_norm
from mmcl.training.sharding import average_whole_gradients, load_state_tensors, local, shard, state_tensors
from mmcl.training.step import TrainStep
from mmcl.types import Batch, View

STEPS = 3
SETS = "objectives.0.pairs=[[video, text], [text, video+audio]]"
MOMENTUM = "objectives=[{name: cross_modal}, {name: intra_modal, tower: video, method: {name: moco, queue: 16}}]"


def build(world: int, *overrides: str) -> tuple[TrainStep, torch.optim.Optimizer]:
    torch.manual_seed(0)
    step = TrainStep(*build_model(tiny_config(*overrides)))
    if world > 1:
        shard(step, torch.device("cpu"))
    return step, torch.optim.AdamW([p for p in step.parameters() if p.requires_grad], lr=1e-2, eps=1e-3)


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def batch_of(step: TrainStep, number: int) -> Batch:
    """Eight rows; the same for every view of a tower but turned round, and in another order each time."""
    batch, order = tower_batch(step.model, 8), torch.randperm(8, generator=torch.Generator().manual_seed(number))
    views = {need.view: batch.views[View(need.view.spec)] for need in step.mix.needs}
    views = {
        view: dataclasses.replace(given, data=given.data.flip(-1) if view.copy else given.data)
        for view, given in views.items()
    }
    return dataclasses.replace(batch, views=views).map(lambda x: x[order])


def steps(
    step: TrainStep, optimizer: torch.optim.Optimizer, rank: int, world: int, numbers: range
) -> list[tuple[float, float, dict[str, Tensor]]]:
    """Loss, gradient norm and gradients of each; every second row is of rank 1."""
    found = []
    for number in numbers:
        batch = rows_of(batch_of(step, number), slice(rank, None, world))
        optimizer.zero_grad()
        term: Any = step(batch, optimizer_step=number)
        term.loss.backward()
        if world > 1:
            average_whole_gradients(step)
        learning = [(name, p.grad) for name, p in step.named_parameters() if p.grad is not None]
        norm = total_norm([gradient for _, gradient in learning])
        found.append((float(term.loss.detach()), float(norm), {name: whole(gradient) for name, gradient in learning}))
        optimizer.step()
        step.mix.commit(term.pending)
        advance(step.model.ema_pairs() + step.mix.ema_pairs(), 0.9)
    return found


def run(rank: int, world: int, folder: str | None, *overrides: str) -> tuple[list[Any], dict[str, Tensor], int]:
    """Three steps; a checkpoint after the second of them."""
    step, optimizer = build(world, *overrides)
    found = steps(step, optimizer, rank, world, range(2))
    if folder is not None:
        write_sharded(Path(folder), state_tensors(step, optimizer))
    found += steps(step, optimizer, rank, world, range(2, STEPS))
    own = sum(local(p).numel() for p in step.parameters())
    return found, {name: whole(value) for name, value in state_tensors(step, optimizer).items()}, own


def resume(rank: int, world: int, folder: str, *overrides: str) -> dict[str, Tensor]:
    """The third step, from the checkpoint."""
    step, optimizer = build(world, *overrides)
    tensors = state_tensors(step, optimizer)
    read_sharded(Path(folder), tensors, alone=world == 1)
    load_state_tensors(step, optimizer, tensors)
    steps(step, optimizer, rank, world, range(2, STEPS))
    return {name: whole(value) for name, value in state_tensors(step, optimizer).items()}


def assert_close(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    largest = torch.stack([value.double().norm() for value in wanted.values()]).max()
    for name, value in wanted.items():
        off = (found[name].double() - value.double()).norm()
        assert off <= 1e-4 * value.double().norm() + 1e-6 * largest, f"{name} is off by {float(off):.2e}"


@pytest.mark.parametrize(
    "overrides", [(), *(pytest.param((more,), marks=pytest.mark.slow) for more in (MOMENTUM, SETS))]
)
def test_two_ranks_with_half_of_everything_are_one(gloo: GlooPool, tmp_path: Path, overrides: tuple[str, ...]) -> None:
    alone, state, everything = run(0, 1, None, *overrides)
    ranks = gloo(2, run, str(tmp_path / "sharded"), *overrides)
    for found, held, own in ranks:
        assert own <= 0.6 * everything, "a rank holds its half"
        for (loss, norm, gradients), (wanted, wanted_norm, others) in zip(found, alone, strict=True):
            assert loss == pytest.approx(wanted, rel=1e-5)
            assert norm == pytest.approx(wanted_norm, rel=1e-5)
            assert_close(gradients, others)
        assert_close(held, state)
    for again in gloo(2, resume, str(tmp_path / "sharded"), *overrides):
        assert all(torch.equal(again[name], value) for name, value in ranks[0][1].items())
    assert_close(resume(0, 1, str(tmp_path / "sharded"), *overrides), state)


def _unwritable(rank: int, world: int, folder: str) -> str:
    step, optimizer = build(world)
    try:
        write_sharded(Path(folder), state_tensors(step, optimizer))
    except OSError as error:
        return str(error)
    return ""


def test_all_ranks_learn_that_one_cannot_write(gloo: GlooPool, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert all(gloo(2, _unwritable, str(tmp_path / "file")))
