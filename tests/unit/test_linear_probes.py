"""Linear and few-shot probes: scikit-learn's answers, a λ that the test rows have no say in, episodes by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression, RidgeClassifier
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

from mmcl.evaluation.probes import choose_probe, few_shot, fit_logistic, fit_ridge, neighbour_votes
from mmcl.evaluation.probes.linear import held_out_rows


def spread(seed: int, rows: int = 90, width: int = 7, noise: float = 1.2) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows round three centres, on scales that differ a hundredfold."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.arange(rows) % 3
    centres = torch.randn(3, width, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    found = centres[labels] + noise * torch.randn(rows, width, generator=random, dtype=torch.float64)
    return found * torch.logspace(-1, 1, width, dtype=torch.float64) + 5, labels


def test_logistic_regression_is_that_of_scikit_learn() -> None:
    rows, labels = spread(0)
    tests = spread(1)[0]
    scaler = StandardScaler().fit(rows)
    penalties = [1e-3, 0.1, 1.0]
    probes = {probe.penalty: probe for probe in fit_logistic(rows, labels, classes=3, penalties=penalties)}
    for penalty in penalties:
        peer = LogisticRegression(C=1 / (len(rows) * penalty), solver="newton-cholesky", tol=1e-12, max_iter=10_000)
        peer.fit(scaler.transform(rows), labels)
        assert np.allclose(probes[penalty].weight, peer.coef_, atol=2e-4)
        wanted = peer.predict_proba(scaler.transform(tests))
        assert np.allclose(probes[penalty].scores(tests), wanted, atol=2e-5)


def test_ridge_is_that_of_scikit_learn() -> None:
    rows, labels = spread(0)
    tests = spread(1)[0]
    scaler = StandardScaler().fit(rows)
    for probe in fit_ridge(rows, labels, classes=3, penalties=[1e-3, 10.0]):
        peer = RidgeClassifier(alpha=len(rows) * probe.penalty).fit(scaler.transform(rows), labels)
        assert np.allclose(probe.scores(tests), peer.decision_function(scaler.transform(tests)), atol=1e-8)


@pytest.mark.parametrize("kind", ["logistic", "ridge"])
def test_features_that_never_change_and_copies_do_no_harm(kind: str) -> None:
    rows, labels = spread(0)
    rows = torch.cat([rows, rows[:, :2], torch.full((len(rows), 1), 3.0)], 1).float()
    probe = choose_probe(kind, rows, labels, classes=3, penalties=[0.0, 0.01])
    assert torch.isfinite(probe.scores(rows)).all()
    assert (probe.scores(rows).argmax(1) == labels).float().mean() > 0.7


def test_views_are_averaged_after_the_softmax() -> None:
    rows, labels = spread(0)
    (logistic,), (ridge,) = (fit(rows, labels, classes=3, penalties=[0.1]) for fit in (fit_logistic, fit_ridge))
    views = spread(2, rows=12)[0].view(4, 3, 7)
    for probe in (logistic, ridge):
        wanted = torch.stack([probe.scores(views[:, v]) for v in range(3)]).mean(0)
        assert torch.allclose(probe.scores(views), wanted)
    assert torch.allclose(logistic.scores(views).sum(1), torch.ones(4, dtype=torch.float64))


@pytest.mark.parametrize("kind", ["logistic", "ridge"])
def test_the_penalty_is_chosen_on_held_out_rows(kind: str) -> None:
    """Few rows, wide features, much noise: little penalty overfits. The choice is the best of the held-out figures."""
    random = torch.Generator().manual_seed(5)
    labels = torch.arange(60) % 2
    rows = torch.randn(60, 80, generator=random, dtype=torch.float64)
    rows[:, 0] += 3 * labels
    probe = choose_probe(kind, rows, labels, classes=2, penalties=[1e-8, 1e-4, 1e-1, 10.0])
    assert set(probe.held_out) == {1e-8, 1e-4, 1e-1, 10.0}
    best = max(probe.held_out.values())
    assert probe.penalty == max(penalty for penalty, value in probe.held_out.items() if value == best)
    fit = {"logistic": fit_logistic, "ridge": fit_ridge}[kind]
    held = held_out_rows(labels)
    for rest in fit(rows[~held], labels[~held], classes=2, penalties=list(probe.held_out)):
        share = (rest.scores(rows[held]).argmax(1) == labels[held]).double().mean()
        assert probe.held_out[rest.penalty] == pytest.approx(100 * float(share)), "what is held out is not learned from"
    (alone,) = fit(rows, labels, classes=2, penalties=[probe.penalty])
    assert torch.allclose(alone.weight, probe.weight, atol=1e-5), "of all rows, not of the rest alone"


def test_what_is_held_out_is_a_share_of_each_class_and_keeps_views_together() -> None:
    labels = torch.tensor([0] * 20 + [1] * 10 + [2] * 3 + [3])
    held = held_out_rows(labels)
    assert [int((held & (labels == each)).sum()) for each in range(4)] == [4, 2, 1, 0]
    assert torch.equal(held, held_out_rows(labels)) and not torch.equal(held, held_out_rows(labels, seed=1))
    groups = np.arange(34) // 2
    assert (held_out_rows(labels, groups=groups)[::2] == held_out_rows(labels, groups=groups)[1::2]).all()


def test_a_probe_needs_two_classes() -> None:
    rows = torch.randn(4, 2)
    for fit in (fit_logistic, fit_ridge):
        with pytest.raises(ValueError, match="at least two of 3 classes"):
            list(fit(rows, torch.ones(4, dtype=torch.int64), classes=3))
        with pytest.raises(ValueError, match="penalties"):
            list(fit(rows, torch.arange(4), classes=4, penalties=[-1.0]))


def test_neighbours_vote_as_in_scikit_learn() -> None:
    rows, labels = spread(0)
    tests = spread(1)[0]

    def weights(distances: np.ndarray) -> np.ndarray:
        return np.exp((1 - distances) / 0.1)

    peer = KNeighborsClassifier(15, weights=weights, metric="cosine", algorithm="brute").fit(rows, labels)
    votes = neighbour_votes(tests, rows, labels, classes=3, neighbours=15, temperature=0.1, block=7)
    assert np.allclose(votes / votes.sum(1, keepdim=True), peer.predict_proba(tests))


def test_episodes_by_hand() -> None:
    """One example of each of two classes; the rest are asked."""
    rows = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.8, 0.1], [0.0, 1.0], [0.1, 0.7], [0.9, 0.2]])
    labels = torch.tensor([4, 4, 4, 7, 7, 7])
    found = few_shot(rows, labels, ways=2, shots=2, queries=5, episodes=400)
    assert (found.queries, found.usable_classes) == (1, 2)
    unit = torch.nn.functional.normalize(rows, dim=1)
    wanted = []
    for first in range(3):
        for second in range(3):
            split = [[i for i in range(3) if i != first], [3 + i for i in range(3) if i != second]]
            prototypes = torch.nn.functional.normalize(torch.stack([unit[each].mean(0) for each in split]), dim=1)
            asked = unit[[first, 3 + second]] @ prototypes.T
            wanted.append(100 * float((asked.argmax(1) == torch.arange(2)).float().mean()))
    assert 50 < np.mean(wanted) < 100
    assert abs(found.mean - np.mean(wanted)) < 2 * found.half_width
    deviation = math.sqrt(np.var(wanted) / 400) * 1.96
    assert found.half_width == pytest.approx(deviation, rel=0.2)


def test_episodes_are_a_function_of_the_seed() -> None:
    rows, labels = spread(3)
    one, same, other = (few_shot(rows, labels, ways=3, queries=5, episodes=50, seed=seed) for seed in (1, 1, 2))
    assert one == same and one.mean != other.mean
    easy = few_shot(spread(0, noise=0.01)[0] - 5, labels, ways=3, shots=5, episodes=20)
    assert easy.mean == 100 and easy.half_width == 0
    chance = few_shot(torch.ones(90, 4), labels, ways=3, episodes=5)
    assert chance.mean == pytest.approx(100 / 3)
    with pytest.raises(ValueError, match="0 classes have at least 31 rows; 3 are needed"):
        few_shot(rows, labels, ways=3, shots=30)
    with pytest.raises(ValueError, match="3 classes have at least 2 rows; 5 are needed"):
        few_shot(rows, labels)
