"""Equal rows of a side: found, scored once, and put back into top lists."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Floats: TypeAlias = npt.NDArray[np.float64]
Integers: TypeAlias = npt.NDArray[np.int64]

_HASHED_ROWS = 256


class Distinct:
    """The different rows of a side, in the order of their first appearance: equal rows are scored once, and so alike.

    A matrix product may round equal rows differently, depending on where they lie in it.
    """

    def __init__(self, rows: Tensor) -> None:
        first, place = distinct_rows(rows)
        self.rows = rows if len(first) == len(rows) else rows[first]
        self.weights = torch.bincount(place, minlength=len(first))
        self.place: Integers = place.cpu().numpy()
        self._size = len(rows)

    def expand(self, indices: Integers, scores: Floats, top: int) -> tuple[Integers, Floats]:
        """The best of all rows from the best ``(n, K)`` of the different ones; of equal scores the lowest numbers."""
        if len(self.rows) == self._size:
            return indices, scores
        order = np.argsort(self.place, kind="stable")
        counts = np.bincount(self.place)
        copies = np.arange(min(top, counts.max()))
        index = (np.cumsum(counts) - counts)[indices][:, :, None] + copies
        real = copies < counts[indices][:, :, None]
        all_indices = np.where(real, order[np.minimum(index, self._size - 1)], self._size)
        all_scores = np.where(real, scores[:, :, None], -np.inf)
        tensors = [torch.from_numpy(x.reshape(len(indices), -1)) for x in (all_indices, all_scores)]
        best_indices, best_scores = first_best(tensors[0], tensors[1], top)
        return best_indices.numpy(), best_scores.numpy()


def distinct_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Of rows ``(n, D)`` the first of each kind ``(u,)``, rising, and for each row ``(n,)`` its kind; int64 both.

    Found by a hash of the bits, and confirmed; zeros of both signs are equal.
    """
    whole = torch.int64 if rows.dtype == torch.float64 else torch.int32
    random = torch.Generator().manual_seed(0)
    factors = torch.randint(-(2**62), 2**62, (rows.shape[1],), generator=random).to(rows.device) | 1
    hashes = torch.cat([((part + 0.0).view(whole).long() * factors).sum(1) for part in torch.split(rows, _HASHED_ROWS)])
    _, place = torch.unique(hashes, return_inverse=True)
    number = torch.arange(len(rows), device=rows.device)
    first = torch.full((int(place.max()) + 1,), len(rows), device=rows.device)
    first = first.scatter_reduce(0, place, number, "amin")
    copies = (first[place] != number).nonzero().flatten()
    for part in torch.split(copies, _HASHED_ROWS):
        if not torch.equal(rows[part], rows[first[place[part]]]):  # two rows with one hash
            _, place = torch.unique(rows, dim=0, return_inverse=True)
            first = torch.full_like(first[:1], len(rows)).repeat(int(place.max()) + 1)
            first = first.scatter_reduce(0, place, number, "amin")
            break
    order = first.argsort()
    return first[order], order.argsort()[place]


def first_best(indices: Tensor, scores: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """The first ``top`` of each row of ``(n, k)`` entries, by falling score, equal ones by rising number."""
    indices, order = indices.sort(dim=1)
    scores, again = scores.gather(1, order).sort(dim=1, descending=True, stable=True)
    return indices.gather(1, again)[:, :top], scores[:, :top]
