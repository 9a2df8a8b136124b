"""Class-aware NCE, Jeffreys' divergence and local mutual information: loops, golden values, identities."""

from __future__ import annotations

import math

import pytest
import torch
from loss_cases import agree, close, cosine, golden, mean, randoms
from torch import Tensor

from mmcl import losses

A, B, C = golden()
seeds = pytest.mark.parametrize("seed", range(3))


@seeds
@pytest.mark.parametrize("labels", [[0, 0, 1, 2, 1], [0, 1, 2, 3, 4], [3, 3, 3, 3, 3]])
def test_class_nce_is_its_formula(seed: int, labels: list[int]) -> None:
    def loop(features: Tensor, other: Tensor) -> Tensor:
        rows = []
        for i, f in enumerate(features):
            exponentials = [(cosine(f, g) / 0.3).exp() for g in other]
            shares = [x / sum(exponentials) for x in exponentials]
            same = [-p.log() for p, label in zip(shares, labels, strict=True) if label == labels[i]]
            rest = [-(1 - p).log() for p, label in zip(shares, labels, strict=True) if label != labels[i]]
            rows.append(mean(same) + (mean(rest) if rest else 0))
        return mean(rows)

    agree(
        lambda f, g: losses.class_nce(f, g, torch.tensor(labels), temperature=0.3), loop, *randoms(seed, (5, 3), (5, 3))
    )


def test_class_nce_golden() -> None:
    close(losses.class_nce(A, B, torch.tensor([0, 0, 1, 2]), temperature=0.5), 1.67658003)
    close(losses.class_nce(A, B, torch.tensor([7, 7, -1, 2]).to(torch.int32), temperature=0.5), 1.67658003)
    same = torch.ones(4, 3, dtype=torch.float64)
    close(losses.class_nce(same, same, torch.arange(4), temperature=0.5), 1.67397643)
    close(losses.class_nce(same, same, torch.arange(4), temperature=0.5), math.log(4) - math.log(3 / 4), 1e-12)


def test_class_nce_of_one_class_has_no_second_mean() -> None:
    same = torch.ones(4, 3, dtype=torch.float64, requires_grad=True)
    loss = losses.class_nce(same, same, torch.zeros(4, dtype=torch.long), temperature=0.5)
    close(loss, math.log(4), 1e-12)
    loss.backward()
    assert same.grad is not None and same.grad.isfinite().all()


def test_class_nce_is_exact_where_the_softmax_rounds_to_one() -> None:
    """Each row is sure of the wrong partner: P is 1 in float32, log(1 − P) is −200 and pulls it back."""
    features = torch.tensor([[1.0, 0.0], [0.0, 1.0]], requires_grad=True)
    other = torch.tensor([[-1.0, 0.0], [1.0, 0.0]])
    row = losses.class_nce(features[[0, 0]], other, torch.arange(2), temperature=0.01)
    # row 0: 200 + 200; row 1: 0 + 0, being right
    close(row, 200, 1e-3)
    wrong = losses.class_nce(torch.eye(2), torch.eye(2).flip(0), torch.arange(2), temperature=0.01)
    close(wrong, 200, 1e-3)
    (gradient,) = torch.autograd.grad(row, features)
    assert gradient.isfinite().all()


@seeds
def test_jeffreys_is_its_formula(seed: int) -> None:
    def loop(logits_p: Tensor, logits_q: Tensor) -> Tensor:
        rows = []
        for a, b in zip(logits_p, logits_q, strict=True):
            p, q = a.exp() / a.exp().sum(), b.exp() / b.exp().sum()
            rows.append(sum(x * (x / y).log() + y * (y / x).log() for x, y in zip(p, q, strict=True)) / 2)
        return mean(rows)

    agree(losses.jeffreys, loop, *randoms(seed, (5, 4), (5, 4)))


def test_jeffreys_golden() -> None:
    close(losses.jeffreys(3 * A, 3 * B), 0.80371143)
    close(losses.jeffreys(3 * B, 3 * A), 0.80371143)
    close(losses.jeffreys(A, A + 5), 0, 1e-12)
    assert losses.jeffreys(torch.tensor([[0.0, 1000.0]]), torch.tensor([[1000.0, 0.0]])) == 1000


LOCALS = torch.stack([B, C], 1)
ALL = torch.ones(4, 2, dtype=torch.bool)
SOME = torch.tensor([[True, True], [True, True], [True, False], [True, False]])


