"""Scores corrected by what other queries ask: transductive, figures of their own, never beside plain ones unmarked.

A plain query is answered alone. Here the answer depends on all test queries (dual and inverted softmax), or on a bank
of training queries (QB-norm), which take weight from gallery rows that everything finds.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
from torch import Tensor

from mmcl.distributed import Comm
from mmcl.evaluation.ranking import CUTOFF, RankResult, Relevant, Rows, Task, full_precision
from mmcl.evaluation.streaming import Transform, column_logsumexp
from mmcl.types import ConfigError

Method: TypeAlias = Literal["dual_softmax", "inverted_softmax", "qb_norm"]
BETA = 20.0


@torch.no_grad()
def transductive_ranks(
    queries: Rows,
    gallery: Rows,
    relevant: Relevant | None = None,
    *,
    method: Method,
    beta: float = BETA,
    bank: Rows | None = None,
    comm: Comm | None = None,
) -> RankResult:
    """:func:`~mmcl.evaluation.ranking.ranks` of corrected scores S', of scores S = queries · gallery.

    Args:
        method: ``dual_softmax``: S' = S · softmax of βS over the queries (Cheng et al. 2021, arXiv 2109.04290).
            ``inverted_softmax``: S' = S − log Σ exp(βS) / β over the queries, ordered as exp(βS) / Σ exp(βS) (Smith et
            al. 2017, arXiv 1702.03859). ``qb_norm``: that, with the sum over the ``bank``, for queries whose best
            gallery row is also the best of some query of the bank; the others as they are (Bogolin et al. 2022,
            arXiv 2112.12777, dynamic inverted softmax).
        beta: ≥ 0, multiplies the scores.
        bank: ``(K, D)`` unit rows of training queries, for ``qb_norm`` alone.

    Raises:
        ConfigError: as ``ranks``; a bank that is missing, or that the method has no use for; a negative β.
    """
    if (bank is None) == (method == "qb_norm"):
        raise ConfigError(f"{method}: " + ("needs a bank of training queries" if bank is None else "takes no bank"))
    if beta < 0:
        raise ConfigError(f"beta must not be negative, got {beta}")
    task = Task(queries, gallery, relevant)
    with full_precision(task.gallery.rows.device.type):
        change = _change(task, method, beta, bank)
    return task.rank(CUTOFF, both=False, comm=comm or Comm(), transform=change)[0]


def _change(task: Task, method: Method, beta: float, bank: Rows | None) -> Transform | None:
    asked, gallery = task.queries, task.gallery
    if beta == 0:
        return None
    if bank is None:
        prior = column_logsumexp(asked.rows, gallery.rows, asked.weights, beta)
        changed: Tensor | None = None
    else:
        banked = Task(bank, gallery.rows, [[]] * len(bank))
        prior = column_logsumexp(banked.queries.rows, gallery.rows, banked.queries.weights, beta)
        hubs = torch.zeros(len(gallery.rows), dtype=torch.bool, device=prior.device)
        plain = Task(asked.rows, gallery.rows, [[]] * len(asked.rows))
        firsts = [
            torch.from_numpy(each.rank(1, both=False, comm=Comm())[0].top_indices[:, 0]).to(prior.device)
            for each in (banked, plain)
        ]
        hubs[firsts[0]] = True
        changed = hubs[firsts[1]]

    def dual(tile: Tensor, row: int, column: int) -> None:
        part = prior[column : column + tile.shape[1]].to(tile.dtype)
        tile.mul_(tile.mul(beta).sub_(part).exp_())

    def inverted(tile: Tensor, row: int, column: int) -> None:
        part = (prior[column : column + tile.shape[1]] / beta).to(tile.dtype)
        where = 1.0 if changed is None else changed[row : row + len(tile), None].to(tile.dtype)
        tile.sub_(part * where)

    return dual if method == "dual_softmax" else inverted
