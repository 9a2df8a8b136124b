"""The optimizer and its schedule; all steps are optimizer steps."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.optim import AdamW, Optimizer

from mmcl.recipe import OptimizerOptions


def build_optimizer(step: nn.Module, options: OptimizerOptions) -> AdamW:
    """AdamW with weight decay on matrices and kernels alone: norms, biases and temperatures have fewer than 2 axes."""
    trainable = [parameter for parameter in step.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": options.weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    return AdamW(
        [group for group in groups if group["params"]],
        lr=options.learning_rate,
        betas=(options.beta1, options.beta2),
        eps=options.epsilon,
        fused=torch.cuda.is_available(),
    )


def learning_rate_factor(step: int, *, warmup_steps: int, steps: int) -> float:
    """Linear warm-up, then half a cosine to 0 at ``steps``; ``step`` counts from 0.

    >>> [round(learning_rate_factor(step, warmup_steps=2, steps=6), 3) for step in (0, 1, 2, 4, 6)]
    [0.5, 1.0, 1.0, 0.5, 0.0]
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(steps - warmup_steps, 1)
    return 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def set_learning_rate(optimizer: Optimizer, learning_rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
