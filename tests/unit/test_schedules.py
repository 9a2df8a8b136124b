"""Learning rates over a run: where each schedule stands at its corners, and that all count in optimizer steps."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mmcl.config import build
from mmcl.recipe import AdamWOptions, SGDOptions
from mmcl.training.optim import build_optimizer, learning_rate_factor, warmup_steps
from mmcl.types import ConfigError

CORNERS = {
    "cosine": {0: 0.1, 9: 1.0, 10: 1.0, 55: 0.55, 100: 0.1},
    "linear": {0: 0.1, 9: 1.0, 10: 1.0, 55: 0.55, 100: 0.1},
    "constant": {0: 0.1, 9: 1.0, 55: 1.0, 100: 1.0},
    "wsd": {0: 0.1, 9: 1.0, 55: 1.0, 60: 1.0, 80: 0.55, 100: 0.1},
}


@pytest.mark.parametrize("schedule", CORNERS)
def test_each_schedule_at_its_corners(schedule: str) -> None:
    options = build(AdamWOptions, {"schedule": schedule, "warmup_steps": 10, "floor": 0.1, "decay_share": 0.4})
    found = {step: learning_rate_factor(step, options, steps=100) for step in CORNERS[schedule]}
    assert found == pytest.approx(CORNERS[schedule])


def test_schedules_differ_between_their_corners() -> None:
    at = {
        name: learning_rate_factor(30, build(AdamWOptions, {"schedule": name, "warmup_steps": 0}), steps=100)
        for name in CORNERS
    }
    assert at == pytest.approx({"cosine": 0.7939, "linear": 0.7, "constant": 1.0, "wsd": 1.0}, abs=1e-4)


def test_a_decay_that_would_begin_within_the_warm_up_begins_after_it() -> None:
    options = AdamWOptions(schedule="wsd", warmup_steps=50, decay_share=1.0)
    assert learning_rate_factor(49, options, steps=100) == 1.0
    assert learning_rate_factor(75, options, steps=100) == 0.5


def test_a_warm_up_in_samples_is_rounded_up_to_steps() -> None:
    options = AdamWOptions(warmup_samples=100, warmup_steps=3)
    assert [warmup_steps(options, rows) for rows in (10, 32, 64, 100, 1000)] == [10, 4, 2, 1, 1]
    assert learning_rate_factor(0, options, steps=50, samples_per_step=32) == 0.25
    assert learning_rate_factor(0, AdamWOptions(warmup_samples=0), steps=50) == 1.0


def test_nesterov_looks_ahead() -> None:
    weights = []
    for nesterov in (False, True):
        module = nn.Linear(2, 1, bias=False)
        nn.init.ones_(module.weight)
        optimizer = build_optimizer(
            module, SGDOptions(learning_rate=0.1, momentum=0.5, nesterov=nesterov, weight_decay=0)
        )
        module(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        weights.append(module.weight.detach()[0, 0])
    torch.testing.assert_close(torch.stack(weights), torch.tensor([0.9, 0.85]))
    with pytest.raises(ConfigError, match="nesterov looks ahead along the momentum"):
        build(SGDOptions, {"nesterov": True, "momentum": 0.0})
