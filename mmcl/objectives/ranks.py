"""How a pure loss becomes the loss of all ranks: either a mean of own rows is joined, or all rows come together.

Both leave gradients that, averaged over ranks, are those of one process.
"""

from __future__ import annotations

from itertools import combinations

import torch
import torch.nn.functional as F
from torch import Tensor

from mmcl.distributed import Comm
from mmcl.types import RunError


def mean_over_ranks(mean: Tensor, rows: int, comm: Comm) -> Tensor:
    """The mean over rows of all ranks from the mean over the ``rows`` of this one; 0 where there are none."""
    return comm.mean(mean.expand(rows), torch.ones(rows, dtype=torch.bool, device=mean.device))


def all_rows(x: Tensor, present: Tensor, comm: Comm) -> Tensor:
    """The present rows of all ranks, in draw order, with gradients: what a loss of relations between rows takes."""
    return comm.gather(x)[comm.gather(present)]


def related_rows(groups: Tensor, comm: Comm) -> Tensor:
    """bool ``(B, N)``: which rows of all ranks share a number with an own row; ``groups`` int64 ``(B, G)``."""
    everyone = comm.gather(groups)
    return ((groups[:, None] == everyone) & (groups[:, None] >= 0)).any(2)


def classification(logits: Tensor, labels: Tensor, rows: Tensor, comm: Comm) -> Tensor:
    """Cross-entropy of ``(B, K)`` logits, the mean over these ``rows`` of all ranks that have a label (not −1).

    Raises:
        RunError: on all ranks, if one has a label of K or above.
    """
    highest = int(comm.max(labels.amax())) if len(labels) else -1
    if highest >= logits.shape[1]:
        raise RunError(f"a sample has label {highest}, but the objective was given classes: {logits.shape[1]}")
    with torch.autocast(logits.device.type, enabled=False):
        wide = logits if logits.dtype == torch.float64 else logits.float()
        return comm.mean(F.cross_entropy(wide, labels.clamp_min(0), reduction="none"), rows & (labels >= 0))


@torch.no_grad()
def mean_negatives(groups: Tensor, present: Tensor, comm: Comm, pools: Tensor | None = None) -> Tensor:
    """How many other rows, of its pool, share no number with a row, 0-d: the mean over the present rows of all ranks.

    ``groups`` int64 ``(B, G)`` and ``pools`` ``(B,)`` as in a batch, ``present`` bool ``(B,)``. By counting equal
    numbers in every set of columns (inclusion and exclusion), so no ``(N, N)`` matrix is made; G is small.
    """
    pool = torch.zeros_like(present, dtype=torch.int64) if pools is None else pools
    everyone = comm.gather(torch.cat([groups, pool[:, None], present[:, None].to(groups)], 1))
    numbers, pool, here = everyone[:, :-2], everyone[:, -2], everyone[:, -1] > 0
    met = _equal(pool.masked_fill(~here, -1))
    related = torch.zeros_like(everyone[:, 0])
    for size in range(1, numbers.shape[1] + 1):
        for columns in combinations(numbers.unbind(1), size):
            code, counts = pool, here & (pool >= 0)
            for column in columns:
                code, counts = (code * 6364136223846793005 + column) & (2**62 - 1), counts & (column >= 0)
            related += (_equal(code.masked_fill(~counts, -1)) * (-1) ** (size + 1)).masked_fill(~counts, 0)
    # a row without any number is itself all the same; one without a pool meets nobody
    others = (met - related.clamp_min(1)).masked_fill(~here | (pool < 0), 0)
    return others.sum() / here.sum().clamp_min(1)


def _equal(numbers: Tensor) -> Tensor:
    """For each of int64 ``(N,)`` how many equal it, itself included."""
    ordered = numbers.sort().values
    return torch.searchsorted(ordered, numbers, right=True) - torch.searchsorted(ordered, numbers)
