"""Ranks and metrics of retrieval: every figure equals the mean over all orders of what is tied."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmcl.evaluation import streaming
from mmcl.evaluation.bootstrap import bootstrap_ci
from mmcl.evaluation.ranking import ranks, retrieval_metrics
from mmcl.types import ConfigError


def as_rows(scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Queries and gallery whose dot products are exactly ``scores``."""
    return np.asarray(scores, np.float64), np.eye(scores.shape[1])


def orders(scores: np.ndarray) -> list[tuple[int, ...]]:
    """Every order of the gallery by falling score."""
    levels = [np.flatnonzero(scores == value).tolist() for value in sorted(set(scores.tolist()), reverse=True)]
    return [tuple(itertools.chain(*parts)) for parts in itertools.product(*map(itertools.permutations, levels))]


def brute_force(scores: np.ndarray, relevant: list[list[int]]) -> dict[str, float]:
    """The metrics from their definitions, averaged over every order of the ties, then over the queries."""
    columns: dict[str, list[float]] = {}
    for row, right in zip(scores, relevant, strict=True):
        if not right:
            continue
        found = [[float(item in right) for item in order] for order in orders(row)]
        means: dict[str, list[float]] = {}
        for hits in found:
            for k in (1, 5, 10, 50):
                means.setdefault(f"R@{k}", []).append(100 * max(hits[:k]))
                means.setdefault(f"recall@{k}", []).append(100 * sum(hits[:k]) / len(right))
            for k in (5, 10, 50):
                precision = sum(hit * sum(hits[: place + 1]) / (place + 1) for place, hit in enumerate(hits[:k]))
                means.setdefault(f"mAP@{k}", []).append(100 * precision / min(k, len(right)))
            gain = sum(hit / math.log2(place + 2) for place, hit in enumerate(hits[:10]))
            ideal = sum(1 / math.log2(place + 2) for place in range(min(10, len(right))))
            means.setdefault("nDCG@10", []).append(100 * gain / ideal)
            means.setdefault("rank", []).append(hits.index(1.0) + 1)
        for name, values in means.items():
            columns.setdefault(name, []).append(float(np.mean(values)))
    every_rank = columns.pop("rank")
    figures = {name: float(np.mean(values)) for name, values in columns.items()}
    return {**figures, "MedR": float(np.median(every_rank)), "MnR": float(np.mean(every_rank))}


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("sort_above", [0, 8], ids=["sorted", "compared"])
def test_equals_every_order_of_the_ties(seed: int, sort_above: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "_SORT_ABOVE", sort_above)
    random = np.random.default_rng(seed)
    scores = random.integers(0, 3, size=(5, 7)) / 4
    relevant = [random.choice(7, size=random.integers(1, 5), replace=False).tolist() for _ in range(5)]
    relevant[seed % 5] = []
    found = retrieval_metrics(*as_rows(scores), relevant)
    for name, value in brute_force(scores, relevant).items():
        assert found[name] == pytest.approx(value, abs=1e-9), name
    assert (found["queries"], found["gallery"], found["unanswerable"]) == (4, 7, 1)


def test_equals_every_order_beyond_the_tenth_place() -> None:
    scores = np.array([[9, 8, 7, 6, 5, 4, 3, 2, 1, 1, 1, 1, 0], [1, 1, 1, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0]]) / 16
    relevant = [[9, 11, 12], [0, 3]]
    scores, relevant = np.concatenate([scores, scores]), [*relevant, [*range(11)], [*range(1, 13)]]
    found = retrieval_metrics(*as_rows(scores), relevant)
    for name, value in brute_force(scores, relevant).items():
        assert found[name] == pytest.approx(value, abs=1e-9), name


@pytest.mark.parametrize("size", [1, 3, 7, 9, 10, 33, 49, 1003])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_constant_scores_are_exactly_chance(size: int, dtype: torch.dtype) -> None:
    row = torch.nn.functional.normalize(torch.randn(1, 65, generator=torch.Generator().manual_seed(size)))
    rows = row.expand(size, 65).to(dtype).contiguous()
    found = retrieval_metrics(rows, rows)
    for k in (1, 5, 10):
        assert found[f"R@{k}"] == 100 * min(k, size) / size
    assert found["MnR"] == found["MedR"] == (size + 1) / 2
    assert found["ties"] == (size if size > 1 else 0)


