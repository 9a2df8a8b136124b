"""Parameter groups: how fast each part of a model learns, and what weight decay leaves alone."""

from __future__ import annotations

from typing import Any

from torch import nn

from mmcl.encoders.options import TowerCommon
from mmcl.encoders.parts import depths, undecayed
from mmcl.model import MultimodalModel


def parameter_groups(step: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """What learns, in groups of one ``weight_decay`` and one ``factor``, by which the schedule multiplies the rate.

    A tower's factor is its ``learning_rate_factor``, times its ``layer_decay`` once for each block that comes after;
    heads, temperatures and objectives have 1. Groups come in the order of their factors, highest first, decayed first.
    """
    factors = {}
    for module in step.modules():
        if isinstance(module, MultimodalModel):
            factors.update(_tower_factors(module))
    free = undecayed(step)
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in step.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((factors.get(id(parameter), 1.0), name in free), []).append(parameter)
    return [
        {"params": groups[key], "weight_decay": 0.0 if key[1] else weight_decay, "factor": key[0]}
        for key in sorted(groups, key=lambda key: (-key[0], key[1]))
    ]


def _tower_factors(model: MultimodalModel) -> dict[int, float]:
    found = {}
    for tower, options in model.options.towers.items():
        if not isinstance(options, TowerCommon) or (options.learning_rate_factor, options.layer_decay) == (1.0, 1.0):
            continue
        encoder = model.tower(tower)
        where, blocks = depths(encoder), len(encoder.blocks())
        for name, parameter in encoder.named_parameters():
            found[id(parameter)] = options.learning_rate_factor * options.layer_decay ** max(blocks - where[name], 0)
    return found
