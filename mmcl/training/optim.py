"""Optimizers and the schedule; all steps are optimizer steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from mmcl.recipe import AdamWOptions, LARSOptions, OptimizerOptions, ScheduleOptions
from mmcl.training.groups import parameter_groups


class LARS(Optimizer):
    """SGD with momentum whose gradients are scaled, matrix by matrix, to the size of the weights.

    g ← (g + wd·p) · trust · ‖p‖ / (‖g‖ + wd·‖p‖ + 1e-8), for parameters of two axes and more; norms and biases take
    plain steps, and so does a matrix while it or its gradient is zero. The learning rate multiplies the momentum
    buffer, it does not enter it.

    Source: You et al. 2017 (arXiv 1708.03888), as Feichtenhofer et al. 2021 (arXiv 2104.14558) use it.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust: float = 1e-3,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust": trust})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step on the gradients that are there; ``closure`` is not supported."""
        if closure is not None:
            raise ValueError("LARS takes no closure")
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                gradient = scaled_gradient(parameter, parameter.grad, group["weight_decay"], group["trust"])
                state = self.state[parameter]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = gradient.clone()
                else:
                    state["momentum_buffer"].mul_(group["momentum"]).add_(gradient)
                parameter.sub_(state["momentum_buffer"], alpha=group["lr"])


def scaled_gradient(parameter: Tensor, gradient: Tensor, weight_decay: float, trust: float) -> Tensor:
    """What LARS puts into its momentum.

    >>> scaled_gradient(torch.ones(2, 2), torch.full((2, 2), 0.5), 0.1, 1e-3)[0, 0]
    tensor(0.0010)
    """
    decayed = gradient + weight_decay * parameter
    if parameter.ndim < 2:
        return decayed
    size, steepness = parameter.norm(), gradient.norm()
    scale = trust * size / (steepness + weight_decay * size + 1e-8)
    return decayed * torch.where((size > 0) & (steepness > 0), scale, 1.0)


def build_optimizer(step: nn.Module, options: OptimizerOptions) -> Optimizer:
    """With groups as :func:`~mmcl.training.groups.parameter_groups` makes them."""
    groups = parameter_groups(step, options.weight_decay)
    if isinstance(options, AdamWOptions):
        return AdamW(
            groups,
            lr=options.learning_rate,
            betas=(options.beta1, options.beta2),
            eps=options.epsilon,
            fused=True,  # one kernel over all, on CPUs too
        )
    if isinstance(options, LARSOptions):
        return LARS(groups, lr=options.learning_rate, momentum=options.momentum, trust=options.trust)
    return SGD(groups, lr=options.learning_rate, momentum=options.momentum, nesterov=options.nesterov)


def warmup_steps(options: ScheduleOptions, samples_per_step: int) -> int:
    """Optimizer steps of the warm-up.

    >>> warmup_steps(AdamWOptions(warmup_samples=100), 32)
    4
    """
    if options.warmup_samples is None:
        return options.warmup_steps
    return -(-options.warmup_samples // samples_per_step)


def learning_rate_factor(step: int, options: ScheduleOptions, *, steps: int, samples_per_step: int = 1) -> float:
    """What the learning rate is multiplied by in optimizer step ``step`` of ``steps``, counted from 0.

    >>> options = AdamWOptions(warmup_steps=2, schedule="linear", floor=0.2)
    >>> [round(learning_rate_factor(step, options, steps=6), 3) for step in (0, 1, 2, 4, 6)]
    [0.5, 1.0, 1.0, 0.6, 0.2]
    """
    warmup = warmup_steps(options, samples_per_step)
    if step < warmup:
        return (step + 1) / warmup
    start = warmup
    if options.schedule == "wsd":
        start = max(warmup, steps - round(options.decay_share * steps))
    progress = min(max(step - start, 0) / max(steps - start, 1), 1.0)
    if options.schedule == "constant":
        return 1.0
    left = 0.5 * (1 + math.cos(math.pi * progress)) if options.schedule == "cosine" else 1 - progress
    return options.floor + (1 - options.floor) * left


def set_learning_rate(optimizer: Optimizer, learning_rate: float) -> None:
    """Each group learns at its own multiple of this."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group["factor"]
