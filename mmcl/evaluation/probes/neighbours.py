"""Weighted nearest neighbours."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def neighbour_votes(
    queries: Tensor,
    bank: Tensor,
    bank_labels: Tensor,
    *,
    classes: int,
    neighbours: int = 20,
    temperature: float = 0.1,
    block: int = 1024,
) -> Tensor:
    """``(Q, classes)``: the votes of the nearest rows of the bank, each vector of votes relative to its strongest row.

    A row at cosine c votes for its class with exp(c / temperature); the nearest with 1, so that none overflows.

    Args:
        queries: float ``(Q, D)``, normalised inside.
        bank: float ``(M, D)``, normalised inside.
        bank_labels: int64 ``(M,)``, in 0 … classes − 1.
        neighbours: rows that vote; at most all of the bank do.
        temperature: above 0.
        block: queries compared at a time; changes nothing but memory.

    Raises:
        ValueError: no query, no bank, shapes that disagree, a label that is no class, or a number that is not above 0.

    Source: Wu et al. 2018 (arXiv 1805.01978), section 3.4.
    """
    _check("queries", queries, None, bank)
    _check("bank", bank, bank_labels, bank)
    if int(bank_labels.max()) >= classes:
        raise ValueError(f"bank: labels must be below {classes}, got {int(bank_labels.max())}")
    if neighbours < 1 or not temperature > 0:
        raise ValueError(f"need neighbours >= 1 and temperature > 0, got {neighbours} and {temperature}")
    rows, asked = F.normalize(bank, dim=1), F.normalize(queries, dim=1)
    votes = asked.new_zeros(len(asked), classes)
    for start in range(0, len(asked), block):
        part = slice(start, start + block)
        cosines, found = (asked[part] @ rows.T).topk(min(neighbours, len(rows)), dim=1)
        weights = ((cosines - cosines[:, :1]) / temperature).exp()
        votes[part].scatter_add_(1, bank_labels[found], weights)
    return votes


def neighbour_accuracy(
    queries: Tensor,
    query_labels: Tensor,
    bank: Tensor,
    bank_labels: Tensor,
    *,
    neighbours: int = 20,
    temperature: float = 0.1,
    block: int = 1024,
) -> float:
    """Percent of queries whose class gets most of the votes of their nearest rows in the bank (weighted k-NN).

    A row at cosine c votes with exp(c / temperature). Of classes with equal votes the lowest number wins.

    Args:
        queries: float ``(Q, D)``, normalised inside.
        query_labels: int64 ``(Q,)``, ≥ 0.
        bank: float ``(M, D)``, normalised inside.
        bank_labels: int64 ``(M,)``, ≥ 0.
        neighbours: rows that vote; at most all of the bank do.
        temperature: above 0.
        block: queries compared at a time; changes nothing but memory.

    Raises:
        ValueError: no query, no bank, shapes that disagree, a label below 0, or a number that is not above 0.

    Source: Wu et al. 2018 (arXiv 1805.01978), section 3.4.

    >>> bank = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    >>> neighbour_accuracy(torch.tensor([[3.0, 1.0], [1.0, 2.0]]), torch.tensor([5, 5]), bank, torch.tensor([5, 2]))
    50.0
    """
    _check("queries", queries, query_labels, bank)
    _check("bank", bank, bank_labels, bank)
    votes = neighbour_votes(
        queries,
        bank,
        bank_labels,
        classes=int(torch.maximum(query_labels.max(), bank_labels.max())) + 1,
        neighbours=neighbours,
        temperature=temperature,
        block=block,
    )
    return 100 * float((votes.argmax(1) == query_labels).double().mean())


def _check(name: str, rows: Tensor, labels: Tensor | None, bank: Tensor) -> None:
    if (
        rows.ndim != 2
        or not len(rows)
        or rows.shape[1] != bank.shape[1]
        or len(rows) != len(rows if labels is None else labels)
    ):
        shapes = f"{tuple(rows.shape)}" + ("" if labels is None else f" and {tuple(labels.shape)}")
        raise ValueError(f"{name}: rows (n, D) with a label each are needed, of one width, got {shapes}")
    if labels is not None and int(labels.min()) < 0:
        raise ValueError(f"{name}: labels must be at least 0, got {int(labels.min())}")
