"""Retrieval figures beside other people's definitions, and beside a loop that counts."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mmcl.evaluation import streaming
from mmcl.evaluation.ranking import RankResult, ranks, ranks_both, retrieval_metrics


def as_rows(scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.asarray(scores, np.float64), np.eye(scores.shape[1])


def random_task(seed: int, ties: bool) -> tuple[np.ndarray, np.ndarray]:
    """Scores ``(20, 30)`` and which answers are right, at least one per query."""
    random = np.random.default_rng(seed)
    scores = random.integers(0, 6, size=(20, 30)) / 8 if ties else random.permutation(600).reshape(20, 30) / 600
    right = random.random((20, 30)) < 0.15
    right[:, 0] |= ~right.any(1)
    return scores, right


def lists(right: np.ndarray) -> list[np.ndarray]:
    return [np.flatnonzero(row) for row in right]


def check_by_loop(result: RankResult, scores: np.ndarray, right: list[np.ndarray], top: int) -> None:
    for row, (own, wanted) in enumerate(zip(scores, right, strict=True)):
        if not len(wanted):
            assert (result.relevant[row], result.better[row]) == (0, -1)
            continue
        best = max(own[item] for item in wanted)
        assert result.better[row] == sum(score > best for score in own)
        assert result.tied[row] == sum(score == best for score in own)
        assert result.tied_relevant[row] == sum(own[item] == best for item in wanted)
        order = sorted(range(len(own)), key=lambda item: (-own[item], item))[:top]
        assert result.top_indices[row].tolist() == order
        assert result.top_scores[row].tolist() == own[order].tolist()


@pytest.mark.parametrize("seed", range(24))
def test_both_directions_equal_a_loop(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ties, equal rows on both sides, tiles and strips of every size, several right answers or none."""
    random = np.random.default_rng(seed)
    for name, values in {
        "TILE_ROWS": [5, 16, 960],
        "TILE_COLUMNS": [8, 16, 1920],
        "_STRIP": [3, 240],
        "_SEED": [4, 12, 256],
        "_SORT_ABOVE": [0, 8],
        "_KEPT_TILES": [0, 3],
    }.items():
        monkeypatch.setattr(streaming, name, int(random.choice(values)))
    n, m = random.integers(1, 50, 2)
    a, b = (random.integers(-2, 3, (size, random.choice([1, 2, 6])))[:, :1] / 4 for size in (n, m))
    if seed % 3:
        a, b = (random.integers(-2, 3, (size, 6)).astype(np.float32) / 4 for size in (n, m))
    right = [random.choice(m, min(m, random.integers(0, 5)), replace=False) for _ in range(n)]
    back = [np.array([i for i in range(n) if j in right[i]], int) for j in range(m)]
    scores = (a @ b.T).astype(float)
    forward, backward = ranks_both(a, b, right)
    check_by_loop(forward, scores, right, 10)
    check_by_loop(backward, scores.T, back, 10)
    check_by_loop(ranks(a, b, right, top=3), scores, right, 3)


def test_no_count_runs_over_a_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole tiles lie at or above every threshold, in rows and in columns; the rows differ where nothing is scored."""
    monkeypatch.setattr(streaming, "_filter", lambda *_: None)  # no top lists
    queries, gallery = 2003, 1930
    value = torch.ones(queries).index_fill_(0, torch.arange(gallery, queries), 2)
    a = torch.stack([value, torch.arange(queries) / 4096, torch.zeros(queries)], 1)
    b = torch.stack([torch.ones(gallery), torch.zeros(gallery), torch.arange(gallery) / 4096], 1)
    forward, backward = ranks_both(a, b, [[row] if row < gallery else [] for row in range(queries)])
    assert (forward.better[:gallery] == 0).all() and (forward.tied[:gallery] == gallery).all()
    assert (backward.better == queries - gallery).all() and (backward.tied == gallery).all()
    above, _ = ranks_both(a + torch.tensor([0, 0, 1.0]), b, [[0]] + [[]] * (queries - 1))
    assert (above.better[0], above.tied[0]) == (gallery - 1, 1)


@pytest.mark.parametrize("seed", range(3))
def test_torchmetrics(seed: int) -> None:
    retrieval = pytest.importorskip("torchmetrics.retrieval")
    scores, right = random_task(seed, ties=False)
    found = retrieval_metrics(*as_rows(scores), lists(right))
    theirs = {f"R@{k}": retrieval.RetrievalHitRate(top_k=k) for k in (1, 5, 10)}
    theirs |= {f"recall@{k}": retrieval.RetrievalRecall(top_k=k) for k in (1, 5, 10)}
    theirs["nDCG@10"] = retrieval.RetrievalNormalizedDCG(top_k=10)
    theirs["mAP@50"] = retrieval.RetrievalMAP()  # the gallery is smaller than 50
    index = torch.arange(20)[:, None].expand(20, 30).flatten()
    given = torch.from_numpy(scores).float().flatten(), torch.from_numpy(right).flatten()
    for name, metric in theirs.items():
        assert found[name] == pytest.approx(100 * metric(*given, indexes=index).item(), abs=1e-3), name


def clip4clip(scores: np.ndarray) -> dict[str, float]:
    """CLIP4Clip's definition: the diagonal score is looked for, by equality, in the sorted row."""
    ordered = np.sort(-scores, axis=1)
    places = np.where(ordered - np.diag(-scores)[:, None] == 0)[1]
    hits = {f"R@{k}": 100 * float(np.mean(places < k)) for k in (1, 5, 10)}
    return {**hits, "MedR": float(np.median(places)) + 1, "MnR": float(np.mean(places)) + 1}


