"""The pictures of a retrieval report, as SVG that takes its colours from the page."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
import torch

from mmcl.evaluation.distinct import Floats, Integers
from mmcl.evaluation.ranking import RankResult
from mmcl.evaluation.report import DirectionResult, ListResult
from mmcl.types import Modality

CURVE_RANKS = 1000
"""recall curves end here"""
GAP_ITEMS = 150
"""items drawn in the picture of the gap"""
_BUCKETS = (1, 2, 5, 10, 50, 500)
_COLOURS = 6


def arrow(direction: DirectionResult) -> str:
    """``text → video``, never broken over lines."""
    return f"{escape(direction.query)}\u00a0→\u00a0{escape(direction.gallery)}"


def rank_histogram(direction: DirectionResult) -> str:
    """Share of queries by the rank of their best right answer, as inline SVG."""
    ranks = direction.ranks.expected_rank[direction.ranks.answerable]
    size = direction.ranks.gallery
    bounds = [*(bound for bound in _BUCKETS if bound < size), size]
    counts = np.bincount(np.searchsorted(bounds, ranks), minlength=len(bounds))[: len(bounds)]
    shares = 100 * counts / len(ranks)
    labels = [str(high) if high == low else f"{low}–{high}" for low, high in _spans(bounds)]
    step = 300 / len(bounds)
    bars = []
    for place, (share, label) in enumerate(zip(shares, labels, strict=True)):
        x, height = 10 + place * step, 0.8 * share
        bars.append(
            f'<rect class="fill" x="{x + 3:.1f}" y="{100 - height:.1f}" width="{step - 6:.1f}" height="{height:.1f}"/>'
            f'<text class="tick" x="{x + step / 2:.1f}" y="114">{label}</text>'
        )
        if share:
            text = f"{share:.0f}" if share >= 1 else "<1"
            bars.append(f'<text class="share" x="{x + step / 2:.1f}" y="{95 - height:.1f}">{escape(text)}</text>')
    spoken = ", ".join(f"rank {label}: {share:.1f} %" for label, share in zip(labels, shares, strict=True) if share)
    return (
        f'<figure><figcaption>{arrow(direction)}</figcaption><svg class="chart" viewBox="0 0 320 120" role="img" '
        f'aria-label="{escape(direction.name)}: share of queries by rank of the right answer. {spoken}">'
        f'<path class="axis" d="M10 100.5H310"/>{"".join(bars)}</svg></figure>'
    )


def _spans(bounds: Sequence[int]) -> Iterable[tuple[int, int]]:
    return zip((1, *(bound + 1 for bound in bounds)), bounds, strict=False)


def recall_curves(result: ListResult) -> str:
    """R@k of every direction over k, on a logarithmic scale, with what guessing reaches.

    A colour per pair of modalities; the second direction of a pair is dashed.
    """
    directions = list(result.directions.values())
    widest = max(each.ranks.gallery for each in directions)
    last = min(widest, CURVE_RANKS)
    ranks = sorted({*np.unique(np.geomspace(1, max(last, 1), 40).round().astype(int)).tolist(), last})
    seen: dict[frozenset[str], int] = {}
    lines, keys, spoken = [], [], []
    for each in directions:
        pair = frozenset((each.query, each.gallery))
        style = "line second" if pair in seen else "line"
        style += f" c{seen.setdefault(pair, len(seen)) % _COLOURS}"
        style += (
            " second" if any(pair == {one.query, one.gallery} for one in directions[: directions.index(each)]) else ""
        )
        mine = [k for k in ranks if k <= each.ranks.gallery]
        lines.append(f'<path class="{style}" d="{_path(mine, [each.ranks.hits_at(k) for k in mine], last)}"/>')
        keys.append(_key(f'<path class="{style}" d="M1 6H27"/>', arrow(each)))
        marks = [f"R@{k} {each.ranks.hits_at(k):.0f} %" for k in (1, 5, 10, 50) if k <= each.ranks.gallery]
        spoken.append(f"{each.name}: {', '.join(marks)}")
    first = directions[0].ranks
    guess = [k for k in ranks if k <= first.gallery]
    chance = _path(guess, [guessed_hits(first, k) for k in guess], last)
    keys.append(_key('<path class="guess" d="M1 6H27"/>', "guessing"))
    grid = "".join(
        f'<path class="axis" d="M40 {_y(share):.1f}H510"/>'
        f'<text class="left" x="34" y="{_y(share) + 4:.1f}">{share}</text>'
        for share in (0, 25, 50, 75, 100)
    )
    ticks = "".join(
        f'<text class="tick" x="{_x(k, last):.1f}" y="266">{k}</text>'
        for k in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
        if k <= last
    )
    return (
        f'<figure><figcaption>R@k over k</figcaption><svg class="chart" viewBox="0 0 520 274" role="img" '
        f'aria-label="{escape("Recall curves. " + "; ".join(spoken))}">{grid}{ticks}'
        f'<path class="guess" d="{chance}"/>{"".join(lines)}</svg><ul class="keys">{"".join(keys)}</ul></figure>'
    )


def guessed_hits(ranks: RankResult, k: int) -> float:
    """R@k of scores that say nothing, in percent: 100 × mean of 1 − C(M − n, k) / C(M, k) for n right of M."""
    size = ranks.gallery
    numbers, counts = np.unique(ranks.relevant[ranks.answerable], return_counts=True)
    missed = [math.exp(_log_choose(size - n, k) - _log_choose(size, k)) for n in numbers.tolist()]
    return float(100 * (1 - np.average(missed, weights=counts)))


def _log_choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) if k <= n else -math.inf


def _key(sample: str, name: str) -> str:
    """A line of a legend; ``name`` is escaped already."""
    return f'<li><svg class="key" viewBox="0 0 28 12" aria-hidden="true">{sample}</svg>{name}</li>'


def _x(k: int, last: int) -> float:
    return 40 + 470 * math.log(k) / max(math.log(last), 1e-9)


def _y(share: float) -> float:
    return 244 - 2.24 * share


def _path(ranks: Sequence[int], shares: Sequence[float], last: int) -> str:
    places = [f"{_x(k, last):.1f} {_y(share):.1f}" for k, share in zip(ranks, shares, strict=True)]
    return "M" + "L".join(places if len(places) > 1 else [*places, f"{_x(ranks[0], last) + 4:.1f} {_y(shares[0]):.1f}"])


def gap_picture(result: ListResult, seed: int = 0) -> str:
    """The embeddings of some items on their two main axes: a mark per row, a line between the rows of one item.

    Where modalities lie apart, the lines are long and alike: the modality gap (Liang et al. 2022, arXiv 2203.02053).
    """
    drawn, points = _on_two_axes(result, seed)
    low, high = points.min(0), points.max(0)
    scale = float(max(high[0] - low[0], (high[1] - low[1]) * 2, 1e-9))
    middle = (low + high) / 2
    places = [(260 + 480 * (x - middle[0]) / scale, 130 - 480 * (y - middle[1]) / scale) for x, y in points]
    by_item: dict[int, list[int]] = {}
    for number, (_, item) in enumerate(drawn):
        by_item.setdefault(item, []).append(number)
    threads = "".join(
        f"M{places[a][0]:.1f} {places[a][1]:.1f}L{places[b][0]:.1f} {places[b][1]:.1f}"
        for numbers in by_item.values()
        for a, b in itertools.pairwise(numbers)
    )
    modalities = list(result.rows)
    marks = "".join(
        _mark(modalities.index(modality), *place) for (modality, _), place in zip(drawn, places, strict=True)
    )
    keys = "".join(
        _key(_mark(place, 14, 6), escape(modality))
        for place, modality in enumerate(modalities)
        if len(result.rows[modality].items)
    )
    pairs = result.diagnostics.get("pairs", {})
    spoken = ", ".join(f"{name} {figures['modality_gap']:.2f}" for name, figures in pairs.items())
    return (
        f'<figure><figcaption>Gap between modalities</figcaption><svg class="chart" viewBox="0 0 520 274" role="img" '
        f'aria-label="{escape("Embeddings on their two main axes. Distance between the means: " + spoken)}">'
        f'<path class="thread" d="{threads}"/>{marks}</svg><ul class="keys">{keys}</ul></figure>'
    )


def _on_two_axes(result: ListResult, seed: int) -> tuple[list[tuple[Modality, int]], Floats]:
    """``(modality, item)`` of the first row of each drawn item in each modality, and their ``(n, 2)`` places."""
    union: Integers = np.unique(np.concatenate([rows.items for rows in result.rows.values()]))
    count = min(GAP_ITEMS, len(union))
    chosen = np.sort(np.random.default_rng(seed).choice(union, count, replace=False))
    drawn, rows = [], []
    for modality, each in result.rows.items():
        items, first = np.unique(each.items, return_index=True)
        mine = np.isin(items, chosen)
        drawn += [(modality, int(item)) for item in items[mine]]
        rows.append(each.embeddings[torch.from_numpy(first[mine])].double().cpu())
    points = torch.cat(rows)
    points = points - points.mean(0)
    axes = torch.linalg.svd(points, full_matrices=False).Vh[:2]
    axes = axes * torch.sign(axes.gather(1, axes.abs().argmax(1, keepdim=True)))  # a side of an axis means nothing
    places = (points @ axes.T).numpy()
    return drawn, places if places.shape[1] == 2 else np.pad(places, ((0, 0), (0, 2 - places.shape[1])))


def _mark(kind: int, x: float, y: float) -> str:
    """A disc, a square, a triangle, a diamond, …: told apart without colour too."""
    colour = f"mark c{kind % _COLOURS}"
    if kind % 4 == 0:
        return f'<circle class="{colour}" cx="{x:.1f}" cy="{y:.1f}" r="3.4"/>'
    shape = {1: "M-3-3H3V3H-3Z", 2: "M0-4.2L4 3H-4Z", 3: "M0-4.4L4.4 0L0 4.4L-4.4 0Z"}[kind % 4]
    return f'<path class="{colour}" transform="translate({x:.1f} {y:.1f})" d="{shape}"/>'


def similarity_histogram(name: str, figures: Mapping[str, Any]) -> str:
    """Cosines of right and of wrong pairs of two modalities, each as shares of its own, from their diagnostics."""
    both = {kind: np.array(figures[kind]["counts"], np.float64) for kind in ("positives", "negatives")}
    shares = {kind: counts / max(counts.sum(), 1) for kind, counts in both.items()}
    tallest = max(float(each.max()) for each in shares.values()) or 1.0
    step = 300 / len(shares["positives"])
    bars = "".join(
        f'<path class="{kind}" d="M10 100'
        + "".join(f"V{100 - 80 * share / tallest:.1f}h{step:.2f}" for share in each)
        + 'V100Z"/>'
        for kind, each in shares.items()
    )
    means = {kind: figures[kind]["mean"] for kind in ("positives", "negatives")}
    spoken = "; ".join(f"{kind}: mean {mean:.2f}" for kind, mean in means.items() if mean is not None)
    ticks = "".join(f'<text class="tick" x="{160 + 150 * at:.0f}" y="114">{at}</text>' for at in (-1, -0.5, 0, 0.5, 1))
    title = escape(name).replace("-", "\u00a0–\u00a0", 1)
    return (
        f'<figure><figcaption>{title}</figcaption><svg class="chart" viewBox="0 0 320 120" role="img" '
        f'aria-label="{escape(f"Similarities of {name}: {spoken}")}">'
        f'<path class="axis" d="M10 100.5H310"/>{bars}{ticks}</svg></figure>'
    )