@pytest.mark.parametrize("shape", [(1, 7, 3), (5, 33, 64), (64, 129, 100), (129, 1003, 65)])
def test_duplicates_in_the_gallery_tie_exactly(shape: tuple[int, int, int]) -> None:
    """A bare matrix product rounds equal columns differently at the edge of its tiles: measured on these shapes."""
    queries, gallery, width = shape
    random = torch.Generator().manual_seed(0)
    distinct = torch.nn.functional.normalize(torch.randn(gallery, width, generator=random))
    asked = torch.nn.functional.normalize(torch.randn(queries, width, generator=random))
    relevant = [[row % gallery] for row in range(queries)]
    once = ranks(asked, distinct, relevant)
    twice = ranks(asked, torch.cat([distinct, distinct.flip(0)]), relevant)
    assert (twice.tied == 2 * once.tied).all()
    assert (twice.better == 2 * once.better).all()


def test_the_right_answer_is_compared_by_its_own_product() -> None:
    """Each query is its own answer: nothing may lie above it but what truly scores more, and it ties with itself."""
    rows = torch.nn.functional.normalize(torch.randn(301, 77, generator=torch.Generator().manual_seed(1)))
    result = ranks(rows, rows)
    assert (result.tied == 1).all() and (result.better == 0).all()
    assert (result.best_score == result.top_scores[:, 0]).all()


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(3)
    queries, gallery = random.integers(-2, 3, size=(41, 4)) / 4, random.integers(-2, 3, size=(29, 4)) / 4
    relevant = [random.choice(29, size=row % 4, replace=False).tolist() for row in range(41)]
    whole = ranks(queries, gallery, relevant)
    monkeypatch.setattr(streaming, "TILE_ROWS", 3)
    monkeypatch.setattr(streaming, "TILE_COLUMNS", 8)
    monkeypatch.setattr(streaming, "_KEPT_TILES", 5)
    blocks = ranks(queries, gallery, relevant)
    for name in ("better", "tied", "tied_relevant", "expected_rank", "best_index", "top_indices", "top_scores"):
        np.testing.assert_array_equal(getattr(whole, name), getattr(blocks, name))
    assert whole.metrics() == blocks.metrics()


@settings(max_examples=60)
@given(
    values=st.lists(st.lists(st.integers(0, 3), min_size=6, max_size=6), min_size=1, max_size=4),
    top=st.integers(1, 8),
)
def test_top_is_by_score_then_by_index(values: list[list[int]], top: int) -> None:
    scores = np.array(values) / 4
    result = ranks(*as_rows(scores), [[0]] * len(scores), top=top)
    for row, found in zip(scores, result.top_indices, strict=True):
        assert found.tolist() == sorted(range(6), key=lambda item: (-row[item], item))[:top]


@settings(max_examples=60)
@given(seed=st.integers(0, 2**31), ties=st.booleans())
def test_properties(seed: int, ties: bool) -> None:
    random = np.random.default_rng(seed)
    scores = random.integers(0, 4, size=(6, 12)) / 4 if ties else random.random((6, 12))
    relevant = [random.choice(12, size=random.integers(1, 6), replace=False).tolist() for _ in range(6)]
    found = retrieval_metrics(*as_rows(scores), relevant)
    assert 0 <= found["R@1"] <= found["R@5"] <= found["R@10"] <= 100
    assert all(found[f"recall@{k}"] <= found[f"R@{k}"] + 1e-9 for k in (1, 5, 10))
    assert 1 <= found["MnR"] <= 12 and 0 <= found["mAP@10"] <= 100 + 1e-9 and 0 <= found["nDCG@10"] <= 100 + 1e-9
    order, places = random.permutation(6), random.permutation(12)
    where = np.argsort(places)
    moved = retrieval_metrics(
        *as_rows(scores[order][:, places]), [[int(where[item]) for item in relevant[row]] for row in order]
    )
    assert moved == pytest.approx(found, abs=1e-9)
    assert retrieval_metrics(*as_rows(3 * scores + 1), relevant) == pytest.approx(found, abs=1e-9)


