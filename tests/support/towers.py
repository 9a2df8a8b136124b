"""Towers as a configuration builds them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmcl.config import Options, build
from mmcl.encoders.build import TowerOptions, build_encoder


class _Holder(Options):
    tower: TowerOptions


def build_tower(**tower: Any) -> Any:
    return build_encoder(build(_Holder, {"tower": tower}).tower)


def gradients_missing(tower: Any, x: Tensor, mask: Tensor | None = None) -> list[str]:
    """Trainable parameters that a loss on ``pooled`` does not reach."""
    tower.train()
    tower.zero_grad(set_to_none=True)
    (tower(x, mask).pooled @ torch.linspace(-1, 1, tower.width)).pow(2).sum().backward()
    return [name for name, p in tower.named_parameters() if p.requires_grad and p.grad is None]
