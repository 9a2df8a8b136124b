"""What embeddings and gradients look like during a run, of logged steps alone; nothing of it reaches the loss."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from mmcl.distributed import Comm
from mmcl.evaluation.diagnostics import effective_rank
from mmcl.losses import alignment, uniformity
from mmcl.model import MultimodalModel
from mmcl.recipe import CollapseOptions
from mmcl.training.nonfinite import total_norm
from mmcl.types import Embeddings

ROWS = 1024
"""of a batch, over all ranks, that figures are of, at most"""


@torch.no_grad()
def embedding_figures(seen: Embeddings, comm: Comm) -> dict[str, float]:
    """Of the joint rows of each tower that learns (of what is before its head, where no objective uses the joint
    space), on its first view, over all ranks; every rank calls it.

    ``std/TOWER``: standard deviation of unit rows, a number each, times √D: 0 is a collapse, 1 a spread in all
    directions. ``effective_rank/TOWER``: see :func:`~mmcl.evaluation.diagnostics.effective_rank`.
    ``uniformity/TOWER`` and, over rows that have both, ``alignment/A-B``: Wang and Isola 2020 (arXiv 2005.10242).
    """
    rows = _rows_of_towers(seen, comm)
    figures: dict[str, float] = {}
    for tower, (values, present) in rows.items():
        own = values[present]
        if len(own) < 2:
            continue
        figures[f"std/{tower}"] = float(own.std(0).mean()) * own.shape[1] ** 0.5
        # the same singular values, from the smaller of the two products; where numbers are not finite there are none
        smaller = own if len(own) >= own.shape[1] else own.T
        figures[f"effective_rank/{tower}"] = effective_rank(smaller) if bool(own.isfinite().all()) else math.nan
        figures[f"uniformity/{tower}"] = float(uniformity(own))
    for (a, first), (b, second) in itertools.combinations(rows.items(), 2):
        both = first[1] & second[1]
        if bool(both.any()) and first[0].shape == second[0].shape:
            figures[f"alignment/{a}-{b}"] = float(alignment(first[0][both], second[0][both]))
    return figures


def _rows_of_towers(seen: Embeddings, comm: Comm) -> dict[str, tuple[Tensor, Tensor]]:
    """Unit rows ``(B, D)`` of all ranks, and which of them are there."""
    chosen: dict[str, Tensor] = {}
    masks: dict[str, Tensor] = {}
    for level in ("joint", "pooled"):
        for (tower, view, at, kind), values in seen.values.items():
            if at == level and kind == "online" and tower not in chosen:
                first = values if values.ndim == 2 else values[:, 0]  # of several texts of a sample
                chosen[tower], masks[tower] = first, seen.batch.views[view].present
    return {
        tower: (
            F.normalize(comm.gather(values.detach().float())[:ROWS], dim=-1),
            comm.gather(masks[tower])[:ROWS],
        )
        for tower, values in chosen.items()
    }


def gradient_norms(model: MultimodalModel) -> dict[str, float]:
    """``grad_norm/TOWER``: of each tower with its head, before clipping; every rank calls it."""
    norms = {}
    for name in model.towers:
        parts = itertools.chain(model.towers[name].parameters(), model.heads[name].parameters())
        gradients = [p.grad for p in parts if p.grad is not None]
        if gradients:
            norms[f"grad_norm/{name}"] = float(total_norm(gradients))
    return norms


class CollapseAlarm:
    """Says, once per tower, when its embeddings have been too much alike for some logged steps in a row."""

    def __init__(self, options: CollapseOptions) -> None:
        self.options = options
        self._in_a_row: dict[str, int] = {}

    def lines(self, step: int, figures: Mapping[str, float]) -> list[str]:
        """Takes in the figures of a logged step; a tower that recovered may be named again."""
        found = []
        bounds = {"std": self.options.std, "effective_rank": self.options.effective_rank}
        for name, value in figures.items():
            kind, _, tower = name.partition("/")
            if kind not in bounds:
                continue
            low = self._in_a_row[name] = self._in_a_row.get(name, 0) + 1 if value < bounds[kind] else 0
            if low == self.options.logs:
                found.append(
                    f"step {step}: the embeddings of tower {tower!r} collapse: {name} is {value:.3g}, below "
                    f"{bounds[kind]:g} (train.collapse.{kind}) in {low} logged steps in a row"
                )
        return found
