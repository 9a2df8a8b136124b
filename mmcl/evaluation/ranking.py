"""Exact retrieval ranks: streamed in blocks, ties counted, every metric an expectation over random order inside ties.

The scores of a block of queries against the whole gallery are one matrix product, and every comparison is made on that
product, so a relevant item's own score is the very number its rivals are compared with. Equal gallery rows are scored
once: a matrix product may round equal columns differently, depending on where they lie in it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mmcl.types import ConfigError

Rows: TypeAlias = "Tensor | npt.NDArray[Any]"
Floats: TypeAlias = npt.NDArray[np.float64]
Integers: TypeAlias = npt.NDArray[np.int64]
Relevant: TypeAlias = "Sequence[Sequence[int]] | Sequence[Integers]"

HIT_RANKS = (1, 5, 10)
CUTOFF = 10
"""of mAP and nDCG"""

_BLOCK_SCORES = 1 << 24
"""scores that are held at once: 64 MiB in float32"""
_BLOCK_QUERIES = 1024
_SORT_ABOVE = 8
"""with more relevant items per query than this, sorting a row costs less than comparing it with each of them"""


@dataclass(frozen=True, eq=False)
class RankResult:
    """Where every query's relevant items stand. Arrays have one row per query; unanswerable ones hold −1 or NaN."""

    gallery: int
    """number of gallery rows"""
    relevant: Integers
    """``(Q,)``: how many gallery rows are right; 0: unanswerable"""
    better: Integers
    """``(Q,)``: g, gallery rows scored strictly above the best relevant one"""
    tied: Integers
    """``(Q,)``: m ≥ 1, gallery rows with exactly its score, itself included"""
    tied_relevant: Integers
    """``(Q,)``: r, how many of these are relevant"""
    expected_rank: Floats
    """``(Q,)``: 1-based g + (m + 1) / (r + 1)"""
    best_index: Integers
    """``(Q,)``: the gallery row of the best relevant item, the lowest of equal ones"""
    best_score: Floats
    """``(Q,)``"""
    top_indices: Integers
    """``(Q, K)``: gallery rows by falling score, equal scores by rising row number; K is at most the gallery"""
    top_scores: Floats
    """``(Q, K)``"""
    per_query: Mapping[str, Floats]
    """``(Q,)`` each: the expected ``R@k``, ``recall@k``, ``mAP@10``, ``nDCG@10`` of every query, in percent"""

    @property
    def answerable(self) -> npt.NDArray[np.bool_]:
        """``(Q,)``: queries that have something to find."""
        return self.relevant > 0

    def metrics(self) -> dict[str, float]:
        """The figures of one direction: see :func:`retrieval_metrics`."""
        counted = self.answerable
        ranks = self.expected_rank[counted]
        recalls = {name: _mean(values[counted]) for name, values in self.per_query.items() if "recall" in name.lower()}
        hits = {f"R@{k}": _mean(self.per_query[f"R@{k}"][counted]) for k in HIT_RANKS}
        return {
            **hits,
            **recalls,
            "MedR": float(np.median(ranks)),
            "MnR": _mean(ranks),
            "mAP@10": _mean(self.per_query["mAP@10"][counted]),
            "nDCG@10": _mean(self.per_query["nDCG@10"][counted]),
            "queries": int(counted.sum()),
            "gallery": self.gallery,
            "ties": int((self.tied[counted] > self.tied_relevant[counted]).sum()),
            "unanswerable": int((~counted).sum()),
        }


def retrieval_metrics(queries: Rows, gallery: Rows, relevant: Relevant | None = None) -> dict[str, float]:
    """How well ``queries`` find what is relevant in ``gallery``: one direction of retrieval.

    All values are expectations over random order inside ties: constant scores give exactly ``R@k = 100 k / M``.

    Args:
        queries: ``(Q, D)`` unit rows of any float dtype, tensor or array; the score is the dot product, taken as given.
        gallery: ``(M, D)`` unit rows. Scores are float32, or float64 where either side is.
        relevant: for each query the gallery rows that are right; default: row i for query i.

    Returns:
        ``R@1/5/10`` (something right among the first k) and ``recall@1/5/10`` (share of what is right found there),
        ``mAP@10`` (÷ min(10, number relevant)), ``nDCG@10`` (binary gain, log2), in percent; ``MedR`` and ``MnR``, the
        median and mean 1-based expected rank of the best relevant row; ``queries`` (counted ones), ``gallery``,
        ``ties`` (queries whose best relevant row shares its score with an irrelevant one), ``unanswerable`` (queries
        with nothing relevant: left out of everything else).

    Raises:
        ConfigError: an empty side, rows that are not finite or do not fit, a relevant row that does not exist, or no
            query with anything relevant.

    >>> scores = retrieval_metrics(np.ones((4, 1)), np.ones((4, 1)))
    >>> scores["R@1"], scores["MnR"], scores["ties"]
    (25.0, 2.5, 4)
    """
    result = ranks(queries, gallery, relevant)
    if not result.answerable.any():
        raise ConfigError(f"none of the {len(result.relevant)} queries has anything relevant in the gallery")
    return result.metrics()


