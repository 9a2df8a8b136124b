"""Exact retrieval ranks: streamed in tiles, ties counted, every metric an expectation over random order inside ties.

A relevant item's own score is the very number that its rivals are compared with, from the same tile of scores.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mmcl.distributed import Comm
from mmcl.evaluation.distinct import Distinct, Floats, Integers
from mmcl.evaluation.streaming import Standing, Transform, stream
from mmcl.types import ConfigError

Rows: TypeAlias = "Tensor | npt.NDArray[Any]"
Relevant: TypeAlias = "Sequence[Sequence[int]] | Sequence[Integers]"

HIT_RANKS = (1, 5, 10, 50)
MAP_RANKS = (5, 10, 50)
CUTOFF = 10
"""of nDCG, and length of the top lists"""

_BLOCK_QUERIES = 1024


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
    """``(Q,)`` each: the expected ``R@k``, ``recall@k``, ``mAP@k``, ``nDCG@10`` of every query, in percent"""

    @property
    def answerable(self) -> npt.NDArray[np.bool_]:
        """``(Q,)``: queries that have something to find."""
        return self.relevant > 0

    def of(self, queries: Integers) -> RankResult:
        """These queries alone, in the whole gallery."""
        columns = {each.name: getattr(self, each.name) for each in fields(self)}
        cut: dict[str, Any] = {
            name: column[queries] for name, column in columns.items() if isinstance(column, np.ndarray)
        }
        per_query = {name: column[queries] for name, column in self.per_query.items()}
        return replace(self, **cut, per_query=per_query)

    def hits_at(self, k: int) -> float:
        """R@k of any k ≥ 1, in percent, as in :meth:`metrics`; NaN where nothing is answerable."""
        asked = self.answerable
        hits = _hit_percent(k, self.better[asked], self.tied[asked], self.tied_relevant[asked])
        return _mean(hits) if len(hits) else float("nan")

    def metrics(self) -> dict[str, float]:
        """The figures of one direction: see :func:`retrieval_metrics`."""
        counted = self.answerable
        ranks = self.expected_rank[counted]
        means = {name: _mean(values[counted]) for name, values in self.per_query.items()}
        hits = {name: means.pop(name) for name in [f"R@{k}" for k in HIT_RANKS]}
        recalls = {name: means.pop(name) for name in [f"recall@{k}" for k in HIT_RANKS]}
        return {
            **hits,
            **recalls,
            "MedR": float(np.median(ranks)),
            "MnR": _mean(ranks),
            **means,
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
        ``R@1/5/10/50`` (hit: something right among the first k), ``recall@1/5/10/50`` (share of what is right found
        there), ``mAP@5/10/50`` (÷ min(k, number relevant)), ``nDCG@10`` (binary gain, log2), in percent; ``MedR`` and
        ``MnR``, the median and mean 1-based expected rank of the best relevant row; ``queries`` (counted ones),
        ``gallery``, ``ties`` (queries whose best relevant row shares its score with an irrelevant one),
        ``unanswerable`` (queries with nothing relevant: left out of everything else).

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


def ranks(queries: Rows, gallery: Rows, relevant: Relevant | None = None, *, top: int = CUTOFF) -> RankResult:
    """Ranks of every query's relevant rows and its ``top`` gallery rows, in one pass over tiles of scores.

    Arguments and errors as :func:`retrieval_metrics`, except that all queries may be unanswerable. Runs on the device
    of ``gallery``; holds one tile of scores at a time, never all of them.
    """
    return _ranks(queries, gallery, relevant, top, both=False, comm=Comm())[0]


def ranks_both(
    queries: Rows, gallery: Rows, relevant: Relevant | None = None, *, top: int = CUTOFF, comm: Comm | None = None
) -> tuple[RankResult, RankResult]:
    """:func:`ranks` of ``queries`` in ``gallery`` and of ``gallery`` in ``queries``, every score computed once.

    A query is right for a gallery row where that is right for the query. With a ``comm`` of several processes all call
    this with the same arguments, each does its share, and all return the same.
    """
    forward, backward = _ranks(queries, gallery, relevant, top, both=True, comm=comm or Comm())
    assert backward is not None
    return forward, backward


def _ranks(
    queries: Rows, gallery: Rows, relevant: Relevant | None, top: int, *, both: bool, comm: Comm
) -> tuple[RankResult, RankResult | None]:
    return Task(queries, gallery, relevant).rank(top, both=both, comm=comm)


class Task:
    """Queries, a gallery and what is right, checked, with equal rows found."""

    def __init__(self, queries: Rows, gallery: Rows, relevant: Relevant | None) -> None:
        queries, gallery = _check_rows(queries, gallery)
        self._starts, self._right = _check_relevant(relevant, len(queries), len(gallery))
        self.queries, self.gallery = Distinct(queries), Distinct(gallery)

    @torch.no_grad()
    def rank(
        self, top: int, *, both: bool, comm: Comm, transform: Transform | None = None
    ) -> tuple[RankResult, RankResult | None]:
        """Forward, and with ``both`` backward; ``transform`` as of :func:`stream`, on the different rows."""
        left, other, starts, right = self.queries, self.gallery, self._starts, self._right
        device = other.rows.device
        asked = np.repeat(np.arange(len(left.place)), np.diff(starts))
        code, pair = np.unique(left.place[asked] * len(other.rows) + other.place[right], return_inverse=True)
        line, column = (torch.from_numpy(each).to(device) for each in np.divmod(code, len(other.rows)))
        with full_precision(device.type):
            found = stream(
                left.rows,
                other.rows,
                (line, column),
                (left.weights, other.weights),
                top=top,
                both=both,
                comm=comm,
                transform=transform,
            )
        scores = found.scores.cpu().numpy().astype(np.float64)
        forward = _result(found.rows, scores, (starts, right, pair), (left, other), min(top, len(other.place)))
        if found.columns is None:
            return forward, None
        order = np.argsort(right, kind="stable")
        back = np.searchsorted(right[order], np.arange(len(other.place) + 1))
        reverse = (back, asked[order], pair[order])
        return forward, _result(found.columns, scores, reverse, (other, left), min(top, len(left.place)))


def _result(
    found: Standing,
    scores: Floats,
    right: tuple[Integers, Integers, Integers],
    sides: tuple[Distinct, Distinct],
    top: int,
) -> RankResult:
    """``right``: where each query's relevant rows begin, ``(Q + 1,)``; these rows, and the pair of each."""
    starts, rows, pair = right
    better, tied = found.better.cpu().numpy(), found.tied.cpu().numpy()
    asked, gallery = sides
    columns, per_query = split_columns(figure_columns(starts, rows, scores[pair], better[pair], tied[pair]))
    top_indices, top_scores = gallery.expand(
        found.top_indices.cpu().numpy(), found.top_scores.cpu().numpy().astype(np.float64), top
    )
    return RankResult(
        gallery=len(gallery.place),
        per_query=per_query,
        top_indices=top_indices[asked.place],
        top_scores=top_scores[asked.place],
        **columns,
    )


