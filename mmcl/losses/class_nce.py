"""Compositional contrastive learning: contrast by class, and agreement of class predictions."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mmcl.losses._checks import labels_of, matrices, positive
from mmcl.losses._math import full_precision, masked_logsumexp, row_mean, unit


@full_precision
def class_nce(features: Tensor, other: Tensor, labels: Tensor, *, temperature: float | Tensor) -> Tensor:
    """Rows of the same class attract, rows of other classes repel; one direction, ``features`` → ``other``.

    With P = softmax over rows of ``other``: −mean log P over rows of the same class (its own partner is one of them)
    − mean log(1 − P) over rows of other classes.

    Args:
        features: float ``(B, D)``, normalised inside.
        other: float ``(B, D)``, normalised inside; gradients reach both sides.
        labels: integer ``(B,)``, the class of row i of both; rows without a class are the caller's to leave out.
        temperature: divides the cosine; above 0, a number or 0-d tensor (0.5 for audio, 0.1 for images in the authors'
            code).

    Returns:
        0-d, ≥ 0, in nats: mean over rows; 0 without rows. In a batch of one class the second mean is 0.

    Raises:
        ValueError: shapes disagree, labels are not integers, or the temperature is not above 0.

    Source: Chen et al. 2021 (arXiv 2104.10955), section 3.

    >>> rows = torch.ones(4, 2)
    >>> f"{class_nce(rows, rows, torch.arange(4), temperature=0.5):.4f}"  # log 4 - log(3/4)
    '1.6740'
    """
    matrices(features=features, other=other)
    labels_of(labels, len(features))
    positive("temperature", temperature)
    same = labels[:, None] == labels
    return row_mean(class_nce_rows(features, other, same, ~same, temperature))


@full_precision
def class_nce_rows(
    features: Tensor, other: Tensor, same: Tensor, different: Tensor, temperature: float | Tensor
) -> Tensor:
    """The value of each row ``(B,)`` against any ``(N, D)``; ``same`` and ``different``: bool ``(B, N)``, disjoint.

    Columns that are neither take no part in the softmax of their row; each row has one of ``same``.
    """
    logits = (unit(features) @ unit(other).T / temperature).masked_fill(~(same | different), float("-inf"))
    attract = -_mean_where(logits.log_softmax(1), same)
    if len(other) < 2:
        return attract
    return attract - _mean_where(_log_complement(logits), different)


def _mean_where(values: Tensor, chosen: Tensor) -> Tensor:
    """Row means ``(B,)`` over the chosen entries; 0 where there are none."""
    return values.masked_fill(~chosen, 0.0).sum(1) / chosen.sum(1).clamp_min(1)


def _log_complement(logits: Tensor) -> Tensor:
    """log(1 − softmax) of rows of two or more, exact also where the softmax rounds to 1."""
    total = logits.logsumexp(1, keepdim=True)
    # only the largest entry can be above 1/2: its complement is the sum of the others, for these log1p has all digits
    largest = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, logits.argmax(1, keepdim=True), True)
    others = masked_logsumexp(logits, largest)[:, None] - total
    rest = torch.log1p(-(logits - total).masked_fill(largest, float("-inf")).exp())
    return torch.where(largest, others, rest)


@full_precision
def jeffreys(logits_p: Tensor, logits_q: Tensor) -> Tensor:
    """½ · mean over rows of KL(p‖q) + KL(q‖p); half of Jeffreys' divergence, without the mixture of Jensen–Shannon.

    Args:
        logits_p: float ``(B, K)``.
        logits_q: float ``(B, K)``; gradients reach both sides.

    Returns:
        0-d, ≥ 0, in nats: mean over rows; 0 without rows.

    Raises:
        ValueError: shapes differ or are not 2-d.

    Source: Chen et al. 2021 (arXiv 2104.10955), section 3, as the authors' code computes it.

    >>> f"{jeffreys(torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0, 0.0]])):.4f}"
    '0.1155'
    """
    matrices(logits_p=logits_p, logits_q=logits_q)
    log_p, log_q = logits_p.log_softmax(1), logits_q.log_softmax(1)
    return row_mean(((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(1)) / 2


@full_precision
def jensen_shannon(logits_p: Tensor, logits_q: Tensor) -> Tensor:
    """½ · mean over rows of KL(p‖m) + KL(q‖m) with the mixture m = (p + q) / 2: bounded, where Jeffreys' is not.

    Args:
        logits_p: float ``(B, K)``.
        logits_q: float ``(B, K)``; gradients reach both sides.

    Returns:
        0-d in [0, log 2], in nats: mean over rows; 0 without rows.

    Raises:
        ValueError: shapes differ or are not 2-d.

    Source: Lin 1991, "Divergence measures based on the Shannon entropy", eq. 4.1 with equal weights.

    >>> f"{jensen_shannon(torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0, 0.0]])):.4f}"
    '0.0285'
    """
    matrices(logits_p=logits_p, logits_q=logits_q)
    log_p, log_q = logits_p.log_softmax(1), logits_q.log_softmax(1)
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    return row_mean((log_p.exp() * (log_p - log_m) + log_q.exp() * (log_q - log_m)).sum(1)) / 2
