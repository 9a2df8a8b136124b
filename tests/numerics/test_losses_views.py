"""MV-InfoNCE, MV-DHEL, M3Co, SoftClip, cMIM, BarLIP: loops, golden values, identities."""

from __future__ import annotations

import math

import pytest
import torch
from loss_cases import agree, close, cosine, golden, log_sum, mean, randoms
from torch import Tensor

from mmcl import losses

A, B, C = golden()
seeds = pytest.mark.parametrize("seed", range(3))
shapes = ((4, 3),) * 3


@pytest.mark.parametrize("negatives", ["cross", "all"])
@seeds
def test_mv_info_nce_is_its_formula(seed: int, negatives: str) -> None:
    def loop(*views: Tensor) -> Tensor:
        rows = []
        for i in range(4):
            top = [cosine(u[i], v[i]).div(0.3) for u in views for v in views if u is not v]
            below = [
                cosine(u[i], v[j]) / 0.3
                for u in views
                for v in views
                for j in range(4)
                if u is not v or (negatives == "all" and j != i)
            ]
            rows.append(log_sum(below) - log_sum(top))
        return mean(rows)

    agree(lambda *views: losses.mv_info_nce(views, temperature=0.3, negatives=negatives), loop, *randoms(seed, *shapes))


@seeds
def test_mv_dhel_is_its_formula(seed: int) -> None:
    def loop(*views: Tensor) -> Tensor:
        rows = []
        for i in range(4):
            top = [cosine(views[m][i], views[n][i]) / 0.3 for m in range(3) for n in range(m + 1, 3)]
            spread = [log_sum([cosine(u[i], u[j]) / 0.3 for j in range(4) if j != i]) for u in views]
            rows.append(sum(spread) - log_sum(top))
        return mean(rows)

    agree(lambda *views: losses.mv_dhel(views, temperature=0.3), loop, *randoms(seed, *shapes))


def test_views_golden() -> None:
    three, two = (1.65184247, 1.98302621, 2.75371807), (1.28198867, 1.74158967, 1.48711183)
    for views, wanted in (([A, B, C], three), ([A, B], two)):
        close(losses.mv_info_nce(views, temperature=0.5), wanted[0])
        close(losses.mv_info_nce(views, temperature=0.5, negatives="all"), wanted[1])
        close(losses.mv_dhel(views, temperature=0.5), wanted[2])
        close(losses.mv_dhel(views[::-1], temperature=0.5), wanted[2])


def test_many_views_at_a_low_temperature_do_not_overflow() -> None:
    views = [x.float().requires_grad_() for x in randoms(0, *[(64, 8)] * 8)]
    for loss in (losses.mv_info_nce(views, temperature=0.01), losses.mv_dhel(views, temperature=0.01)):
        gradients = torch.autograd.grad(loss, views)
        assert loss.isfinite() and all(gradient.isfinite().all() for gradient in gradients)


def test_views_refuse_nonsense() -> None:
    with pytest.raises(ValueError, match="at least 2"):
        losses.mv_dhel([A], temperature=0.1)
    with pytest.raises(ValueError, match="'cross' or 'all', got 'none'"):
        losses.mv_info_nce([A, B], temperature=0.1, negatives="none")  # type: ignore[arg-type]


BETA = torch.tensor([0.3, 1.0, 0.6, 1.0], dtype=torch.float64)
PERMUTATION = torch.tensor([1, 0, 3, 2])


def mixed(x: Tensor) -> Tensor:
    return BETA[:, None] * x + (1 - BETA)[:, None] * x[PERMUTATION]


def test_m3co_golden_and_identities() -> None:
    close(losses.m3co(mixed(A), B, BETA, PERMUTATION, temperature=0.1), 2.18308255)
    ones = torch.ones_like(BETA)
    close(losses.m3co(A, B, ones, PERMUTATION, temperature=0.07), float(losses.clip(A, B, scale=1 / 0.07)))
    itself = torch.arange(4)
    close(losses.m3co(A, B, BETA, itself, temperature=0.07), float(losses.clip(A, B, scale=1 / 0.07)))
    with pytest.raises(ValueError, match=r"must be \(4,\)"):
        losses.m3co(A, B, BETA[:3], PERMUTATION, temperature=0.1)


@seeds
def test_m3co_is_its_formula(seed: int) -> None:
    def loop(x: Tensor, y: Tensor) -> Tensor:
        rows = []
        for i in range(4):
            forth = [cosine(x[i], y[j]) / 0.3 for j in range(4)]
            back = [cosine(x[j], y[i]) / 0.3 for j in range(4)]
            for j in range(4):
                down = BETA[i] * (i == j) + (1 - BETA[i]) * (int(PERMUTATION[i]) == j)
                up = BETA[j] * (i == j) + (1 - BETA[j]) * (int(PERMUTATION[j]) == i)
                rows.append(-(down * (forth[j] - log_sum(forth)) + up * (back[j] - log_sum(back))) / 2)
        return sum(rows[1:], rows[0]) / 4

    agree(lambda x, y: losses.m3co(x, y, BETA, PERMUTATION, temperature=0.3), loop, *randoms(seed, (4, 3), (4, 3)))


def test_soft_clip_golden_and_targets() -> None:
    close(losses.soft_clip(A, B, temperature=0.125), 2.76254681)
    targets = (A @ A.T / 0.125).softmax(1)
    close(losses.soft_clip(A, A, temperature=0.125), float(-(targets * targets.log()).sum(1).mean()))
    gradients = []
    for detach in (True, False):
        b = B.clone().requires_grad_()
        gradients += torch.autograd.grad(losses.soft_clip(A, b, temperature=0.125, detach_targets=detach), b)
    assert not torch.allclose(gradients[0], gradients[1])


def test_cmim_does_not_feel_the_batch_size() -> None:
    close(losses.cmim_contrast(A, B, temperature=0.1), 2.49852525)
    for rows in (4, 64):
        close(losses.cmim_contrast(torch.ones(rows, 3), torch.ones(rows, 3), temperature=0.1), math.log(2))
    close(losses.cmim_contrast(A, C, temperature=math.inf), math.log(2))


@pytest.mark.parametrize("rows", [2, 6])
@seeds
def test_cmim_is_its_formula(seed: int, rows: int) -> None:
    def loop(z: Tensor, other: Tensor) -> Tensor:
        values = []
        for i in range(rows):
            own = (cosine(z[i], other[i]) / 0.3).exp()
            rest = mean([(cosine(z[i], other[j]) / 0.3).exp() for j in range(rows) if j != i])
            values.append(-(own / (own + rest)).log())
        return mean(values)

    agree(lambda z, o: losses.cmim_contrast(z, o, temperature=0.3), loop, *randoms(seed, (rows, 3), (rows, 3)))


def test_barlip_golden() -> None:
    close(losses.barlip(A, B), 0.02977556)
    spread = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]], dtype=torch.float64)
    close(losses.barlip(spread, 3 * spread + 1), 0.0)
