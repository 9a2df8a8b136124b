"""Contrast between modalities: clips of one sample attract, those of different samples repel (CLIP), pair by pair."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from typing import Annotated, Literal

import torch
from pydantic import Field

from mmcl.config import Options, unknown_name
from mmcl.distributed import Comm, contrastive
from mmcl.objectives.base import Objective, Term
from mmcl.objectives.weights import Weight
from mmcl.types import ConfigError, Embeddings, Need, TowerInfo, View


class CrossModalOptions(Options):
    """Symmetric InfoNCE between pairs of towers (Radford et al. 2021, arXiv 2103.00020), one temperature per pair."""

    name: Literal["cross_modal"] = "cross_modal"
    weight: Weight = 1.0
    pairs: Annotated[tuple[tuple[str, str], ...], Field(min_length=1)] | None = None
    """towers to contrast, e.g. ``[[video, text], [audio, text]]``; null: every pair of towers"""
    unpaired_negatives: bool = False
    """rows that have only one side of a pair are negatives of the others' pairs too"""
    mask_false_negatives: bool = True
    """samples of equal key, caption or group are never each other's negatives"""


class CrossModal(Objective):
    """The mean over pairs of the contrastive loss of their joint embeddings, exact over all ranks."""

    def __init__(self, options: CrossModalOptions, pairs: Mapping[str, tuple[Need, Need]]) -> None:
        super().__init__()
        self.options = options
        self.pairs = dict(pairs)
        self.needs = tuple(dict.fromkeys(need for pair in self.pairs.values() for need in pair))
        self.scales = tuple(self.pairs)

    def forward(self, embeddings: Embeddings, comm: Comm) -> Term:
        groups = embeddings.batch.groups if self.options.mask_false_negatives else None
        losses, metrics = [], {}
        for name, (a, b) in self.pairs.items():
            loss = contrastive(
                embeddings.get(a),
                embeddings.get(b),
                scale=embeddings.scales[name],
                comm=comm,
                present_a=embeddings.present(a.view),
                present_b=embeddings.present(b.view),
                groups=groups,
                unpaired_negatives=self.options.unpaired_negatives,
            )
            losses.append(loss)
            metrics[f"loss/{name}"] = loss.detach()
            metrics[f"pairs/{name}"] = comm.sum(embeddings.present(a.view, b.view).sum())
        return Term(torch.stack(losses).mean(), metrics)


def build(options: CrossModalOptions, towers: Mapping[str, TowerInfo], path: str = "objectives.0") -> CrossModal:
    """The objective for these towers.

    Raises:
        ConfigError: a pair names an unknown tower, one tower twice, or comes twice; or there is no pair.
    """
    if options.pairs is None and len(towers) < 2:
        raise ConfigError(f"{path}.pairs: cross_modal needs two towers, the model has {', '.join(towers) or 'none'}")
    pairs: dict[str, tuple[Need, Need]] = {}
    for number, (a, b) in enumerate(combinations(towers, 2) if options.pairs is None else options.pairs):
        where = f"{path}.pairs.{number}"
        for tower in (a, b):
            if tower not in towers:
                raise unknown_name(where, tower, towers)
        if a == b:
            raise ConfigError(f"{where}: a pair needs two towers, got {a!r} twice")
        if f"{a}-{b}" in pairs or f"{b}-{a}" in pairs:
            raise ConfigError(f"{where}: the pair {a!r}, {b!r} is already in the list")
        if towers[a].joint_width != towers[b].joint_width:
            raise ConfigError(
                f"{where}: {a!r} and {b!r} lie in spaces of different width, "
                f"{towers[a].joint_width} and {towers[b].joint_width}"
            )
        pairs[f"{a}-{b}"] = (_need(towers[a]), _need(towers[b]))
    return CrossModal(options, pairs)


def _need(tower: TowerInfo) -> Need:
    return Need(tower.name, View(tower.spec, clip=0), ("joint",))
