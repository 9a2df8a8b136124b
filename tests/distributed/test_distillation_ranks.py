"""Distillation is the same on 1, 2 and 3 processes, and with holes or without those rows."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from support.exactness import Subject, assert_exact, pick_rows
from support.gloo import GlooPool
from support.objectives import FROZEN, tower_batch
from support.recipes import tiny_config
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from mmcl.config import build as build_options
from mmcl.objectives import OBJECTIVES
from mmcl.objectives.base import ObjectiveMix
from mmcl.recipe import build_model
from mmcl.training.step import TrainStep


def subject(many: list[dict[str, Any]]) -> Subject:
    objectives = {}
    for number, options in enumerate(many):
        entry = OBJECTIVES[options["name"]]
        objectives[f"it{number or ''}"] = entry.build(build_options(entry.options, options), FROZEN)
    return Subject(ObjectiveMix(objectives, dict.fromkeys(objectives, 0.5)), FROZEN)


@pytest.mark.parametrize(
    "options",
    [
        {"teachers": ("audio", "text"), "classes": 3},
        {"teachers": ("audio",), "level": "joint", "alignment": "jensen_shannon"},
    ],
    ids=["two teachers with labels", "one teacher without labels"],
)
def test_compositional_distillation_is_exact(gloo: GlooPool, options: dict[str, Any]) -> None:
    record = assert_exact(gloo, functools.partial(subject, [{"name": "compositional_distillation", **options}]))
    assert record.losses[0] > 0.1 and record.losses[-1] == 0
    assert record.metrics[3]["it/pairs/audio"] == 0 < record.metrics[0]["it/pairs/audio"]
    assert not any(name.startswith(("towers.audio", "towers.text")) for name in record.gradients[0])
    for name, gradient in record.gradients[0].items():
        assert gradient.norm() > 1e-6, name
    assert not any(gradient.any() for gradient in record.gradients[-1].values())


TOKENS = ("tokens", "tokens")
FEATURES = [
    {"method": "knowledge_distillation", "classes": 3},
    {"method": "hint", "classes": 3, "strength": 1.0},
    {"method": "variational_information", "levels": (("pooled", "pooled"), ("joint", "joint"))},
    {"method": "activation_boundary", "strength": 1.0},
    {"method": "similarity_preserving", "strength": 1.0},
    {"method": "relational", "strength": 0.02},
    {"method": "probabilistic_transfer", "strength": 1.0},
    {"method": "correlation_congruence", "strength": 1.0},
]
MAPS = [
    {"method": "attention_transfer", "strength": 1.0},
    {"method": "factor_transfer", "strength": 1.0},
    {"method": "neuron_selectivity", "strength": 1.0},
    {"method": "hint", "levels": (TOKENS,), "strength": 1.0},
    {"method": "flow", "levels": (TOKENS, TOKENS), "strength": 1.0},
    {"method": "kdsvd", "levels": (TOKENS, TOKENS), "strength": 1.0},
]


@pytest.mark.parametrize("methods", [FEATURES, MAPS], ids=["features", "maps"])
def test_every_method_is_exact(gloo: GlooPool, methods: list[dict[str, Any]]) -> None:
    many = [{"name": "distillation", "teacher": "audio", **options} for options in methods]
    record = assert_exact(gloo, functools.partial(subject, many))
    for number, options in enumerate(methods):
        name = f"it{number or ''}"
        assert abs(record.metrics[0][f"{name}/loss/{options['method']}"]) > 1e-4, options
        assert record.metrics[3][f"{name}/loss/{options['method']}"] == 0, "no audio"
        assert record.metrics[-1][name] == 0
    assert not any(name.startswith("towers.audio") for name in record.gradients[0])
    assert not any(gradient.any() for gradient in record.gradients[-1].values())


def test_contrastive_distillation_is_exact(gloo: GlooPool) -> None:
    """Five slots: samples of one batch meet in one slot."""
    options = {"name": "contrastive_distillation", "teacher": "audio", "slots": 5, "negatives": 4, "width": 6}
    record = assert_exact(gloo, functools.partial(subject, [options]))
    assert record.losses[0] > 0.1 and record.losses[-1] == 0
    assert int(record.state["mix.objectives.it.steps"]) == len(record.losses)
    assert (record.state["mix.objectives.it.slot_keys"] >= 0).all()
    assert int(record.state["mix.objectives.it.z_is_fixed"]) == 1
    assert not any(gradient.any() for gradient in record.gradients[-1].values())


def real_model(rank: int, world: int, stages: bool) -> tuple[float, dict[str, Tensor]]:
    """Two steps of a real model under DDP, which waits for the gradient of every parameter that asks for one."""
    torch.manual_seed(0)
    towers = [
        "model.towers.guide={name: tiny_video, width: 48, channels: 16, size: 32, frames: 2, fps: 4, lock: with_head}"
    ]
    levels = "[['stage:early', 'stage:early'], ['stage:middle', 'stage:middle']]"
    one = f"{{name: distillation, method: flow, teacher: guide, levels: {levels}}}"
    other = "{name: compositional_distillation, teachers: [guide, audio]}"
    config = tiny_config(*towers, "model.towers.audio.lock=with_head", f"objectives=[{one if stages else other}]")
    model, mix = build_model(config)
    batch = tower_batch(model, 6)
    everything = TrainStep(model, mix)
    step = DistributedDataParallel(everything, broadcast_buffers=False) if world > 1 else everything
    loss = torch.zeros(())
    for _ in range(2):
        step.zero_grad()
        loss = step(pick_rows(batch, torch.arange(rank, 6, world))).loss
        loss.backward()
    return float(loss.detach()), {n: p.grad for n, p in everything.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("stages", [False, True], ids=["compositional", "flow of stages"])
def test_a_real_model_leaves_no_parameter_waiting(gloo: GlooPool, stages: bool) -> None:
    loss, gradients = real_model(0, 1, stages)
    assert any(name.startswith("model.towers.video") for name in gradients)
    assert not any(name.startswith(("model.towers.text", "model.towers.guide")) for name in gradients)
    for other, others in gloo(2, real_model, stages):
        assert other == pytest.approx(loss, rel=1e-5)
        assert others.keys() == gradients.keys()
        whole = torch.stack([g.norm() for g in gradients.values()]).norm()
        for name, gradient in gradients.items():
            assert (others[name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-6 * whole, name
