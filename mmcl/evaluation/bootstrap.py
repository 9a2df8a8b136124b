"""How far figures of retrieval vary with the choice of queries."""

from __future__ import annotations

import numpy as np

from mmcl.evaluation.ranking import HIT_RANKS, RankResult
from mmcl.types import ConfigError


def bootstrap_ci(
    result: RankResult, *, seed: int = 0, samples: int = 1000, level: float = 0.95
) -> dict[str, tuple[float, float]]:
    """Percentile bootstrap intervals of ``R@k``, ``MedR``, ``MnR``, ``mAP@10``, ``nDCG@10``, resampling queries.

    The gallery stays as it is: the interval says how the figures vary with the choice of queries. Equal seeds give
    equal intervals. Raises ConfigError where no query is answerable.
    """
    counted = result.answerable
    count = int(counted.sum())
    if not count:
        raise ConfigError("no query is answerable: there is nothing to resample")
    names = [*(f"R@{k}" for k in HIT_RANKS), "mAP@10", "nDCG@10"]
    table = np.stack([*(result.per_query[name][counted] for name in names), result.expected_rank[counted]])
    random = np.random.default_rng(seed)
    chunk = max(1, (1 << 20) // count)
    means, medians = [], []
    for first in range(0, samples, chunk):
        drawn = random.integers(0, count, size=(min(chunk, samples - first), count))
        means.append(np.stack([column[drawn].mean(1) for column in table]))
        medians.append(np.median(table[-1][drawn], axis=1))
    values = dict(zip([*names, "MnR"], np.concatenate(means, 1), strict=True), MedR=np.concatenate(medians))
    tails = [(1 - level) / 2, (1 + level) / 2]
    bounds = {name: np.quantile(column, tails) for name, column in values.items()}
    order = [*(f"R@{k}" for k in HIT_RANKS), "MedR", "MnR", "mAP@10", "nDCG@10"]
    return {name: (float(bounds[name][0]), float(bounds[name][1])) for name in order}