def test_known_ranks() -> None:
    """Four pairs whose ranks, counted from 0, are 0, 0, 2, 2; the median is the mean of the middle two."""
    number = np.arange(1.0, 5.0)
    a = np.stack([np.sin(number), np.cos(2 * number), np.sin(3 * number + 0.5)], 1)
    b = np.stack([np.cos(number), np.sin(2 * number + 0.3), np.cos(3 * number)], 1)
    a, b = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (a, b))
    assert (ranks(a, b).expected_rank - 1).tolist() == [0, 0, 2, 2]
    found = retrieval_metrics(a, b)
    assert (found["R@1"], found["R@5"], found["MnR"], found["MedR"]) == (50, 100, 2, 2)


def test_inputs_of_every_kind_are_left_alone() -> None:
    rows = np.eye(4, dtype=np.float32)
    rows.setflags(write=False)
    tensor = torch.eye(4, dtype=torch.float16, requires_grad=True)
    assert retrieval_metrics(rows, rows) == retrieval_metrics(tensor, rows) == retrieval_metrics(tensor, tensor)
    assert retrieval_metrics(rows, rows, [np.array([0, 0]), torch.tensor([1]), [2], (3,)])["R@1"] == 100
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ranks(torch.full((1, 3), 1.001), torch.ones(1, 3)).best_score[0] == pytest.approx(3.003, abs=1e-5)
    close = 1 + 1e-12  # float64 in, float64 compared
    assert retrieval_metrics(np.ones((1, 1)), np.array([[1.0], [close]]), [[0]])["MnR"] == 2


@pytest.mark.parametrize(
    ("queries", "gallery", "relevant", "message"),
    [
        (np.ones((0, 2)), np.ones((3, 2)), [], "queries is empty"),
        (np.ones((3, 2)), np.ones((0, 2)), [[]] * 3, "gallery is empty"),
        (np.ones((3, 2)), np.ones((4, 2)), None, "say which are relevant"),
        (np.ones((3, 2)), np.ones((3, 5)), None, "queries have 2 columns, gallery 5"),
        (np.ones(3), np.ones((3, 1)), None, r"queries must be \(rows, D\)"),
        (np.ones((2, 2)), np.ones((2, 2)), [[0]], "1 lists for 2 queries"),
        (np.ones((2, 2)), np.ones((2, 2)), [[0], [2]], "gallery row 2, there are rows 0 to 1"),
        (np.ones((2, 2)), np.ones((2, 2)), [[0], [-1]], "gallery row -1"),
        (np.ones((2, 2)), np.ones((2, 2)), [[], []], "none of the 2 queries"),
        (np.array([[1.0], [np.nan]]), np.ones((2, 1)), None, "queries: 1 rows are not finite, the first is row 1"),
    ],
)
def test_wrong_input_is_named(queries: np.ndarray, gallery: np.ndarray, relevant: list | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        retrieval_metrics(queries, gallery, relevant)


def test_bootstrap_intervals() -> None:
    random = np.random.default_rng(0)
    scores = random.random((200, 50))
    scores[np.arange(200), np.arange(200) % 50] += 0.35
    result = ranks(*as_rows(scores), [[row % 50] for row in range(200)])
    found, metrics = bootstrap_ci(result, seed=1), result.metrics()
    assert {"R@1", "R@5", "R@10", "R@50", "recall@5", "MedR", "MnR", "mAP@10", "nDCG@10"} < set(found)
    assert all(low <= metrics[name] <= high for name, (low, high) in found.items())
    assert found == bootstrap_ci(result, seed=1) != bootstrap_ci(result, seed=2)
    share = metrics["R@5"] / 100  # of a share the normal interval is known
    low, high = found["R@5"]
    assert (high - low) / 100 == pytest.approx(2 * 1.96 * math.sqrt(share * (1 - share) / 200), rel=0.12)
    with pytest.raises(ConfigError, match="no query is answerable"):
        bootstrap_ci(ranks(np.ones((1, 1)), np.ones((1, 1)), [[]]))


def test_never_holds_all_scores() -> None:
    """9,000 × 9,000 scores would be 324 MB; blocks of them are all that is ever allocated."""
    import subprocess
    import sys

    program = (
        "import resource, torch; torch.set_num_threads(1)\n"
        "from mmcl.evaluation.ranking import retrieval_metrics\n"
        "rows = torch.nn.functional.normalize(torch.randn(9_000, 8))\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "assert retrieval_metrics(rows, rows)['R@1'] == 100\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120)
    assert int(done.stdout) < 280
