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


def subject(options: dict[str, Any]) -> Subject:
    entry = OBJECTIVES[options["name"]]
    objective = entry.build(build_options(entry.options, options), FROZEN)
    return Subject(ObjectiveMix({"it": objective}, {"it": 0.5}), FROZEN)


@pytest.mark.parametrize(
    "options",
    [
        {"teachers": ("audio", "text"), "classes": 3},
        {"teachers": ("audio",), "level": "joint", "alignment": "jensen_shannon"},
    ],
    ids=["two teachers with labels", "one teacher without labels"],
)
def test_compositional_distillation_is_exact(gloo: GlooPool, options: dict[str, Any]) -> None:
    record = assert_exact(gloo, functools.partial(subject, {"name": "compositional_distillation", **options}))
    assert record.losses[0] > 0.1 and record.losses[-1] == 0
    assert record.metrics[3]["it/pairs/audio"] == 0 < record.metrics[0]["it/pairs/audio"]
    assert not any(name.startswith(("towers.audio", "towers.text")) for name in record.gradients[0])
    for name, gradient in record.gradients[0].items():
        assert gradient.norm() > 1e-6, name
    assert not any(gradient.any() for gradient in record.gradients[-1].values())
