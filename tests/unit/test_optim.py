"""LARS and SGD: the formula, what is left alone, and what a configuration chooses."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mmcl.recipe import AdamWOptions, LARSOptions, SGDOptions
from mmcl.training.optim import LARS, build_optimizer, scaled_gradient


def test_the_scaled_gradient() -> None:
    ones = torch.ones(2, 2, dtype=torch.float64)
    torch.testing.assert_close(scaled_gradient(ones, 0.5 * ones, 0.1, 1e-3), 1e-3 * ones, rtol=1e-7, atol=0)
    vector = torch.ones(3)
    torch.testing.assert_close(scaled_gradient(vector, 0.5 * vector, 0.0, 1e-3), 0.5 * vector)
    zero = torch.zeros(2, 2)
    torch.testing.assert_close(scaled_gradient(zero, zero + 1, 0.1, 1e-3), zero + 1)
    assert scaled_gradient(zero, zero, 0.1, 1e-3).isfinite().all()


def test_lars_is_its_formula_over_several_steps() -> None:
    torch.manual_seed(0)
    weight, bias = nn.Parameter(torch.randn(3, 2)), nn.Parameter(torch.randn(3))
    groups = [{"params": [weight], "weight_decay": 0.1}, {"params": [bias], "weight_decay": 0.0}]
    optimizer = LARS(groups, lr=0.5, momentum=0.9, trust=0.01)
    p, q = weight.detach().clone(), bias.detach().clone()
    velocity, bias_velocity = torch.zeros_like(p), torch.zeros_like(q)
    for step in range(4):
        g, h = torch.randn(3, 2), torch.randn(3)
        weight.grad, bias.grad = g.clone(), h.clone()
        for group in optimizer.param_groups:
            group["lr"] = 0.5 / (step + 1)
        optimizer.step()
        scale = 0.01 * p.norm() / (g.norm() + 0.1 * p.norm() + 1e-8)
        velocity = 0.9 * velocity + (g + 0.1 * p) * scale
        bias_velocity = 0.9 * bias_velocity + h
        p, q = p - 0.5 / (step + 1) * velocity, q - 0.5 / (step + 1) * bias_velocity
        torch.testing.assert_close(weight.detach(), p)
        torch.testing.assert_close(bias.detach(), q)


def test_lars_goes_on_from_its_state() -> None:
    def steps(module: nn.Module, optimizer: LARS, seeds: range) -> None:
        for seed in seeds:
            x = torch.randn(4, 3, generator=torch.Generator().manual_seed(seed))
            optimizer.zero_grad()
            module(x).square().sum().backward()
            optimizer.step()

    torch.manual_seed(0)
    whole, first = nn.Linear(3, 2), nn.Linear(3, 2)
    first.load_state_dict(whole.state_dict())
    steps(whole, LARS(whole.parameters(), lr=0.1), range(6))
    stopped = LARS(first.parameters(), lr=0.1)
    steps(first, stopped, range(3))
    resumed = LARS(first.parameters(), lr=0.1)
    resumed.load_state_dict(stopped.state_dict())
    steps(first, resumed, range(3, 6))
    for a, b in zip(whole.parameters(), first.parameters(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match="closure"):
        resumed.step(lambda: 0.0)


@pytest.mark.parametrize("options", [AdamWOptions(), SGDOptions(weight_decay=0.3), LARSOptions(weight_decay=0.3)])
def test_only_matrices_that_learn_are_decayed(options: AdamWOptions | SGDOptions | LARSOptions) -> None:
    module = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2), nn.Linear(2, 2).requires_grad_(False))
    optimizer = build_optimizer(module, options)
    assert type(optimizer).__name__.lower() == options.name
    decayed, free = optimizer.param_groups
    assert [p.ndim for p in decayed["params"]] == [2] and decayed["weight_decay"] == options.weight_decay
    assert [p.ndim for p in free["params"]] == [1, 1, 1] and free["weight_decay"] == 0
