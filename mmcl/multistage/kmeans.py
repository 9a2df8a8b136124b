"""k-means on embeddings: seeded, in bounded memory, the same at every call."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from mmcl.hashing import hash64, uniform

CHUNK = 1 << 14
"""rows compared at a time"""

_FITTED, _FIRST, _NEXT = 0, 1, 2
"""what a hashed number is for"""


def kmeans(
    rows: Tensor,
    clusters: int,
    *,
    seed: int = 0,
    iterations: int = 100,
    tolerance: float = 1e-5,
    fit_rows: int = 1_000_000,
) -> Tensor:
    """Centroids float32 ``(clusters, D)`` by Lloyd's rounds from a greedy start of k-means++ (Arthur 2007).

    A cluster that loses all its rows starts again at the row that lies farthest from its centroid. Where there are
    fewer different rows than clusters, some stay empty: :func:`assign` then never names them.

    Args:
        rows: float ``(N, D)``, at least one.
        clusters: K.
        iterations: rounds at most.
        tolerance: the rounds end when the squared way of all centroids is at most this share of the mean variance of a
            column.
        fit_rows: of more rows than this, a hashed choice of so many is fitted.

    Raises:
        ValueError: no row, a row that is not finite, or no cluster.
    """
    if rows.ndim != 2 or not len(rows) or clusters < 1 or not bool(rows.isfinite().all()):
        raise ValueError(f"needs finite rows (N, D) and at least 1 cluster, got {tuple(rows.shape)} and {clusters}")
    if len(rows) > fit_rows:
        keys = hash64(seed, _FITTED, np.arange(len(rows), dtype=np.uint64))
        rows = rows[torch.from_numpy(np.sort(np.argpartition(keys, fit_rows)[:fit_rows]))]
    rows = rows.float()
    centroids = _start(rows, clusters, seed)
    enough = tolerance * float(rows.double().var(0, unbiased=False).mean())
    for _ in range(iterations):
        labels, distances = _nearest(rows, centroids)
        moved = _means(rows, labels, distances, centroids)
        way = float((moved - centroids).double().square().sum())
        centroids = moved
        if way <= enough:
            break
    return centroids


def assign(rows: Tensor, centroids: Tensor) -> Tensor:
    """int64 ``(N,)``: the nearest centroid of each row; of equally near ones the first."""
    return _nearest(rows.float(), centroids)[0]


def _nearest(rows: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Number of the nearest centroid, and the squared distance to it, float32 ``(N,)``."""
    found = [part.min(1) for part in _distances(rows, centroids)]
    return torch.cat([each.indices for each in found]), torch.cat([each.values for each in found])


def _distances(rows: Tensor, points: Tensor) -> Iterator[Tensor]:
    """Squared distances ``(≤ CHUNK, P)``, chunk after chunk of rows."""
    squares = points.square().sum(1)
    for part in torch.split(rows, CHUNK):
        yield (part.square().sum(1, keepdim=True) + squares - 2 * part @ points.T).clamp_min_(0)


def _start(rows: Tensor, clusters: int, seed: int) -> Tensor:
    """Each next centroid is the best of a few rows drawn with odds as their squared distance to those chosen."""
    first = int(uniform(seed, _FIRST) * len(rows))
    chosen = [first]
    nearest = torch.cat(list(_distances(rows, rows[[first]])))[:, 0].double()
    tries = 2 + int(math.log(clusters))
    for number in range(1, clusters):
        drawn = torch.from_numpy(uniform(seed, _NEXT, number, np.arange(tries))) * nearest.sum()
        candidates = torch.searchsorted(nearest.cumsum(0), drawn, right=True).clamp_max(len(rows) - 1)
        distances = torch.cat(list(_distances(rows, rows[candidates]))).double()
        left = torch.minimum(distances, nearest[:, None])
        best = int(left.sum(0).argmin())
        nearest = left[:, best]
        chosen.append(int(candidates[best]))
    return rows[chosen].clone()


def _means(rows: Tensor, labels: Tensor, distances: Tensor, before: Tensor) -> Tensor:
    """The mean row of each cluster; empty ones move to the rows that are farthest from theirs."""
    counts = torch.bincount(labels, minlength=len(before))
    sums = torch.zeros(before.shape, dtype=torch.float64).index_add_(0, labels, rows.double())
    means = (sums / counts.clamp_min(1)[:, None]).float()
    empty = (counts == 0).nonzero()[:, 0]
    if len(empty):
        means[empty] = before[empty]
        far = distances.topk(min(len(empty), len(rows))).indices
        far = far[distances[far] > 0]
        means[empty[: len(far)]] = rows[far]
    return means