@seeds
@pytest.mark.parametrize("pattern", ["111 111 111 111", "110 011 100 111", "110 000 100 111", "000 010 000 000"])
def test_local_mutual_information_is_its_formula(seed: int, pattern: str) -> None:
    mask = torch.tensor([[digit == "1" for digit in row] for row in pattern.split()])

    def loop(globals_: Tensor, locals_: Tensor) -> Tensor:
        samples = []
        for i, g in enumerate(globals_):
            others = [
                (cosine(g, locals_[j, m]) / 0.3).exp() for j in range(4) if j != i for m in range(3) if mask[j, m]
            ]
            tokens = []
            for k in range(3):
                if mask[i, k]:
                    own = (cosine(g, locals_[i, k]) / 0.3).exp()
                    tokens.append(-(own / (own + sum(others))).log())
            if tokens:
                samples.append(mean(tokens))
        return mean(samples)

    agree(
        lambda g, tokens: losses.local_mutual_information(g, tokens, mask, temperature=0.3),
        loop,
        *randoms(seed, (4, 3), (4, 3, 3)),
    )


def test_local_mutual_information_golden() -> None:
    close(losses.local_mutual_information(A, LOCALS, ALL, temperature=0.5), 2.30393838)
    close(losses.local_mutual_information(A, LOCALS, SOME, temperature=0.5), 1.64015056)
    same = torch.ones(4, 2, 3, dtype=torch.float64)
    close(losses.local_mutual_information(same[:, 0], same, ALL, temperature=0.5), math.log(7), 1e-12)
    # one token a sample: the token is a key, and the loss is InfoNCE
    one = losses.local_mutual_information(A, B[:, None], ALL[:, :1], temperature=0.1)
    close(one, 3.04738804)


@pytest.mark.parametrize("padding", [1e6, float("nan"), float("inf")])
def test_padded_tokens_change_nothing(padding: float) -> None:
    results = []
    for fill in (0.0, padding):
        leaves = [A.clone().requires_grad_(), LOCALS.masked_fill(~SOME[..., None], fill).requires_grad_()]
        loss = losses.local_mutual_information(*leaves, SOME, temperature=0.5)
        results.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)
    assert (results[1][2][~SOME] == 0).all()


def test_a_sample_without_tokens_is_a_deleted_sample() -> None:
    mask = SOME.clone()
    mask[1] = False
    keep = torch.tensor([0, 2, 3])
    holes = losses.local_mutual_information(A, LOCALS, mask, temperature=0.5)
    deleted = losses.local_mutual_information(A[keep], LOCALS[keep], mask[keep], temperature=0.5)
    torch.testing.assert_close(holes, deleted, rtol=0, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_without_any_token_the_loss_is_zero(dtype: torch.dtype) -> None:
    leaves = [A.to(dtype).requires_grad_(), LOCALS.to(dtype).requires_grad_()]
    loss = losses.local_mutual_information(*leaves, torch.zeros_like(ALL), temperature=0.01)
    assert loss == 0
    for gradient in torch.autograd.grad(loss, leaves):
        assert (gradient == 0).all()
    assert losses.local_mutual_information(A, LOCALS[:, :0], ALL[:, :0], temperature=0.5) == 0


def test_local_mutual_information_names_what_is_wrong() -> None:
    with pytest.raises(ValueError, match=r"^globals_ \(4, 3\) and locals_ \(4, 2, 2\) need equal B and D$"):
        losses.local_mutual_information(A, LOCALS[..., :2], ALL, temperature=0.5)
    with pytest.raises(ValueError, match=r"^mask must be a bool tensor \(4, 2\), got torch.int64 \(4, 2\)$"):
        losses.local_mutual_information(A, LOCALS, ALL.long(), temperature=0.5)


@pytest.mark.parametrize("seed", range(3))
def test_jensen_shannon_is_its_formula(seed: int) -> None:
    def loop(x: Tensor, y: Tensor) -> Tensor:
        rows = []
        for a, b in zip(x, y, strict=True):
            p, q = a.exp() / a.exp().sum(), b.exp() / b.exp().sum()
            m = (p + q) / 2
            rows.append(((p * (p / m).log()).sum() + (q * (q / m).log()).sum()) / 2)
        return mean(rows)

    agree(losses.jensen_shannon, loop, *randoms(seed, (5, 4), (5, 4)))
    far = 1000 * torch.tensor([[1.0, -1.0]])
    close(losses.jensen_shannon(far, -far), float(torch.tensor(2.0).log()))
    close(losses.jensen_shannon(x := randoms(seed, (5, 4))[0], x), 0, 1e-12)
