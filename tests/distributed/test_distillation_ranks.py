"""Distillation is the same on 1, 2 and 3 processes, and with holes or without those rows."""

from __future__ import annotations

import functools
from typing import Any

import pytest
from support.exactness import Subject, assert_exact
from support.gloo import GlooPool
from support.objectives import FROZEN

from mmcl.config import build as build_options
from mmcl.objectives import OBJECTIVES
from mmcl.objectives.base import ObjectiveMix


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
