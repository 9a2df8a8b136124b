"""InfoNCE, CLIP, SigLIP, NT-Xent, DCL, MoCo and its form over several clips: loops, golden values, identities."""

from __future__ import annotations

import math

import pytest
import torch
from loss_cases import agree, close, cosine, golden, log_sum, mean, normed, randoms
from torch import Tensor

from mmcl import losses
from mmcl.losses.dcl import dcl_weights
from mmcl.losses.soft_targets import soft_target_rows

A, B, C = golden()
seeds = pytest.mark.parametrize("seed", range(3))


def test_golden_rows() -> None:
    first = torch.stack([A[0], B[0], C[0]])
    expected = [
        [0.8396674350, -0.4152548966, -0.3500313835],
        [0.3996117720, 0.5515293531, -0.7322061215],
        [0.6482186551, -0.1296446938, 0.7503364769],
    ]
    torch.testing.assert_close(first, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-9)


def loop_info_nce(queries: Tensor, keys: Tensor, temperature: float) -> Tensor:
    rows = []
    for i, q in enumerate(queries):
        logits = [cosine(q, k) / temperature for k in keys]
        rows.append(-(logits[i].exp() / sum(x.exp() for x in logits)).log())
    return mean(rows)


@seeds
def test_info_nce_is_its_formula(seed: int) -> None:
    agree(
        lambda q, k: losses.info_nce(q, k, temperature=0.3),
        lambda q, k: loop_info_nce(q, k, 0.3),
        *randoms(seed, (5, 3), (5, 3)),
    )


def test_info_nce_golden() -> None:
    close(losses.info_nce(A, B, temperature=0.1), 3.04738804)
    close(losses.info_nce(B, A, temperature=0.05), 7.23975293)
    close(losses.info_nce(A, B, temperature=1e9), math.log(4))
    close(losses.info_nce(A, B, temperature=math.inf), math.log(4))


