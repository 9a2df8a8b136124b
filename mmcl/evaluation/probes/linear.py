"""Linear classifiers on frozen features: ridge regression in closed form, logistic regression by L-BFGS.

The strength of the penalty is chosen on a held-out part of the training rows; the test rows have no say in it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mmcl.evaluation.classification import classify
from mmcl.hashing import hash64
from mmcl.progress import show_progress

Kind = Literal["logistic", "ridge"]

PENALTIES = tuple(10.0**power for power in range(-8, 3))
"""λ of the sweep"""
HELD_OUT = 0.2
"""share of each class that λ is chosen on"""

_FOLD = 33
"""what a random number is for"""


@dataclass(frozen=True, eq=False)
class LinearProbe:
    """A linear classifier of standardised features."""

    weight: Tensor
    """``(C, D)``"""
    bias: Tensor
    """``(C,)``"""
    mean: Tensor
    """``(D,)``, subtracted from the features"""
    deviation: Tensor
    """``(D,)``, by which they are divided"""
    kind: Kind
    penalty: float
    """λ"""
    held_out: dict[float, float] = field(default_factory=dict)
    """λ → top-1 in percent on the rows that it was chosen on"""

    def scores(self, rows: Tensor) -> Tensor:
        """``(n, C)`` of rows ``(n, D)``, or of ``(n, views, D)``: the mean over the views of what each gives.

        That is a softmax (logistic; video papers average so) or the plain output (ridge).
        """
        found = F.linear((rows - self.mean) / self.deviation, self.weight, self.bias)
        if self.kind == "logistic":
            found = found.softmax(-1)
        return found if rows.ndim == 2 else found.mean(1)


def fit_logistic(
    rows: Tensor,
    labels: Tensor,
    *,
    classes: int,
    penalties: Sequence[float] = PENALTIES,
    steps: int = 1000,
) -> Iterator[LinearProbe]:
    """Multinomial logistic regression for each λ, the largest first: each starts where the one before it ended.

    Minimises the mean cross-entropy + λ/2 · ‖W‖² with W on standardised features, the bias free (scikit-learn's
    ``LogisticRegression`` with C = 1 / (n λ)).

    Args:
        rows: ``(n, D)`` float32 or float64, which is what is computed in.
        labels: int64 ``(n,)`` in 0 … classes − 1.
        steps: of L-BFGS, at most.

    Raises:
        ValueError: nothing to learn from: fewer than two classes in the labels, shapes that disagree, a λ below 0.
    """
    features, mean, deviation = _standardised(rows, labels, classes, penalties)
    weight = torch.zeros(classes, rows.shape[1], dtype=rows.dtype, device=rows.device, requires_grad=True)
    bias = torch.zeros(classes, dtype=rows.dtype, device=rows.device, requires_grad=True)
    fine = rows.dtype == torch.float64
    for penalty in sorted(penalties, reverse=True):
        optimizer = torch.optim.LBFGS(
            [weight, bias],
            max_iter=steps,
            history_size=20,
            line_search_fn="strong_wolfe",
            tolerance_grad=1e-9 if fine else 1e-6,
            tolerance_change=1e-14 if fine else 1e-9,
        )

        def loss(penalty: float = penalty, optimizer: torch.optim.LBFGS = optimizer) -> Tensor:
            optimizer.zero_grad()
            value = F.cross_entropy(F.linear(features, weight, bias), labels) + penalty / 2 * weight.square().sum()
            value.backward()  # type: ignore[no-untyped-call]
            return value

        with torch.enable_grad():
            optimizer.step(loss)  # type: ignore[no-untyped-call]
        yield LinearProbe(weight.detach().clone(), bias.detach().clone(), mean, deviation, "logistic", penalty)


def fit_ridge(
    rows: Tensor, labels: Tensor, *, classes: int, penalties: Sequence[float] = PENALTIES
) -> Iterator[LinearProbe]:
    """Ridge regression on ±1 targets for each λ, the largest first, from one eigendecomposition.

    Minimises mean ‖W x + b − y‖² + λ ‖W‖² with W on standardised features, the bias free (scikit-learn's
    ``RidgeClassifier`` with alpha = n λ). Arguments and errors as :func:`fit_logistic`.
    """
    features, mean, deviation = _standardised(rows, labels, classes, penalties)
    targets = 2 * F.one_hot(labels, classes).to(rows.dtype) - 1
    bias = targets.mean(0)  # of standardised features, whose mean is 0
    values, vectors = torch.linalg.eigh(features.T @ features / len(rows))
    turned = vectors.T @ (features.T @ (targets - bias)) / len(rows)
    for penalty in sorted(penalties, reverse=True):
        # a direction without spread is one that the features say nothing of
        shrunk = torch.where(values > 1e-7 * values[-1], 1 / (values.clamp_min(0) + penalty), 0)
        weight = (vectors @ (shrunk[:, None] * turned)).T
        yield LinearProbe(weight, bias, mean, deviation, "ridge", penalty)


def choose_probe(
    kind: Kind,
    rows: Tensor,
    labels: Tensor,
    *,
    classes: int,
    penalties: Sequence[float] = PENALTIES,
    groups: Sequence[int] | None = None,
    seed: int = 0,
    quiet: bool = True,
) -> LinearProbe:
    """A probe of all rows with the λ that does best on a held-out fifth of them; of equally good ones the largest.

    Args:
        groups: a number for each row; rows of one (views of one video) stay on one side. Default: each its own.
        seed: of what is held out.
        quiet: shows no progress.

    Raises:
        ValueError: as :func:`fit_logistic`.
    """
    fit = {"logistic": fit_logistic, "ridge": fit_ridge}[kind]
    held = held_out_rows(labels, groups=groups, seed=seed)
    found: dict[float, float] = {}
    if len(penalties) > 1 and bool(held.any()):
        with show_progress("linear probe", "penalties", quiet=quiet) as show:
            for probe in fit(rows[~held], labels[~held], classes=classes, penalties=penalties):
                found[probe.penalty] = classify(probe.scores(rows[held]), labels[held]).metrics()["top-1"]
                show(len(found), len(penalties), "")
    best = max(found, key=lambda penalty: (found[penalty], penalty), default=max(penalties))
    # down the same path, for the sake of the start
    path = [penalty for penalty in penalties if penalty >= best]
    *_, probe = fit(rows, labels, classes=classes, penalties=path if kind == "logistic" else [best])
    return LinearProbe(probe.weight, probe.bias, probe.mean, probe.deviation, kind, best, found)


def held_out_rows(
    labels: Tensor, *, share: float = HELD_OUT, groups: Sequence[int] | None = None, seed: int = 0
) -> Tensor:
    """bool ``(n,)``: of each class with several groups the nearest number to ``share`` of these, at least one."""
    numbers = np.arange(len(labels)) if groups is None else np.asarray(groups)
    classes = labels.cpu().numpy()
    first = np.unique(numbers, return_index=True)[1]  # a group counts for the class of its first row
    held: list[int] = []
    for label in np.unique(classes[first]):
        members = numbers[first[classes[first] == label]]
        if len(members) > 1:
            order = np.argsort(hash64(seed, _FOLD, members), kind="stable")
            held += members[order[: max(1, round(share * len(members)))]].tolist()
    return torch.from_numpy(np.isin(numbers, held)).to(labels.device)


def _standardised(
    rows: Tensor, labels: Tensor, classes: int, penalties: Sequence[float]
) -> tuple[Tensor, Tensor, Tensor]:
    if rows.ndim != 2 or labels.shape != rows.shape[:1] or not len(rows):
        raise ValueError(f"rows (n, D) with a label each are needed, got {tuple(rows.shape)} and {tuple(labels.shape)}")
    if len(torch.unique(labels)) < 2 or not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise ValueError(f"labels of at least two of {classes} classes are needed")
    if not penalties or min(penalties) < 0:
        raise ValueError(f"penalties must be at least 0, got {list(penalties)}")
    mean, deviation = rows.mean(0), rows.std(0, correction=0)
    deviation = torch.where(deviation > 1e-12, deviation, 1)
    return (rows - mean) / deviation, mean, deviation
