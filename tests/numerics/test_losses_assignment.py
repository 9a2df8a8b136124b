"""BYOL, its form over several clips, Sinkhorn codes and SwAV: loops, golden values, identities."""

from __future__ import annotations

import math

import pytest
import torch
from loss_cases import agree, close, cosine, golden, mean, normed, randoms
from torch import Tensor

from mmcl import losses

A, B, C = golden()
PROTOTYPES = C[:3]
seeds = pytest.mark.parametrize("seed", range(3))


@seeds
def test_byol_is_its_formula(seed: int) -> None:
    def loop(predictions: Tensor, targets: Tensor) -> Tensor:
        gaps = []
        for p, t in zip(predictions, targets.detach(), strict=True):
            gap = p / (p * p).sum().sqrt() - t / (t * t).sum().sqrt()
            gaps.append((gap * gap).sum())
        return mean(gaps)

    agree(losses.byol, loop, *randoms(seed, (5, 3), (5, 3)))


def test_byol_golden() -> None:
    close(losses.byol(A, B), 1.56281515)
    close(losses.byol(A, normed(A + B)) + losses.byol(B, C), 2.96423807)
    close(losses.byol(A, A), 0, 1e-12)
    close(losses.byol(A, -A), 4, 1e-12)


@seeds
def test_persistency_byol_is_its_formula(seed: int) -> None:
    def loop(prediction: Tensor, *targets: Tensor) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for clip in targets:
            total = total - mean([cosine(p, t) for p, t in zip(prediction, clip.detach(), strict=True)])
        return total / (0.4 * len(targets))

    agree(lambda p, *t: losses.persistency_byol(p, list(t), temperature=0.4), loop, *randoms(seed, *[(5, 3)] * 3))


def test_persistency_byol_golden() -> None:
    close(losses.persistency_byol(A, [B, C]), -0.28577821)
    close(losses.persistency_byol(A, [B]), float(losses.byol(A, B)) - 2, 1e-12)


def loop_sinkhorn(scores: Tensor, epsilon: float, iterations: int) -> Tensor:
    """The usual form on masses, prototypes to 1/K and rows to 1/B in turn."""
    rows, columns = scores.shape
    mass = [[math.exp(float(scores[i, k]) / epsilon) for k in range(columns)] for i in range(rows)]
    total = sum(map(sum, mass))
    mass = [[x / total for x in row] for row in mass]
    for _ in range(iterations):
        sums = [sum(mass[i][k] for i in range(rows)) for k in range(columns)]
        mass = [[mass[i][k] / sums[k] / columns for k in range(columns)] for i in range(rows)]
        mass = [[x / sum(row) / rows for x in row] for row in mass]
    return rows * torch.tensor(mass, dtype=torch.float64)


@seeds
@pytest.mark.parametrize("iterations", [1, 3, 10])
def test_sinkhorn_is_its_formula(seed: int, iterations: int) -> None:
    (scores,) = randoms(seed, (6, 4))
    codes = losses.sinkhorn(scores, epsilon=0.3, iterations=iterations)
    torch.testing.assert_close(codes, loop_sinkhorn(scores, 0.3, iterations), rtol=0, atol=1e-12)


def test_sinkhorn_golden() -> None:
    scores = A @ PROTOTYPES.T
    codes = losses.sinkhorn(scores)
    torch.testing.assert_close(codes[0], torch.tensor([8.04e-5, 0.431479, 0.568440]).double(), rtol=0, atol=1e-6)
    torch.testing.assert_close(codes.sum(1), torch.ones(4).double(), rtol=0, atol=1e-12)
    balanced = losses.sinkhorn(scores, iterations=500)
    torch.testing.assert_close(balanced.sum(0), torch.full((3,), 4 / 3).double(), rtol=0, atol=1e-6)
    torch.testing.assert_close(losses.sinkhorn(scores + 7), codes, rtol=0, atol=1e-12)
    torch.testing.assert_close(losses.sinkhorn(torch.ones(4, 5)), torch.full((4, 5), 0.2))


def test_sinkhorn_rules() -> None:
    (scores,) = randoms(0, (6, 4))
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    torch.testing.assert_close(losses.sinkhorn(scores[order]), losses.sinkhorn(scores)[order], rtol=0, atol=1e-12)
    before = scores.clone()
    assert not losses.sinkhorn(scores.requires_grad_()).requires_grad
    torch.testing.assert_close(scores.detach(), before, rtol=0, atol=0)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            codes = losses.sinkhorn(scores.detach().to(dtype))
        assert codes.dtype == torch.float32
        torch.testing.assert_close(codes.sum(1), torch.ones(6))
    assert losses.sinkhorn(scores.detach()).dtype == torch.float64
    assert losses.sinkhorn(torch.zeros(0, 4)).shape == (0, 4)
    torch.testing.assert_close(losses.sinkhorn(torch.tensor([[3.0, 1.0]])), torch.tensor([[0.5, 0.5]]))


def test_sinkhorn_survives_scores_whose_exponential_does_not() -> None:
    """exp(score / epsilon) under- and overflows here, and a prototype that nobody likes would be 0/0."""
    scores = torch.tensor([[100.0, -100.0, -100.0], [100.0, -90.0, -100.0], [90.0, -100.0, -100.0]])
    codes = losses.sinkhorn(scores)
    assert codes.isfinite().all()
    torch.testing.assert_close(codes.sum(1), torch.ones(3))
    torch.testing.assert_close(losses.sinkhorn(torch.zeros(3, 3)), torch.full((3, 3), 1 / 3))


@seeds
@pytest.mark.parametrize("views", [2, 3, 4])
def test_swav_is_its_formula(seed: int, views: int) -> None:
    def loop(*scores: Tensor) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for a in (0, 1):
            codes = loop_sinkhorn(scores[a].detach(), 0.3, 3)
            for v in range(len(scores)):
                if v != a:
                    for q, o in zip(codes, scores[v], strict=True):
                        probabilities = (o / 0.2).exp() / (o / 0.2).exp().sum()
                        total = total - (q * probabilities.log()).sum() / len(codes) / (views - 1) / 2
        return total

    agree(lambda *s: losses.swav(list(s), temperature=0.2, epsilon=0.3), loop, *randoms(seed, *[(5, 4)] * views))


def test_swav_golden() -> None:
    a, b = A @ PROTOTYPES.T, B @ PROTOTYPES.T
    close(losses.swav([a, b]), 3.46863074)
    close(losses.swav([b, a]), 3.46863074)
    close(losses.swav([torch.zeros(4, 5)] * 4), math.log(5))


def test_swav_codes_have_no_gradient() -> None:
    """With two views, view 0 as code must not reach the loss: its gradient is that of the prediction alone."""
    x, y = ((rows @ PROTOTYPES.T).requires_grad_() for rows in (A, B))
    losses.swav([x, y]).backward()
    codes = losses.sinkhorn(y)
    expected = (torch.softmax(x.detach() / 0.1, 1) - codes) / 0.1 / 4 / 2
    torch.testing.assert_close(x.grad, expected, rtol=0, atol=1e-12)