def test_clip4clip_where_nothing_is_tied() -> None:
    scores = np.random.default_rng(0).permutation(900).reshape(30, 30) / 900
    scores[np.arange(30), np.arange(30)] += 0.5003  # between two others: nothing is tied
    found = retrieval_metrics(*as_rows(scores))
    assert {name: found[name] for name in clip4clip(scores)} == pytest.approx(clip4clip(scores))


def test_constant_scores_are_chance_where_clip4clip_depends_on_extra_rows() -> None:
    scores = np.ones((20, 20))
    found = retrieval_metrics(*as_rows(scores))
    assert [found[f"R@{k}"] for k in (1, 5, 10)] == [5, 25, 50]
    assert (found["MedR"], found["MnR"]) == (10.5, 10.5)
    half = np.where(np.arange(20) % 2, 1.0, 0.0) * np.ones((20, 1))  # half of the answers tie above the other half
    assert clip4clip(half)["R@10"] == pytest.approx(50)
    mixed = np.tril(np.ones((20, 20)))  # here its extra rows bias the mean
    assert clip4clip(mixed)["MnR"] != pytest.approx(retrieval_metrics(*as_rows(mixed))["MnR"])


@pytest.mark.parametrize("ties", [False, True])
def test_scikit_learn(ties: bool) -> None:
    metrics = pytest.importorskip("sklearn.metrics", reason="scikit-learn is not installed")
    scores, right = random_task(7, ties)
    found = retrieval_metrics(*as_rows(scores), lists(right))
    # it, too, takes the mean over the orders of what is tied
    assert found["nDCG@10"] == pytest.approx(100 * metrics.ndcg_score(right, scores, k=10))
    if not ties:
        precision = [metrics.average_precision_score(*row) for row in zip(right, scores, strict=True)]
        assert found["mAP@50"] == pytest.approx(100 * np.mean(precision))


@pytest.mark.slow  # its import alone takes long
def test_sentence_transformers() -> None:
    """Its evaluator and its search, on scores without ties and on random embeddings, with several right answers."""
    evaluation = pytest.importorskip(
        "sentence_transformers.evaluation", reason="sentence-transformers is not installed"
    )
    from sentence_transformers.util import semantic_search

    for seed in range(4):
        scores, right = random_task(seed, ties=False)
        random = torch.Generator().manual_seed(seed)
        a, b = (torch.nn.functional.normalize(torch.randn(n, 16, generator=random), dim=1) for n in (20, 30))
        answers = [[{"corpus_id": item, "score": float(s)} for item, s in enumerate(row)] for row in scores]
        evaluator = evaluation.InformationRetrievalEvaluator(
            {str(row): str(row) for row in range(20)},
            {str(item): str(item) for item in range(30)},
            {str(row): {str(item) for item in items} for row, items in enumerate(lists(right))},
            accuracy_at_k=[1, 5, 10],
            precision_recall_at_k=[1, 5, 10],
            map_at_k=[10],
        )
        for rows, listed in ((as_rows(scores), answers), ((a, b), semantic_search(a, b, top_k=10))):
            best = [sorted(row, key=lambda each: -each["score"])[:10] for row in listed]
            theirs = evaluator.compute_metrics([[{**e, "corpus_id": str(e["corpus_id"])} for e in row] for row in best])
            found = retrieval_metrics(*rows, lists(right))
            assert found["ties"] == 0
            for k in (1, 5, 10):
                assert found[f"R@{k}"] == pytest.approx(100 * theirs["accuracy@k"][k])
                assert found[f"recall@{k}"] == pytest.approx(100 * theirs["recall@k"][k])
            assert found["mAP@10"] == pytest.approx(100 * theirs["map@k"][10])
            assert found["nDCG@10"] == pytest.approx(100 * theirs["ndcg@k"][10])
