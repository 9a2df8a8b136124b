"""k-means: as good as a known library's, the same at every call, sound where clusters run empty."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmcl.multistage import assign, kmeans


def blobs(rows: int, clusters: int, spread: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Unit rows around as many directions, and which each is of."""
    random = torch.Generator().manual_seed(seed)
    centres = F.normalize(torch.randn(clusters, 16, generator=random), dim=1)
    labels = torch.arange(rows) % clusters
    return F.normalize(centres[labels] + spread * torch.randn(rows, 16, generator=random), dim=1), labels


def inertia(rows: Tensor, centroids: Tensor) -> float:
    return float(torch.cdist(rows.double(), centroids.double()).amin(1).square().sum())


def test_clear_clusters_are_found() -> None:
    rows, labels = blobs(400, 8, 0.05)
    found = assign(rows, kmeans(rows, 8, seed=1))
    assert len({(int(a), int(b)) for a, b in zip(found, labels, strict=True)}) == 8


@pytest.mark.slow
def test_it_is_as_good_as_scikit_learn() -> None:
    sklearn = pytest.importorskip("sklearn.cluster")
    rows, _ = blobs(3_000, 30, 0.35)
    theirs = sklearn.KMeans(20, n_init=1, random_state=0, max_iter=100, tol=1e-5).fit(rows.numpy())
    ours = [inertia(rows, kmeans(rows, 20, seed=seed)) for seed in range(4)]
    assert min(ours) < 1.02 * theirs.inertia_
    assert max(ours) < 1.06 * theirs.inertia_


def test_centroids_are_means_and_labels_are_nearest() -> None:
    rows, _ = blobs(500, 5, 0.6)
    centroids = kmeans(rows, 7, seed=2, tolerance=0.0)
    labels = assign(rows, centroids)
    assert torch.equal(labels, torch.cdist(rows, centroids).argmin(1))
    for number in range(7):
        assert torch.allclose(rows[labels == number].mean(0), centroids[number], atol=1e-5)


def test_equal_calls_are_equal_and_the_seed_counts() -> None:
    rows, _ = blobs(300, 40, 0.9)
    assert torch.equal(kmeans(rows, 9, seed=3), kmeans(rows.clone(), 9, seed=3))
    assert not torch.equal(kmeans(rows, 9, seed=3), kmeans(rows, 9, seed=4))


def test_few_different_rows_leave_clusters_empty_and_nothing_else() -> None:
    rows = torch.eye(4)[torch.arange(40) % 3]
    centroids = kmeans(rows, 6, seed=0)
    labels = assign(rows, centroids)
    assert centroids.isfinite().all()
    assert len(set(labels.tolist())) == 3
    assert inertia(rows, centroids) < 1e-12
    assert assign(rows[:1], kmeans(rows[:1], 5)).tolist() == [0]


def test_an_emptied_cluster_starts_again_at_the_farthest_row() -> None:
    from mmcl.multistage.kmeans import _means

    rows = torch.tensor([[0.0, 0.0], [0.2, 0.0], [9.0, 0.0], [10.0, 0.0]])
    before = torch.tensor([[0.0, 0.0], [50.0, 0.0]])
    labels = torch.zeros(4, dtype=torch.int64)
    moved = _means(rows, labels, rows.square().sum(1), before)
    assert moved.tolist() == [[pytest.approx(4.8), 0.0], [10.0, 0.0]]


def test_of_many_rows_some_are_fitted_and_all_assigned() -> None:
    rows, labels = blobs(2_000, 6, 0.05)
    centroids = kmeans(rows, 6, seed=0, fit_rows=200)
    assert torch.equal(centroids, kmeans(rows, 6, seed=0, fit_rows=200))
    assert not torch.equal(centroids, kmeans(rows, 6, seed=0))
    found = assign(rows, centroids)
    assert len({(int(a), int(b)) for a, b in zip(found, labels, strict=True)}) == 6


@pytest.mark.parametrize("rows", [torch.zeros(0, 3), torch.tensor([[1.0, torch.nan]])])
def test_nothing_to_cluster_is_refused(rows: Tensor) -> None:
    with pytest.raises(ValueError, match="finite rows"):
        kmeans(rows, 2)