@torch.no_grad()
def ranks(queries: Rows, gallery: Rows, relevant: Relevant | None = None, *, top: int = CUTOFF) -> RankResult:
    """Ranks of every query's relevant rows and its ``top`` gallery rows, in one pass over blocks of queries.

    Arguments and errors as :func:`retrieval_metrics`, except that all queries may be unanswerable. Runs on the device
    of ``gallery``; holds one block of scores at a time, never all of them.
    """
    queries, gallery = _check_rows(queries, gallery)
    starts, right = _check_relevant(relevant, len(queries), len(gallery))
    distinct, place = torch.unique(gallery, dim=0, return_inverse=True)
    if len(distinct) == len(gallery):
        distinct, place = gallery, None
    rows = max(1, min(_BLOCK_QUERIES, _BLOCK_SCORES // len(gallery)))
    parts = []
    with _full_precision(gallery.device.type):
        for first in range(0, len(queries), rows):
            last = min(first + rows, len(queries))
            scores = queries[first:last] @ distinct.T
            if place is not None:
                scores = scores[:, place]
            block_starts = starts[first : last + 1]
            block_right = right[block_starts[0] : block_starts[-1]]
            parts.append(_rank_block(scores, block_starts - block_starts[0], block_right, min(top, len(gallery))))
    columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    names = [name for name in columns if "@" in name]
    return RankResult(
        gallery=len(gallery),
        per_query={name: columns[name] for name in names},
        **{name: column for name, column in columns.items() if name not in names},
    )


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


def _rank_block(scores: Tensor, starts: Integers, right: Integers, top: int) -> dict[str, npt.NDArray[Any]]:
    """The columns of RankResult for the rows of ``scores (b, M)``: row i has ``right[starts[i] : starts[i + 1]]``."""
    count = np.diff(starts)
    filled = np.arange(max(1, count.max())) < count[:, None]
    index = np.zeros(filled.shape, np.int64)
    index[filled] = right
    own = scores.gather(1, torch.from_numpy(index).to(scores.device))
    own = own.masked_fill(torch.from_numpy(~filled).to(scores.device), -torch.inf)
    better, tied = _count(scores, own)
    relevant_better, relevant_tied = _count(own, own)
    own_scores = own.cpu().numpy().astype(np.float64)
    top_scores, top_indices = _top(scores, top)

    some = count > 0
    best = (np.arange(len(count)), own_scores.argmax(1))
    g, m, r = better[best], np.maximum(tied[best], 1), relevant_tied[best]
    columns: dict[str, npt.NDArray[Any]] = {
        "relevant": count,
        "better": np.where(some, g, -1),
        "tied": np.where(some, m, -1),
        "tied_relevant": np.where(some, r, -1),
        "expected_rank": np.where(some, g + (m + 1) / (r + 1), np.nan),
        "best_index": np.where(some, index[best], -1),
        "best_score": np.where(some, own_scores[best], np.nan),
        "top_indices": top_indices.cpu().numpy(),
        "top_scores": top_scores.cpu().numpy().astype(np.float64),
    }
    for k in HIT_RANKS:
        found = np.clip((k - better) / np.maximum(tied, 1), 0, 1) * filled
        columns[f"R@{k}"] = np.where(some, _hit_percent(k, g, m, r), np.nan)
        columns[f"recall@{k}"] = np.where(some, 100 * found.sum(1) / np.maximum(count, 1), np.nan)
    precision, gain = _precision_and_gain(better, tied, relevant_better, relevant_tied, count)
    columns["mAP@10"] = np.where(some, 100 * precision, np.nan)
    columns["nDCG@10"] = np.where(some, 100 * gain, np.nan)
    return columns


def _count(scores: Tensor, values: Tensor) -> tuple[Integers, Integers]:
    """How many of a row's ``scores (b, M)`` lie above each of its ``values (b, R)``, and how many equal it."""
    if values.shape[1] > _SORT_ABOVE:
        ordered = scores.sort(dim=1).values
        below = torch.searchsorted(ordered, values)
        upto = torch.searchsorted(ordered, values, right=True)
        better, tied = scores.shape[1] - upto, upto - below
    else:
        columns = [values[:, place : place + 1] for place in range(values.shape[1])]
        better = torch.stack([(scores > column).sum(1) for column in columns], 1)
        tied = torch.stack([(scores == column).sum(1) for column in columns], 1)
    return better.cpu().numpy(), tied.cpu().numpy()


def _top(scores: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """Scores and columns of the first ``top`` of each row; equal scores by rising column, which torch leaves open."""
    values, columns = scores.topk(top, dim=1)
    last = values[:, -1:]
    equal = (scores == last).sum(1)
    cut = (equal > (values == last).sum(1)).nonzero().flatten()
    if len(cut):  # the last place is tied with a row that was left out: take the first of the equal ones
        rows, bound = scores[cut], last[cut]
        room = top - (rows > bound).sum(1, keepdim=True)
        level = rows == bound
        chosen = (rows > bound) | (level & (level.cumsum(1) <= room))
        columns[cut] = chosen.nonzero()[:, 1].view(len(cut), top)
    columns = columns.sort(dim=1).values
    values, order = scores.gather(1, columns).sort(dim=1, descending=True, stable=True)
    return values, columns.gather(1, order)


def _hit_percent(k: int, g: Integers, m: Integers, r: Integers) -> Floats:
    """100 × the chance that a random order of the m tied rows puts one of its r relevant ones among the first k."""
    room = np.clip(k - g, 0, m)
    miss = np.ones(len(g))
    for place in range(int(room.max(initial=0))):  # C(m − r, room) / C(m, room), one factor per place
        factor = np.maximum(m - r - place, 0) / np.maximum(m - place, 1)
        miss = np.where(place < room, miss * factor, miss)
    # One relevant row: room / m, written out, so that constant scores give exactly 100 k / M.
    return np.where(room == m, 100.0, np.where(r == 1, 100 * room / m, 100 * (1 - miss)))


def _precision_and_gain(
    better: Integers, tied: Integers, relevant_better: Integers, relevant_tied: Integers, count: Integers
) -> tuple[Floats, Floats]:
    """Expected average precision and nDCG at 10 of each query, from the standing ``(b, R)`` of its relevant rows.

    A relevant row among n tied ones, c of them relevant, is at each of their n places with chance 1/n; then each of the
    i − 1 tied places before it holds another relevant row with chance (c − 1) / (n − 1).
    """
    precision = np.zeros(better.shape)
    gain = np.zeros(better.shape)
    others = (relevant_tied - 1) / np.maximum(tied - 1, 1)
    for place in range(1, CUTOFF + 1):
        within = place - better
        chance = ((within >= 1) & (within <= tied)) / np.maximum(tied, 1)
        precision += chance * (relevant_better + 1 + (within - 1) * others) / place
        gain += chance / np.log2(place + 1)
    ideal = np.cumsum(1 / np.log2(np.arange(2, CUTOFF + 2)))
    found = np.clip(count, 1, CUTOFF)
    return precision.sum(1) / found, gain.sum(1) / ideal[found - 1]


def _mean(values: Floats) -> float:
    """The mean, taken around the first value: of equal values it is exactly that value."""
    return float(values[0] + np.mean(values - values[0]))


def _check_rows(queries: Rows, gallery: Rows) -> tuple[Tensor, Tensor]:
    """Both sides as tensors of one dtype, on the gallery's device."""
    tensors = {}
    for name, rows in (("queries", queries), ("gallery", gallery)):
        tensor = rows.detach() if isinstance(rows, Tensor) else torch.tensor(np.asarray(rows))
        if tensor.ndim != 2:
            raise ConfigError(f"{name} must be (rows, D), got shape {tuple(tensor.shape)}")
        if not len(tensor):
            raise ConfigError(f"{name} is empty: there is nothing to rank")
        tensors[name] = tensor
    left, right = tensors["queries"], tensors["gallery"]
    if left.shape[1] != right.shape[1]:
        raise ConfigError(f"queries have {left.shape[1]} columns, gallery {right.shape[1]}")
    dtype = torch.float64 if torch.float64 in (left.dtype, right.dtype) else torch.float32
    left, right = left.to(right.device, dtype), right.to(dtype)
    for name, tensor in (("queries", left), ("gallery", right)):
        bad = (~tensor.isfinite().all(1)).nonzero().flatten()
        if len(bad):
            raise ConfigError(f"{name}: {len(bad)} rows are not finite, the first is row {int(bad[0])}")
    return left, right


def _check_relevant(relevant: Relevant | None, queries: int, gallery: int) -> tuple[Integers, Integers]:
    """The relevant rows laid end to end, and where each query's begin: ``(Q + 1,)`` starts, ``(P,)`` rows."""
    if relevant is None:
        if queries != gallery:
            raise ConfigError(f"{queries} queries and {gallery} gallery rows: say which are relevant to which")
        return np.arange(queries + 1), np.arange(queries)
    if len(relevant) != queries:
        raise ConfigError(f"relevant has {len(relevant)} lists for {queries} queries")
    lists = [np.unique(np.asarray(rows, dtype=np.int64)) for rows in relevant]
    starts = np.cumsum([0, *(len(rows) for rows in lists)])
    flat = np.concatenate(lists)
    if len(flat) and not 0 <= flat.min() <= flat.max() < gallery:
        bad = flat.min() if flat.min() < 0 else flat.max()
        raise ConfigError(f"relevant names gallery row {bad}, there are rows 0 to {gallery - 1}")
    return starts, flat


@contextmanager
def _full_precision(device: str) -> Iterator[None]:
    """Float32 products in float32, whatever training set for its own (TF32, autocast)."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)
