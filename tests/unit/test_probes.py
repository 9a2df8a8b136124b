"""Nearest neighbours: equal to a loop over the formula, whatever the block; wrong input is named."""

from __future__ import annotations

import math

import pytest
import torch

from mmcl.evaluation.probes import neighbour_accuracy


def by_hand(
    queries: torch.Tensor, labels: list[int], bank: torch.Tensor, known: list[int], neighbours: int, temperature: float
) -> float:
    right = 0
    for query, label in zip(queries, labels, strict=True):
        cosines = [float(query @ row / (query.norm() * row.norm())) for row in bank]
        nearest = sorted(range(len(bank)), key=lambda i: -cosines[i])[:neighbours]
        votes = dict.fromkeys(range(10), 0.0)
        for i in nearest:
            votes[known[i]] += math.exp(cosines[i] / temperature)
        right += max(votes, key=votes.__getitem__) == label
    return 100 * right / len(queries)


@pytest.mark.parametrize(("neighbours", "temperature"), [(1, 0.1), (4, 0.1), (7, 1.0), (99, 0.3)])
def test_votes_are_those_of_the_formula(neighbours: int, temperature: float) -> None:
    random = torch.Generator().manual_seed(neighbours)
    centres = torch.randn(4, 6, generator=random, dtype=torch.float64)
    known, labels = torch.arange(30) % 4, torch.arange(50) * 7 % 5  # class 4 is not in the bank
    bank = centres[known] + 1.5 * torch.randn(30, 6, generator=random, dtype=torch.float64)
    queries = centres[labels % 4] + 1.5 * torch.randn(50, 6, generator=random, dtype=torch.float64)
    wanted = by_hand(queries, labels.tolist(), bank, known.tolist(), neighbours, temperature)
    assert 20 < wanted < 80
    for block in (7, 1024):
        found = neighbour_accuracy(
            3 * queries, labels, bank, known, neighbours=neighbours, temperature=temperature, block=block
        )
        assert found == pytest.approx(wanted)


def test_a_low_temperature_does_not_overflow() -> None:
    rows, labels = torch.eye(3), torch.arange(3)
    assert neighbour_accuracy(rows, labels, rows, labels, temperature=1e-3) == 100


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"queries": torch.zeros(0, 2), "query_labels": torch.zeros(0, dtype=torch.int64)}, "queries: rows"),
        ({"queries": torch.zeros(3, 5)}, "queries: rows"),
        ({"bank_labels": torch.zeros(2, dtype=torch.int64)}, "bank: rows"),
        ({"bank_labels": torch.tensor([0, 1, -1])}, "bank: labels must be at least 0, got -1"),
        ({"neighbours": 0}, "neighbours >= 1"),
        ({"temperature": 0.0}, "temperature > 0"),
    ],
)
def test_wrong_input_is_named(change: dict[str, object], words: str) -> None:
    labels = torch.arange(3)
    good: dict = {"queries": torch.ones(3, 2), "query_labels": labels, "bank": torch.ones(3, 2), "bank_labels": labels}
    with pytest.raises(ValueError, match=words):
        neighbour_accuracy(**{**good, **change})
