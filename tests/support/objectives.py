"""An objective on random rows, without towers: what the numeric tests of objectives share."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mmcl.config import build as build_options
from mmcl.objectives import OBJECTIVES
from mmcl.objectives.base import Objective
from mmcl.types import Batch, Embeddings, TowerInfo
from support.exactness import TOWERS, make_batch

FROZEN = {name: dataclasses.replace(tower, trainable=name == "video") for name, tower in TOWERS.items()}
"""a student of video and two teachers"""


def build_objective(name: str, infos: Mapping[str, TowerInfo] = FROZEN, /, **options: Any) -> Any:
    """A float64 objective with weights from a fixed seed."""
    torch.manual_seed(3)
    entry = OBJECTIVES[name]
    return entry.build(build_options(entry.options, {"name": name, **options}), infos, path="objectives.4").double()


def embed(
    objective: Objective, batch: Batch, given: Mapping[str, Tensor] | None = None, seed: int = 8
) -> tuple[Embeddings, dict[tuple[str, str], Tensor]]:
    """Random rows (or ``given`` ones, by tower) for all needs, and the leaves by (tower, level)."""
    random = torch.Generator().manual_seed(seed)
    leaves, values = {}, {}
    for need in objective.needs:
        for level in need.levels:
            present = batch.views[need.view].present
            shape = {"pooled": (len(batch), 10), "joint": (len(batch), 6)}.get(level, (len(batch), 4, 10))
            x = torch.randn(shape, generator=random, dtype=torch.float64)
            x = (given or {}).get(need.tower, x) * present.view(-1, *[1] * (x.ndim - 1))
            leaf = leaves.setdefault((need.tower, level), x.detach().requires_grad_())
            values[need.tower, need.view, level, need.kind] = leaf
    return Embeddings(values, batch, {name: torch.tensor(8.0) for name in objective.scales}), leaves


def batch_for(objective: Objective, kind: str = "mixed", step: int = 0, rows: int = 12) -> Batch:
    return make_batch(list(dict.fromkeys(need.view for need in objective.needs)), step, kind, rows)