@seeds
def test_clip_is_its_formula(seed: int) -> None:
    def loop(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
        return (loop_info_nce(a, b, 1 / scale) + loop_info_nce(b, a, 1 / scale)) / 2

    scale = torch.tensor(4.0, dtype=torch.float64)
    agree(lambda a, b, s: losses.clip(a, b, scale=s), loop, *randoms(seed, (5, 3), (5, 3)), scale)


def test_clip_golden() -> None:
    close(losses.clip(A, B, scale=1 / 0.07), 4.75331084)
    close(losses.clip(B, A, scale=1 / 0.07), 4.75331084)
    close(losses.clip(A, B, scale=0.0), math.log(4), 1e-12)
    with pytest.raises(ValueError, match="scale must be at least 0, got -1"):
        losses.clip(A, B, scale=-1.0)


@seeds
def test_siglip_is_its_formula(seed: int) -> None:
    def loop(a: Tensor, b: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for i, x in enumerate(a):
            for j, y in enumerate(b):
                sign = 1 if i == j else -1
                total = total + (1 + (-sign * (scale * cosine(x, y) + bias)).exp()).log()
        return total / len(a)

    scale, bias = torch.tensor(3.0, dtype=torch.float64), torch.tensor(-1.0, dtype=torch.float64)
    agree(lambda a, b, s, t: losses.siglip(a, b, scale=s, bias=t), loop, *randoms(seed, (5, 3), (5, 3)), scale, bias)


def test_siglip_golden() -> None:
    close(losses.siglip(A, B, scale=10, bias=-10), 7.85065268)
    close(losses.siglip(B, A, scale=10, bias=-10), 7.85065268)
    close(losses.siglip(A, B, scale=0, bias=-10), 10.00018160)
    softplus = lambda x: math.log1p(math.exp(x))  # noqa: E731
    close(losses.siglip(A, B, scale=0, bias=-10), softplus(10) + 3 * softplus(-10), 1e-12)


def dcl_rows(a: Tensor, b: Tensor, temperature: float, weights: Tensor) -> list[Tensor]:
    """One direction: row i of ``a`` is the anchor, the positive pair is in no denominator."""
    rows = []
    for i, x in enumerate(a):
        negatives = [cosine(x, other[j]) / temperature for other in (a, b) for j in range(len(a)) if j != i]
        rows.append(-weights[i] * cosine(x, b[i]) / temperature + log_sum(negatives))
    return rows


def loop_dcl(a: Tensor, b: Tensor, temperature: float, sigma: float | None) -> Tensor:
    weights = torch.ones(len(a), dtype=torch.float64)
    if sigma is not None:
        shares = [(cosine(x, y).detach() / sigma).exp() for x, y in zip(a, b, strict=True)]
        weights = torch.stack([2 - len(a) * share / sum(shares) for share in shares])
        assert abs(float(weights.mean()) - 1) < 1e-12
    return mean(dcl_rows(a, b, temperature, weights) + dcl_rows(b, a, temperature, weights))


@seeds
@pytest.mark.parametrize("sigma", [None, 0.5])
def test_dcl_is_its_formula(seed: int, sigma: float | None) -> None:
    agree(
        lambda a, b: losses.dcl(a, b, temperature=0.3, sigma=sigma),
        lambda a, b: loop_dcl(a, b, 0.3, sigma),
        *randoms(seed, (5, 3), (5, 3)),
    )


def test_distillation_between_modalities_golden() -> None:
    """open_clip's: teacher C, B at scale 20, student A, B at scale 10, soft targets in both directions."""
    student, teacher, number = 10 * A @ B.T, 20 * C @ B.T, torch.arange(4)
    ways = [soft_target_rows(x, y, number, alpha=1.0).mean() for x, y in ((student, teacher), (student.T, teacher.T))]
    close(sum(ways) / 2, 6.45616818)


def test_dcl_golden() -> None:
    for sigma in (0.1, 0.5, 10.0):
        close(dcl_weights(A, B, sigma=sigma).mean(), 1.0, 1e-12)
    close(losses.dcl(A, B, temperature=0.5), 1.52896028)
    close(losses.dcl(A, B, temperature=0.5, sigma=0.5), 1.60979865)
    close(losses.dcl(A, B, temperature=0.5, sigma=1e6), float(losses.dcl(A, B, temperature=0.5)), 1e-7)
    same = torch.ones(4, 3, dtype=torch.float64)
    close(losses.dcl(same, same, temperature=0.1), math.log(6), 1e-12)
    assert losses.dcl(A, A, temperature=0.1) < 0


def test_dcl_positive_leaves_the_denominator() -> None:
    """The gradient with respect to the positive's cosine is −1 / temperature, whatever the negatives are."""
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    # the partners' fourth axis meets only their own anchors, so ``scale`` moves positives alone
    anchors, partners = torch.eye(8, dtype=torch.float64)[:4], torch.eye(8, dtype=torch.float64)[4:]
    partners = scale * anchors + partners
    cosines = (normed(partners) * anchors).sum(1).mean()
    loss = losses.dcl(anchors, partners, temperature=0.2)
    gradients = [torch.autograd.grad(x, scale, retain_graph=True)[0] for x in (loss, cosines)]
    close(gradients[0] / gradients[1], -1 / 0.2, 1e-10)


@seeds
def test_nt_xent_is_its_formula_and_softplus_of_dcl(seed: int) -> None:
    def loop(a: Tensor, b: Tensor) -> Tensor:
        rows = [*a, *b]
        terms = []
        for i, x in enumerate(rows):
            partner = (i + len(a)) % len(rows)
            others = [cosine(x, y) / 0.3 for j, y in enumerate(rows) if j != i]
            terms.append(-cosine(x, rows[partner]) / 0.3 + log_sum(others))
        return mean(terms)

    a, b = randoms(seed, (5, 3), (5, 3))
    agree(lambda a, b: losses.nt_xent(a, b, temperature=0.3), loop, a, b)
    ones = torch.ones(5)
    decoupled = [*dcl_rows(a, b, 0.3, ones), *dcl_rows(b, a, 0.3, ones)]
    close(losses.nt_xent(a, b, temperature=0.3), float(mean([(1 + x.exp()).log() for x in decoupled])), 1e-12)


def test_nt_xent_golden() -> None:
    close(losses.nt_xent(A, B, temperature=0.5), 1.73688895)
    close(losses.nt_xent(B, A, temperature=0.5), 1.73688895)
    close(2 * losses.nt_xent(A, B, temperature=0.5), 3.47377790)
    same = torch.ones(4, 3, dtype=torch.float64)
    close(losses.nt_xent(same, same, temperature=0.5), math.log(7), 1e-12)
    close(losses.nt_xent(A, B, temperature=1e12), math.log(7))


def loop_moco(queries: Tensor, keys: list[Tensor], queue: Tensor, temperature: float) -> Tensor:
    terms = []
    for clip in keys:
        for q, k in zip(queries, clip.detach(), strict=True):
            positive = cosine(q, k) / temperature
            terms.append(-positive + log_sum([positive, *(cosine(q, old.detach()) / temperature for old in queue)]))
    return mean(terms)


@seeds
def test_moco_is_its_formula(seed: int) -> None:
    agree(
        lambda q, k, queue: losses.moco(q, k, queue, temperature=0.3),
        lambda q, k, queue: loop_moco(q, [k], queue, 0.3),
        *randoms(seed, (5, 3), (5, 3), (7, 3)),
    )


def test_moco_identities() -> None:
    assert losses.moco(A, B, torch.zeros(0, 3), temperature=0.1) == 0
    constant = torch.ones(4, 3, dtype=torch.float64)
    close(losses.moco(constant, constant, constant, temperature=0.1), math.log(5), 1e-12)
    # one query whose queue is the other keys of a batch is one row of InfoNCE
    rows = [losses.moco(A[i : i + 1], B[i : i + 1], torch.cat([B[:i], B[i + 1 :]]), temperature=0.1) for i in range(4)]
    close(mean(rows), 3.04738804)


@seeds
def test_persistency_moco_is_its_formula(seed: int) -> None:
    agree(
        lambda q, k, m, queue: losses.persistency_moco(q, [k, m], queue, temperature=0.3),
        lambda q, k, m, queue: loop_moco(q, [k, m], queue, 0.3),
        *randoms(seed, (5, 3), (5, 3), (5, 3), (7, 3)),
    )


def test_persistency_moco_golden() -> None:
    queue = normed(B + C)[:2]
    close(losses.persistency_moco(A, [B, C], queue, temperature=0.1), 3.83630733)
    one = losses.moco(A, B, queue, temperature=0.1)
    for clips in (1, 2, 3):
        close(losses.persistency_moco(A, [B] * clips, queue, temperature=0.1), float(one), 1e-12)
