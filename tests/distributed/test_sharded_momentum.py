"""Momentum copies of sharded weights (FSDP2, gloo) are those of one process, and so is the training around them."""

from __future__ import annotations

import pytest
import torch
from support.exactness import pick_rows
from support.gloo import GlooPool
from support.view_methods import make
from torch import Tensor, nn

from mmcl.encoders.shared import SharedOptions
from mmcl.encoders.text import TinyTextOptions
from mmcl.encoders.video import TinyVideoOptions
from mmcl.model import ModelOptions, MultimodalModel
from mmcl.objectives import cross_modal
from mmcl.objectives.base import ObjectiveMix
from mmcl.recipe import AdamWOptions
from mmcl.training.momentum import advance
from mmcl.training.optim import build_optimizer, set_learning_rate
from mmcl.training.step import TrainStep
from mmcl.types import Batch, View, ViewBatch

ROWS, STEPS = 8, 3


def build_step() -> TrainStep:
    """A text tower, and a video tower that pictures share, by blocks of its own rates; momentum of both names."""
    torch.manual_seed(3)
    video = TinyVideoOptions(width=8, channels=8, size=16, frames=2, layer_decay=0.9, lock=6)
    towers = {
        "video": video,
        "image": SharedOptions(tower="video", frames=1),
        "text": TinyTextOptions(width=16, depth=2, checkpoint_activations=True),
    }
    model = MultimodalModel(ModelOptions(towers=towers, joint_width=6))
    infos = model.tower_infos()
    objectives = {
        "cross_modal": cross_modal.build(cross_modal.CrossModalOptions(pairs=(("video", "text"),)), infos),
        "moco": make("intra_modal", "moco", {}, infos, tower="image"),
        "byol": make("persistency", "byol", {}, infos, tower="video"),
    }
    mix = ObjectiveMix(objectives, dict.fromkeys(objectives, 1.0))
    model.add_scales(mix.scales)
    model.serve(mix.needs)
    return TrainStep(model, mix).double()


def batch_of(step: int, views: tuple[View, ...]) -> Batch:
    random = torch.Generator().manual_seed(step)
    data = {}
    for view in views:
        present = torch.rand(ROWS, generator=random) > 0.2
        if view.modality == "text":
            ids = torch.randint(1, 60, (ROWS, 7), generator=random)
            data[view] = ViewBatch(ids, present, torch.ones_like(ids, dtype=torch.bool))
        else:
            frames = getattr(view.spec, "frames", 1)
            pixels = torch.randint(0, 256, (ROWS, frames, 3, 16, 16), dtype=torch.uint8, generator=random)
            data[view] = ViewBatch(pixels, present)
    keys = tuple(f"{step}-{i}" for i in range(ROWS))
    return Batch(data, keys, torch.arange(ROWS), torch.full((ROWS, 1), -1), torch.full((ROWS,), -1))


def shard(step: TrainStep) -> None:
    """As a launcher does: each block by itself, copies as what they copy, then the rest."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    for towers in (step.model.towers, step.model.momentum_towers):
        for name in ("video", "text"):
            if name in towers:
                for block in towers[name].blocks():  # type: ignore[operator]
                    fully_shard(block, mesh=mesh)
                fully_shard(towers[name], mesh=mesh)
    fully_shard(step, mesh=mesh, ignored_params=set(numbers(step)))


def numbers(step: nn.Module) -> list[nn.Parameter]:
    """Temperatures: single numbers cannot be split."""
    return [p for p in step.parameters() if p.ndim == 0]


def whole(tensor: Tensor) -> Tensor:
    gather = getattr(tensor, "full_tensor", None)
    return (gather() if gather is not None else tensor).detach().clone()


def train(rank: int, world: int) -> tuple[list[float], dict[str, Tensor], bool]:
    step = build_step()
    if world > 1:
        shard(step)
    optimizer = build_optimizer(step, AdamWOptions(learning_rate=0.01, epsilon=1e-3))
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    copies = nn.ModuleList([step.model.momentum_towers, step.model.momentum_heads])
    assert not held & {id(p) for p in copies.parameters()}
    views = tuple(dict.fromkeys(need.view for need in step.mix.needs))
    losses = []
    for number in range(STEPS):
        set_learning_rate(optimizer, 0.01)
        term = step(pick_rows(batch_of(number, views), torch.arange(rank, ROWS, world)))
        torch.autograd.backward(term.loss)
        for parameter in numbers(step):
            if world > 1 and parameter.grad is not None:
                torch.distributed.all_reduce(parameter.grad)
                parameter.grad.div_(world)
        optimizer.step()
        optimizer.zero_grad()
        step.mix.commit(term.pending)
        advance([*step.model.ema_pairs(), *step.mix.ema_pairs()], 0.9)
        losses.append(float(term.loss.detach()))
    sharded = all(hasattr(p, "full_tensor") for p in copies.parameters())
    return losses, {name: whole(value) for name, value in step.state_dict().items()}, sharded


@pytest.mark.slow
def test_sharded_copies_follow_as_whole_ones_do(gloo: GlooPool) -> None:
    losses, wanted, sharded = train(0, 1)
    start = {name: value.clone() for name, value in build_step().state_dict().items()}
    moved = {name for name in wanted if not torch.equal(wanted[name], start[name])}
    assert not sharded and {n.split(".")[2] for n in moved if "momentum_towers" in n} == {"video"}
    for found, state, is_sharded in gloo(2, train):
        assert is_sharded, "each rank holds a part of each copy"
        torch.testing.assert_close(torch.tensor(found), torch.tensor(losses), rtol=1e-6, atol=0)
        for name, value in wanted.items():
            torch.testing.assert_close(state[name], value, rtol=1e-7, atol=1e-9, msg=name)
