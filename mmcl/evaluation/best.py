"""Ranks in a gallery of groups, each of which scores as the best of its rows: a clip by the best of its captions."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from mmcl.distributed import Comm
from mmcl.evaluation.distinct import Integers, first_best
from mmcl.evaluation.ranking import (
    CUTOFF,
    RankResult,
    Relevant,
    Rows,
    Task,
    figure_columns,
    full_precision,
    split_columns,
)
from mmcl.evaluation.streaming import shared_sum

_ENTRIES = 1 << 22
"""scores that are held at a time"""
_BLOCK = 256


@torch.no_grad()
def ranks_by_best(
    queries: Rows,
    gallery: Rows,
    relevant: Relevant,
    groups: Integers,
    *,
    top: int = CUTOFF,
    comm: Comm | None = None,
) -> RankResult:
    """:func:`~mmcl.evaluation.ranking.ranks`, where a group of gallery rows is one answer and scores as its best row.

    The video→text of MSVD in CLIP4Clip (Luo et al. 2021, arXiv 2104.08860), with ties counted as everywhere here.

    Args:
        relevant: for each query the gallery rows that are right; their groups are.
        groups: int64 ``(M,)``: the group of each gallery row.

    Returns:
        The outcome over groups; ``top_indices`` and ``best_index`` name the best row of the group that is meant, of
        equal ones the first.
    """
    comm = comm or Comm()
    task = Task(queries, gallery, relevant)
    found = _Groups(task, np.unique(groups, return_inverse=True)[1])
    asked, device = task.queries, task.gallery.rows.device
    wanted = [np.unique(found.group[rows]) for rows in (np.asarray(rows, np.int64) for rows in relevant)]
    starts = np.cumsum([0, *map(len, wanted)])
    query = np.repeat(asked.place, np.diff(starts))
    code, pair = np.unique(query * found.count + np.concatenate(wanted), return_inverse=True)
    line, column = (torch.from_numpy(each).to(device) for each in np.divmod(code, found.count))

    rows, top = len(asked.rows), min(top, found.count)
    scores = asked.rows.new_zeros(len(code))
    better, tied, winner = (torch.zeros(len(code), dtype=torch.int64, device=device) for _ in range(3))
    top_rows = torch.zeros(rows, top, dtype=torch.int64, device=device)
    top_scores = asked.rows.new_zeros(rows, top)
    block = max(1, min(_BLOCK, _ENTRIES // len(found.group)))
    with full_precision(device.type):
        for start in range(comm.rank * block, rows, comm.world_size * block):
            part = slice(start, start + block)
            best, which = found.of(asked.rows[part])
            numbers = torch.arange(found.count, device=device).expand_as(best)
            order, top_scores[part] = first_best(numbers, best, top)
            top_rows[part] = which.gather(1, order)
            first, last = torch.searchsorted(line, line.new_tensor([start, start + len(best)])).tolist()
            for ids in torch.split(torch.arange(first, last, device=device), block):
                own = best[line[ids] - start, column[ids]]
                scores[ids], winner[ids] = own, which[line[ids] - start, column[ids]]
                against = best[line[ids] - start]
                better[ids] = (against > own[:, None]).sum(1)
                tied[ids] = (against == own[:, None]).sum(1)
    outcome = (shared_sum(each, comm).cpu().numpy() for each in (scores, better, tied, winner, top_rows, top_scores))
    own_scores, above, equal, winners, top_found, top_values = outcome
    figures = (own_scores.astype(np.float64)[pair], above[pair], equal[pair])
    columns, per_query = split_columns(figure_columns(starts, winners[pair], *figures))
    return RankResult(
        gallery=found.count,
        per_query=per_query,
        top_indices=top_found[asked.place],
        top_scores=top_values.astype(np.float64)[asked.place],
        **columns,
    )


class _Groups:
    """Gallery rows by their groups."""

    def __init__(self, task: Task, group: Integers) -> None:
        self.group, self.count = group, int(group.max()) + 1
        self._gallery = task.gallery.rows
        self._place = torch.from_numpy(task.gallery.place).to(self._gallery.device)
        self._index = torch.from_numpy(group).to(self._gallery.device)

    def of(self, asked: Tensor) -> tuple[Tensor, Tensor]:
        """``(b, groups)``: the best score of each group, and the first row that has it."""
        scores = (asked @ self._gallery.T)[:, self._place]
        index = self._index.expand_as(scores)
        best = scores.new_full((len(asked), self.count), -torch.inf).scatter_reduce(1, index, scores, "amax")
        rows = torch.arange(scores.shape[1], device=scores.device).expand_as(scores)
        rows = rows.masked_fill(scores != best.gather(1, index), scores.shape[1])
        which = torch.full_like(best, scores.shape[1], dtype=torch.int64).scatter_reduce(1, index, rows, "amin")
        return best, which
