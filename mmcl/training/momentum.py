"""Momentum copies: one place advances those of towers and of heads, once per optimizer step."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

from mmcl.recipe import MomentumOptions


def momentum_at(step: int, steps: int, options: MomentumOptions) -> float:
    """The share that a copy keeps of itself in this optimizer step; ``step`` counts from 0.

    m(e) = 1 − (1 − m0)(1 + cos(πe / E)) / 2 (Grill et al. 2020, arXiv 2006.07733, section 3.3), or m0 throughout.

    >>> [round(momentum_at(step, 200, MomentumOptions(start=0.994)), 8) for step in (0, 50, 100, 200)]
    [0.994, 0.99487868, 0.997, 1.0]
    """
    if options.schedule == "constant":
        return options.start
    return 1 - (1 - options.start) * (1 + math.cos(math.pi * min(step / max(steps, 1), 1.0))) / 2


@torch.no_grad()
def advance(pairs: Iterable[tuple[nn.Module, nn.Module]], momentum: float) -> None:
    """Moves each copy towards its online module: parameters by 1 − ``momentum``, buffers become equal."""
    for online, copied in pairs:
        for source, target in zip(online.parameters(), copied.parameters(), strict=True):
            target.lerp_(source, 1 - momentum)
        for buffer, same in zip(online.buffers(), copied.buffers(), strict=True):
            same.copy_(buffer)
