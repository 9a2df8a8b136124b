"""Hints, boundaries, maps, flows: loops from the formulas, golden values, identities."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from loss_cases import agree, close, golden, mean, randoms
from torch import Tensor

from mmcl import losses

A, B, C = golden()
seeds = pytest.mark.parametrize("seed", range(3))


def cells(*shape: int) -> itertools.product[tuple[int, ...]]:
    return itertools.product(*map(range, shape))


@seeds
@pytest.mark.parametrize("shape", [(4, 3), (4, 2, 3)])
def test_hint_is_its_formula(seed: int, shape: tuple[int, ...]) -> None:
    agree(
        losses.hint,
        lambda s, t: mean([(s[cell] - t.detach()[cell]) ** 2 for cell in cells(*shape)]),
        *randoms(seed, shape, shape),
    )


@seeds
@pytest.mark.parametrize("shape", [(4, 3), (4, 2, 3)])
def test_activation_boundary_is_its_formula(seed: int, shape: tuple[int, ...]) -> None:
    def loop(student: Tensor, teacher: Tensor) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for cell in cells(*shape):
            s, t = student[cell], teacher.detach()[cell]
            if t <= 0 and s > -0.5:
                total = total + (s + 0.5) ** 2
            if t > 0 and s <= 0.5:
                total = total + (s - 0.5) ** 2
        return total / shape[0]

    agree(lambda s, t: losses.activation_boundary(s, t, margin=0.5), loop, *randoms(seed, shape, shape))


def test_activation_boundary_is_zero_beyond_the_margin() -> None:
    close(losses.activation_boundary(1.5 * A.sign(), A), 0)
    close(losses.activation_boundary(A.sign(), 0.01 * A), 0)
    with pytest.raises(ValueError, match="margin must be above 0"):
        losses.activation_boundary(A, B, margin=0.0)


@seeds
@pytest.mark.parametrize("shape", [(4, 3), (4, 2, 3)])
def test_variational_information_is_its_formula(seed: int, shape: tuple[int, ...]) -> None:
    def loop(predicted: Tensor, scale: Tensor, teacher: Tensor) -> Tensor:
        values = []
        for cell in cells(*shape):
            variance = (1 + scale[cell[-1]].exp()).log() + 1e-5
            error = predicted[cell] - teacher.detach()[cell]
            # the Gaussian's own density, less the constant that no one can change
            density = -(error**2) / (2 * variance) - (2 * math.pi * variance).log() / 2
            values.append(-density - math.log(2 * math.pi) / 2)
        return mean(values)

    agree(losses.variational_information, loop, *randoms(seed, shape, shape[-1:], shape))


def test_variational_information_refuses_another_width() -> None:
    with pytest.raises(ValueError, match=r"^scale must be a float tensor \(3,\)"):
        losses.variational_information(A, torch.zeros(2), B)


@seeds
def test_correlation_congruence_is_the_mean_over_all_orders(seed: int) -> None:
    def loop(student: Tensor, teacher: Tensor) -> Tensor:
        orders = []
        for order in itertools.permutations(range(4)):
            errors = [(student[i] - teacher.detach()[i]).abs() for i in order]
            orders.append(mean([(x * y).sum() for x, y in itertools.pairwise(errors)]))
        return mean(orders)

    agree(losses.correlation_congruence, loop, *randoms(seed, (4, 3), (4, 3)))


def attention(maps: Tensor) -> Tensor:
    energy = torch.stack([(position * position).sum() / len(position) for position in maps])
    return energy / (energy * energy).sum().sqrt()


@seeds
@pytest.mark.parametrize(("name", "power"), [("attention_transfer", 2), ("factor_transfer", 1)])
def test_transfers_of_energy_are_their_formula(seed: int, name: str, power: int) -> None:
    def loop(student: Tensor, teacher: Tensor) -> Tensor:
        gaps = [attention(s) - attention(t.detach()) for s, t in zip(student, teacher, strict=True)]
        return mean([gap[i].abs() ** power for gap in gaps for i in range(4)])

    agree(getattr(losses, name), loop, *randoms(seed, (3, 4, 5), (3, 4, 2)))


@seeds
def test_neuron_selectivity_is_its_formula(seed: int) -> None:
    def patterns(maps: Tensor) -> list[Tensor]:
        return [channel / (channel * channel).sum().sqrt() for channel in maps.unbind(1)]

    def kernel(x: list[Tensor], y: list[Tensor]) -> Tensor:
        return mean([(a * b).sum() ** 2 for a in x for b in y])

    def loop(student: Tensor, teacher: Tensor) -> Tensor:
        rows = []
        for s, t in zip(student, teacher.detach(), strict=True):
            x, y = patterns(s), patterns(t)
            rows.append(kernel(x, x) + kernel(y, y) - 2 * kernel(x, y))
        return mean(rows)

    agree(losses.neuron_selectivity, loop, *randoms(seed, (3, 4, 5), (3, 4, 2)))


@seeds
def test_flow_is_its_formula(seed: int) -> None:
    def matrix(first: Tensor, second: Tensor, d: int, e: int) -> Tensor:
        return mean([x[d] * y[e] for x, y in zip(first, second, strict=True)])

    def loop(s: Tensor, u: Tensor, t: Tensor, w: Tensor) -> Tensor:
        t, w = t.detach(), w.detach()
        return mean([(matrix(s[i], u[i], d, e) - matrix(t[i], w[i], d, e)) ** 2 for i, d, e in cells(3, 2, 4)])

    agree(losses.flow, loop, *randoms(seed, (3, 5, 2), (3, 5, 4), (3, 6, 2), (3, 6, 4)))


@seeds
def test_kdsvd_is_its_formula(seed: int) -> None:
    """… with torch's own singular vectors and their gradient, which is right where the singular values differ."""

    def placement(first: Tensor, second: Tensor) -> Tensor:
        return torch.stack([(-((y - x) ** 2) / 8).exp() for y in second for x in first])

    def loop(s: Tensor, u: Tensor, t: Tensor, w: Tensor) -> Tensor:
        rows = []
        for row in range(3):
            targets, chosen = [], []
            for maps, ours in ((t, s), (w, u)):
                target = torch.linalg.svd(maps.detach()[row]).Vh[0]
                target = target * target[target.abs().argmax()].sign()
                candidates = torch.linalg.svd(ours[row], full_matrices=False).Vh[:4]
                best = max(candidates, key=lambda v, target=target: float((v * target).sum().abs()))
                chosen.append(best * (best * target).sum().sign().detach())
                targets.append(target)
            rows.append(((placement(*chosen) - placement(*targets)) ** 2).sum())
        return mean(rows)

    agree(losses.kdsvd, loop, *randoms(seed, (3, 5, 3), (3, 5, 4), (3, 6, 3), (3, 6, 4)), tolerance=1e-9)


def test_a_student_that_is_its_teacher_has_nothing_to_learn() -> None:
    first, second = randoms(0, (3, 5, 4), (3, 5, 3))
    for name in ("hint", "attention_transfer", "factor_transfer", "neuron_selectivity"):
        close(getattr(losses, name)(first, first), 0, 1e-12)
        assert getattr(losses, name)(first, first.flip(1)) > 1e-3
    for name in ("flow", "kdsvd"):
        close(getattr(losses, name)(first, second, first, second), 0, 1e-12)
        assert getattr(losses, name)(first, second, first.flip(2), second) > 1e-3


def test_directions_of_equal_singular_values_are_no_trap() -> None:
    maps = torch.eye(4).repeat(2, 1, 1).requires_grad_()
    losses.kdsvd(maps, maps, *randoms(1, (2, 4, 4), (2, 4, 4))).backward()
    assert maps.grad is not None and maps.grad.abs().max() < 10


def test_golden() -> None:
    """Of our own making: the sheets give none for these."""
    close(losses.hint(A, B), float((A - B).square().mean()), 1e-12)
    close(losses.correlation_congruence(A, A), 0)