def figure_columns(
    starts: Integers, right: Integers, scores: Floats, better: Integers, tied: Integers
) -> dict[str, npt.NDArray[Any]]:
    """Columns of RankResult: query i has the relevant rows ``right[starts[i] : starts[i + 1]]``, which stand so."""
    parts = []
    for first in range(0, len(starts) - 1, _BLOCK_QUERIES):
        bounds = starts[first : first + _BLOCK_QUERIES + 1]
        inside = slice(bounds[0], bounds[-1])
        parts.append(_figures(bounds - bounds[0], right[inside], scores[inside], better[inside], tied[inside]))
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def split_columns(columns: dict[str, npt.NDArray[Any]]) -> tuple[dict[str, npt.NDArray[Any]], dict[str, Floats]]:
    """The columns that are fields of RankResult, and those of its ``per_query``."""
    figures = {name: column for name, column in columns.items() if "@" in name}
    return {name: column for name, column in columns.items() if name not in figures}, figures


def _figures(
    starts: Integers, right: Integers, scores: Floats, better_of: Integers, tied_of: Integers
) -> dict[str, npt.NDArray[Any]]:
    """:func:`figure_columns` of a block of queries."""
    count = np.diff(starts)
    filled = np.arange(max(1, count.max())) < count[:, None]
    index, better, tied = (np.zeros(filled.shape, np.int64) for _ in range(3))
    own = np.full(filled.shape, -np.inf)
    for table, values in ((index, right), (better, better_of), (tied, tied_of), (own, scores)):
        table[filled] = values
    relevant_better, relevant_tied = _count(own)

    some = count > 0
    best = (np.arange(len(count)), own.argmax(1))
    g, m, r = better[best], np.maximum(tied[best], 1), relevant_tied[best]
    columns: dict[str, npt.NDArray[Any]] = {
        "relevant": count,
        "better": np.where(some, g, -1),
        "tied": np.where(some, m, -1),
        "tied_relevant": np.where(some, r, -1),
        "expected_rank": np.where(some, g + (m + 1) / (r + 1), np.nan),
        "best_index": np.where(some, index[best], -1),
        "best_score": np.where(some, own[best], np.nan),
    }
    for k in HIT_RANKS:
        found = np.clip((k - better) / np.maximum(tied, 1), 0, 1) * filled
        columns[f"R@{k}"] = np.where(some, _hit_percent(k, g, m, r), np.nan)
        columns[f"recall@{k}"] = np.where(some, 100 * found.sum(1) / np.maximum(count, 1), np.nan)
    precision, gain = _precision_and_gain((better, tied), (relevant_better, relevant_tied), count)
    columns |= {f"mAP@{k}": np.where(some, 100 * values, np.nan) for k, values in precision.items()}
    columns["nDCG@10"] = np.where(some, 100 * gain, np.nan)
    return columns


