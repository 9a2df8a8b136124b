"""Figures of classifiers: scikit-learn's where nothing ties, expectations where it does; zero-shot scores by hand."""

from __future__ import annotations

import itertools
import math
import warnings

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, balanced_accuracy_score, confusion_matrix, top_k_accuracy_score

from mmcl.evaluation.classification import average_precision, classify, wilson
from mmcl.evaluation.zero_shot import fill_prompts, zero_shot_scores


def scored(seed: int, samples: int = 200, classes: int = 9) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes - 1, (samples,), generator=random)  # the last class never occurs
    scores = torch.randn(samples, classes, generator=random) + 1.5 * torch.nn.functional.one_hot(labels, classes)
    return scores, labels


@pytest.mark.parametrize("seed", [0, 1])
def test_figures_are_those_of_scikit_learn_without_ties(seed: int) -> None:
    scores, labels = scored(seed)
    found = classify(scores, labels)
    figures, names = found.metrics(), range(9)
    for k in (1, 5):
        wanted = top_k_accuracy_score(labels, scores, k=k, labels=names)
        assert figures[f"top-{k}"] == pytest.approx(100 * wanted)
    answers = scores.argmax(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a class that is answered and never occurs
        assert figures["mean-per-class"] == pytest.approx(100 * balanced_accuracy_score(labels, answers))
    assert found.confusion.tolist() == confusion_matrix(labels, answers, labels=names).tolist()
    assert figures["ties"] == 0 and figures["samples"] == 200 and figures["classes"] == 9
    per_class = found.per_class()
    assert math.isnan(per_class[-1]) and np.mean(per_class[:-1]) == pytest.approx(figures["mean-per-class"])
    low, high = found.ci95()["top-1"]
    assert low < figures["top-1"] < high


def test_ties_are_expectations_over_every_order() -> None:
    scores, labels = torch.tensor([[2, 1, 1, 0, 1], [0, 0, 0, 0, 0], [1, 1, 0, 3, 3]]).float(), torch.tensor([2, 4, 0])
    for k, wanted in ((1, []), (5, [])):
        for row, label in zip(scores.tolist(), labels.tolist(), strict=True):
            orders = [sorted(order, key=lambda c: -row[c]) for order in itertools.permutations(range(5))]
            wanted.append(np.mean([label in order[:k] for order in orders]))
        assert classify(scores, labels).right[k].tolist() == pytest.approx(wanted)
    found = classify(scores, labels)
    assert found.ties == 3
    assert found.confusion[4, 0] == 1, "of equal scores the lowest number"
    constant = classify(torch.zeros(30, 5), torch.arange(30) % 5).metrics()
    assert constant["top-1"] == pytest.approx(20) and constant["mean-per-class"] == pytest.approx(20)


@pytest.mark.parametrize(
    ("scores", "labels", "words"),
    [
        (torch.zeros(3, 1), torch.zeros(3, dtype=torch.int64), "at least two classes"),
        (torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64), "at least two classes"),
        (torch.zeros(2, 3), torch.tensor([0, 3]), r"labels must lie in 0 … 2"),
        (torch.tensor([[0.0, math.nan]]), torch.tensor([0]), "finite"),
    ],
)
def test_what_cannot_be_judged(scores: torch.Tensor, labels: torch.Tensor, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        classify(scores, labels)


def test_the_interval_holds_its_share() -> None:
    """Of draws with a known share, 95 % of the intervals hold it; of all right none goes past 100."""
    drawn = np.random.default_rng(0).binomial(80, 0.9, 2000)
    inside = [low <= 90 <= high for low, high in (wilson(count / 80, 80) for count in drawn)]
    assert 0.93 < np.mean(inside) < 0.98
    low, high = wilson(1.0, 20)
    assert high == 100 and 80 < low < 90


@pytest.mark.parametrize("levels", [1000, 4])
def test_average_precision_is_that_of_scikit_learn(levels: int) -> None:
    """With four levels of scores nearly everything ties."""
    random = torch.Generator().manual_seed(levels)
    scores = torch.randint(0, levels, (60, 5), generator=random).float()
    relevant = torch.rand(60, 5, generator=random) < torch.tensor([0.5, 0.1, 0.9, 0.02, 0.0])
    relevant[3, 3] = True
    found = average_precision(scores, relevant)
    assert math.isnan(found[4])
    wanted = [average_precision_score(relevant[:, c], scores[:, c]) for c in range(4)]
    assert found[:4].tolist() == pytest.approx([100 * value for value in wanted])


def unit(*shape: int, seed: int) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(*shape, generator=random), dim=-1)


def test_prompts_by_mean_and_by_best() -> None:
    rows, sentences = unit(4, 6, seed=0), unit(3, 2, 6, seed=1)
    mean, best = zero_shot_scores(rows, sentences), zero_shot_scores(rows, sentences, prompts="max")
    for i, c in itertools.product(range(4), range(3)):
        middle = sentences[c, 0] + sentences[c, 1]
        assert mean[i, c] == pytest.approx(float(rows[i] @ middle / middle.norm()), abs=1e-6)
        assert best[i, c] == pytest.approx(max(float(rows[i] @ sentences[c, p]) for p in range(2)), abs=1e-6)


def test_views_by_embeddings_and_by_scores() -> None:
    views, sentences = unit(4, 3, 6, seed=2), unit(5, 1, 6, seed=3)
    middle = torch.nn.functional.normalize(views.mean(1), dim=-1)
    assert torch.allclose(zero_shot_scores(views, sentences), middle @ sentences[:, 0].T, atol=1e-6)
    scores = zero_shot_scores(views, sentences, views="scores", scale=10.0)
    wanted = torch.stack([(10 * views[:, v] @ sentences[:, 0].T).softmax(1) for v in range(3)]).mean(0)
    assert torch.allclose(scores, wanted, atol=1e-6)
    one = zero_shot_scores(views[:, :1], sentences, views="scores")
    assert torch.allclose(one, views[:, 0] @ sentences[:, 0].T, atol=1e-6), "one view is its cosines"


def test_prompts_that_cannot_be_filled() -> None:
    assert fill_prompts(["{}"], ["a {}"]) == ["a {}"], "a name is never a prompt"
    for names, prompts in (([], ["{}"]), (["a"], []), (["a"], ["no place"]), (["a"], ["{} {}"])):
        with pytest.raises(ValueError, match="once"):
            fill_prompts(names, prompts)
    with pytest.raises(ValueError, match="do not fit"):
        zero_shot_scores(torch.ones(2, 3), torch.ones(2, 1, 4))
