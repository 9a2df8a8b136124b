"""An objective on random rows, without towers: what the numeric tests of objectives share."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mmcl.config import build as build_options
from mmcl.model import MultimodalModel
from mmcl.objectives import OBJECTIVES
from mmcl.objectives.base import Objective
from mmcl.types import Batch, Embeddings, TowerInfo, View, ViewBatch
from support.exactness import TOWERS, learned_fusions, make_batch, texts_of

FROZEN = {name: dataclasses.replace(tower, trainable=name == "video") for name, tower in TOWERS.items()}
"""a student of video and two teachers"""

SHAPES = {"pooled": (10,), "joint": (6,), "joint_tokens": (4, 6), "tokens": (4, 10)}
"""of one row"""


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
            shape = (*texts_of(need.view), *SHAPES[level])
            x = torch.randn(len(batch), *shape, generator=random, dtype=torch.float64)
            x = (given or {}).get(need.tower, x) * present.view(-1, *[1] * (x.ndim - 1))
            leaf = leaves.setdefault((need.tower, level), x.detach().requires_grad_())
            values[need.tower, need.view, level, need.kind] = leaf
    return Embeddings(values, batch, {name: torch.tensor(8.0) for name in objective.scales}), leaves


def batch_for(objective: Objective, kind: str = "mixed", step: int = 0, rows: int = 12) -> Batch:
    return make_batch(list(dict.fromkeys(need.view for need in objective.needs)), step, kind, rows)


def tower_batch(model: MultimodalModel, rows: int = 4) -> Batch:
    """Random rows, all present, for three towers of a real model."""
    everyone = torch.ones(rows, dtype=torch.bool)
    video, audio, text = (model.tower(name).spec for name in ("video", "audio", "text"))
    random = torch.Generator().manual_seed(0)
    ids, mask = text.tokenizer([f"a caption {i}" for i in range(rows)])  # type: ignore[union-attr]
    views = {
        View(video): ViewBatch(
            torch.randint(0, 256, (rows, 2, 3, 32, 32), dtype=torch.uint8, generator=random), everyone
        ),
        View(audio): ViewBatch(torch.rand(rows, audio.samples, generator=random) - 0.5, everyone),  # type: ignore[union-attr]
        View(text): ViewBatch(ids, everyone, mask),
    }
    keys = tuple(str(i) for i in range(rows))
    return Batch(views, keys, torch.arange(rows), torch.full((rows, 1), -1), torch.full((rows,), -1))


def contrast_rows(objective: Objective, batch: Batch) -> Embeddings:
    """Random joint rows, leaves, of what is there; a temperature of its own for each scale, and learned fusions."""
    random = torch.Generator().manual_seed(8)
    values: dict[Any, Tensor] = {}
    for need in objective.needs:
        x = torch.randn(len(batch), 6, generator=random, dtype=torch.float64) * batch.views[need.view].present[:, None]
        values[need.tower, need.view, "joint", "online"] = x.requires_grad_()
    scales = {name: torch.tensor(5.0 + i, dtype=torch.float64) for i, name in enumerate(objective.scales)}
    fusions = {name: fusion.double() for name, fusion in learned_fusions(objective.fusions).items()}
    return Embeddings(values, batch, scales, dict(fusions))