def _count(own: Floats) -> tuple[Integers, Integers]:
    """How many of a row's own scores ``(b, R)`` lie above each of them, and how many equal it."""
    values = torch.from_numpy(own)
    ordered = values.sort(dim=1).values
    below, upto = torch.searchsorted(ordered, values), torch.searchsorted(ordered, values, right=True)
    return (own.shape[1] - upto).numpy(), (upto - below).numpy()


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
    standing: tuple[Integers, Integers], among_relevant: tuple[Integers, Integers], count: Integers
) -> tuple[dict[int, Floats], Floats]:
    """Expected average precision at each of MAP_RANKS, and nDCG at 10, from the ``(b, R)`` standing of relevant rows.

    A relevant row among n tied ones, c of them relevant, is at each of their n places with chance 1/n; then each of the
    i − 1 tied places before it holds another relevant row with chance (c − 1) / (n − 1).
    """
    (better, tied), (relevant_better, relevant_tied) = standing, among_relevant
    total, gain = np.zeros(better.shape), np.zeros(better.shape)
    precision = {}
    others = (relevant_tied - 1) / np.maximum(tied - 1, 1)
    for place in range(1, max(MAP_RANKS) + 1):
        within = place - better
        chance = ((within >= 1) & (within <= tied)) / np.maximum(tied, 1)
        total += chance * (relevant_better + 1 + (within - 1) * others) / place
        if place <= CUTOFF:
            gain += chance / np.log2(place + 1)
        if place in MAP_RANKS:
            precision[place] = total.sum(1) / np.clip(count, 1, place)
    ideal = np.cumsum(1 / np.log2(np.arange(2, CUTOFF + 2)))
    return precision, gain.sum(1) / ideal[np.clip(count, 1, CUTOFF) - 1]


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
        # by parts: of all rows at once it takes as much memory again
        finite = torch.cat([part.isfinite().all(1) for part in torch.split(tensor, _BLOCK_QUERIES)])
        bad = (~finite).nonzero().flatten()
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
def full_precision(device: str) -> Iterator[None]:
    """Float32 products in float32, whatever training set for its own (TF32, autocast)."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)
