"""How far figures of retrieval vary with the choice of queries, alone and against those of another model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from mmcl.evaluation.distinct import Floats, Integers
from mmcl.evaluation.ranking import RankResult
from mmcl.types import ConfigError

_HELD = 1 << 20
"""drawn numbers that are held at once"""


def bootstrap_ci(
    result: RankResult, *, seed: int = 0, samples: int = 1000, level: float = 0.95
) -> dict[str, tuple[float, float]]:
    """Percentile bootstrap intervals of every figure but the counts, resampling queries.

    The gallery stays as it is: the interval says how the figures vary with the choice of queries. Equal seeds give
    equal intervals. Raises ConfigError where no query is answerable.
    """
    counted = result.answerable
    if not counted.any():
        raise ConfigError("no query is answerable: there is nothing to resample")
    columns = {name: values[counted] for name, values in result.per_query.items()}
    columns["rank"] = result.expected_rank[counted]
    values = _resampled(columns, seed, samples)
    bounds = {name: np.quantile(column, _tails(level)) for name, column in values.items()}
    return {name: (float(low), float(high)) for name, (low, high) in bounds.items()}


def paired_bootstrap(
    old: Mapping[str, Floats], new: Mapping[str, Floats], *, seed: int = 0, samples: int = 1000, level: float = 0.95
) -> dict[str, tuple[float, float]]:
    """Intervals of new − old: each sample draws the same queries for both.

    Args:
        old: per figure ``(Q,)``, a value per query; ``rank`` gives ``MedR`` and ``MnR``.
        new: the same figures of the same queries.
    """
    before, after = (_resampled(columns, seed, samples) for columns in (old, new))
    bounds = {name: np.quantile(after[name] - before[name], _tails(level)) for name in before}
    return {name: (float(low), float(high)) for name, (low, high) in bounds.items()}


def _tails(level: float) -> list[float]:
    return [(1 - level) / 2, (1 + level) / 2]


def _resampled(columns: Mapping[str, Floats], seed: int, samples: int) -> dict[str, Floats]:
    """Each figure, ``(samples,)``: the means of the columns; of ``rank`` both ``MedR`` and ``MnR``."""
    count = len(columns["rank"])
    values: dict[str, list[Floats]] = {}
    for drawn in _draws(count, seed, samples):
        for name, column in columns.items():
            values.setdefault("MnR" if name == "rank" else name, []).append(column[drawn].mean(1))
        values.setdefault("MedR", []).append(np.median(columns["rank"][drawn], axis=1))
    return {name: np.concatenate(parts) for name, parts in values.items()}


def _draws(count: int, seed: int, samples: int) -> Iterator[Integers]:
    random = np.random.default_rng(seed)
    chunk = max(1, _HELD // count)
    for first in range(0, samples, chunk):
        yield random.integers(0, count, size=(min(chunk, samples - first), count))
