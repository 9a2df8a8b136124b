"""Figures of a classifier from its scores: what was right, for how many, and what was taken for what."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

TOP = (1, 5)


@dataclass(frozen=True, eq=False)
class ClassificationResult:
    """How a classifier did on samples of one class each."""

    right: Mapping[int, Tensor]
    """float64 ``(n,)`` for each k: the chance that the true class is among the k best, over random order of ties"""
    labels: Tensor
    """int64 ``(n,)``"""
    confusion: Tensor
    """int64 ``(C, C)``: samples of class t (row) taken for class p; of equal scores the lowest number"""
    ties: int
    """samples whose true class shares its score with another"""

    def metrics(self) -> dict[str, float]:
        """``top-K`` and ``mean-per-class`` (of the classes that occur) in percent, and counts."""
        classes, place = torch.unique(self.labels, return_inverse=True)
        sums = torch.zeros(len(classes), dtype=torch.float64).index_add_(0, place, self.right[1])
        per_class = sums / torch.bincount(place)
        return {
            **{f"top-{k}": 100 * float(values.mean()) for k, values in self.right.items()},
            "mean-per-class": 100 * float(per_class.mean()),
            "samples": float(len(self.labels)),
            "classes": float(len(self.confusion)),
            "ties": float(self.ties),
        }

    def ci95(self) -> dict[str, tuple[float, float]]:
        """Wilson's 95 % intervals of ``top-K``, in percent."""
        return {f"top-{k}": wilson(float(values.mean()), len(values)) for k, values in self.right.items()}

    def per_class(self) -> list[float]:
        """Percent right of each class; NaN where none of its samples occur."""
        counts = self.confusion.sum(1)
        sums = torch.zeros(len(counts), dtype=torch.float64).index_add_(0, self.labels, self.right[1])
        return [float(value) for value in 100 * sums / counts]


def classify(scores: Tensor, labels: Tensor) -> ClassificationResult:
    """Judges scores, ``(n, C)``, higher is better, by the true classes, int64 ``(n,)``.

    With g classes better than the true one and m as good (itself among them), it is among the k best with chance
    (k − g) / m, held within 0 … 1: constant scores give exactly k / C.

    Raises:
        ValueError: no sample, fewer than two classes, labels that are no class, or scores that are not finite.

    >>> classify(torch.tensor([[0.1, 0.7], [0.4, 0.4]]), torch.tensor([1, 0])).metrics()["top-1"]
    75.0
    """
    if scores.ndim != 2 or scores.shape[1] < 2 or not len(scores) or labels.shape != scores.shape[:1]:
        shapes = f"{tuple(scores.shape)} and {tuple(labels.shape)}"
        raise ValueError(f"scores (n, C) of at least two classes with a label each are needed, got {shapes}")
    scores, labels = scores.detach().cpu(), labels.cpu()
    if not 0 <= int(labels.min()) <= int(labels.max()) < scores.shape[1]:
        raise ValueError(f"labels must lie in 0 … {scores.shape[1] - 1}")
    if not bool(torch.isfinite(scores).all()):
        raise ValueError("scores must be finite")
    own = scores.gather(1, labels[:, None])
    better, equal = (scores > own).sum(1), (scores == own).sum(1)
    right = {k: ((k - better) / equal).clamp(0, 1).double() for k in TOP}
    classes = scores.shape[1]
    taken = torch.bincount(labels * classes + _first_best(scores), minlength=classes * classes)
    return ClassificationResult(right, labels, taken.view(classes, classes), int((equal > 1).sum()))


def _first_best(scores: Tensor) -> Tensor:
    """``argmax`` where the lowest number wins, which torch does not promise."""
    numbers = torch.arange(scores.shape[1]).expand_as(scores)
    return numbers.masked_fill(scores < scores.amax(1, keepdim=True), scores.shape[1]).amin(1)


def wilson(share: float, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share, in percent.

    Source: Wilson 1927, JASA 22 (158).

    >>> [round(bound, 1) for bound in wilson(0.5, 100)]
    [40.4, 59.6]
    """
    z = 1.959963984540054
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count)) / (1 + z * z / count)
    return 100 * max(0.0, middle - half), 100 * min(1.0, middle + half)


def average_precision(scores: Tensor, relevant: Tensor) -> Tensor:
    """float64 ``(C,)`` in percent: each class's average precision over all samples; NaN where no sample has it.

    AP = Σ (recall_i − recall_(i−1)) · precision_i over falling thresholds; equal scores share one threshold.

    Args:
        scores: ``(n, C)``, higher is better.
        relevant: bool ``(n, C)``: the classes of each sample, any number of them.

    Raises:
        ValueError: shapes that differ.

    >>> average_precision(torch.tensor([[0.9], [0.8], [0.1]]), torch.tensor([[True], [False], [True]])).tolist()
    [83.33333333333333]
    """
    if scores.shape != relevant.shape or scores.ndim != 2:
        raise ValueError(f"scores and relevant must be (n, C), got {tuple(scores.shape)} and {tuple(relevant.shape)}")
    found = torch.full((scores.shape[1],), math.nan, dtype=torch.float64)
    for number in range(scores.shape[1]):
        wanted = relevant[:, number]
        if not bool(wanted.any()):
            continue
        values, order = scores[:, number].sort(descending=True)
        hits = wanted[order].double().cumsum(0)
        last = torch.cat([values[1:] != values[:-1], torch.tensor([True], device=values.device)])
        ranks = torch.arange(1, len(values) + 1, dtype=torch.float64, device=values.device)
        hits, ranks = hits[last], ranks[last]
        gained = torch.diff(hits, prepend=hits.new_zeros(1)) / hits[-1]
        found[number] = 100 * float((gained * hits / ranks).sum())
    return found
