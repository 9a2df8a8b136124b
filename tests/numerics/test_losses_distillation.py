"""Distillation of predictions and of relations, and the diagnostics: loops, golden values, identities."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from loss_cases import agree, close, cosine, golden, mean, randoms
from torch import Tensor

from mmcl import losses

A, B, C = golden()
seeds = pytest.mark.parametrize("seed", range(3))
RELATIONS = [
    losses.similarity_preserving,
    losses.relational_distance,
    losses.relational_angle,
    losses.probabilistic_transfer,
]


def smooth_l1(x: Tensor, y: Tensor) -> Tensor:
    gap = (x - y).abs()
    return gap * gap / 2 if gap < 1 else gap - 0.5


@seeds
def test_knowledge_distillation_is_its_formula(seed: int) -> None:
    def loop(student: Tensor, teacher: Tensor) -> Tensor:
        rows = []
        for s, t in zip(student, teacher.detach(), strict=True):
            p, q = (t / 3).exp() / (t / 3).exp().sum(), (s / 3).exp() / (s / 3).exp().sum()
            rows.append(9 * sum(x * (x / y).log() for x, y in zip(p, q, strict=True)))
        return mean(rows)

    agree(lambda s, t: losses.knowledge_distillation(s, t, temperature=3), loop, *randoms(seed, (5, 4), (5, 4)))


def test_knowledge_distillation_golden() -> None:
    close(losses.knowledge_distillation(3 * A, 3 * B, temperature=4), 1.08993842)
    close(losses.knowledge_distillation(A, A + 1, temperature=4), 0, 1e-12)


@seeds
def test_similarity_preserving_is_its_formula(seed: int) -> None:
    def gram(rows: Tensor) -> list[Tensor]:
        products = [torch.stack([(x * y).sum() for y in rows]) for x in rows]
        return [row / (row * row).sum().sqrt() for row in products]

    def loop(student: Tensor, teacher: Tensor) -> Tensor:
        pairs = zip(gram(student), gram(teacher.detach()), strict=True)
        return sum(((s - t) ** 2).sum() for s, t in pairs) / len(student) ** 2

    agree(losses.similarity_preserving, loop, *randoms(seed, (5, 3), (5, 4)))


@seeds
def test_relational_distance_is_its_formula(seed: int) -> None:
    def relative(rows: Tensor) -> dict[tuple[int, int], Tensor]:
        pairs = itertools.permutations(range(len(rows)), 2)
        lengths = {(i, j): ((rows[i] - rows[j]) ** 2).sum().sqrt() for i, j in pairs}
        average = mean(list(lengths.values()))
        return {pair: length / average for pair, length in lengths.items()}

    def loop(student: Tensor, teacher: Tensor) -> Tensor:
        ours, theirs = relative(student), relative(teacher.detach())
        return sum(smooth_l1(ours[pair], theirs[pair]) for pair in ours) / len(student) ** 2

    agree(losses.relational_distance, loop, *randoms(seed, (5, 3), (5, 4)))


@seeds
def test_relational_angle_is_its_formula(seed: int) -> None:
    def loop(student: Tensor, teacher: Tensor) -> Tensor:
        teacher = teacher.detach()
        total = torch.zeros((), dtype=torch.float64)
        for i, j, k in itertools.product(range(len(student)), repeat=3):
            if i not in (j, k):
                ours = cosine(student[j] - student[i], student[k] - student[i])
                total = total + smooth_l1(ours, cosine(teacher[j] - teacher[i], teacher[k] - teacher[i]))
        return total / len(student) ** 3

    agree(losses.relational_angle, loop, *randoms(seed, (4, 3), (4, 4)))


@seeds
def test_probabilistic_transfer_is_its_formula(seed: int) -> None:
    def neighbours(rows: Tensor) -> list[list[Tensor]]:
        table = [[(cosine(x, y) + 1) / 2 for y in rows] for x in rows]
        return [[x / sum(row) for x in row] for row in table]

    def loop(student: Tensor, teacher: Tensor) -> Tensor:
        q, p = neighbours(student), neighbours(teacher.detach())
        cells = itertools.product(range(len(student)), repeat=2)
        return mean([p[i][j] * (p[i][j] / q[i][j]).log() for i, j in cells])

    agree(losses.probabilistic_transfer, loop, *randoms(seed, (5, 3), (5, 4)))


def test_relations_golden() -> None:
    close(losses.similarity_preserving(A, B), 0.26953906)
    close(losses.relational_distance(A, B), 0.06768004)
    close(losses.relational_angle(A, B), 0.0446753)
    close(losses.probabilistic_transfer(A, B), 0.07972844)


@pytest.mark.parametrize("relation", RELATIONS, ids=lambda f: f.__name__)
def test_relations_are_zero_at_the_teacher(relation: object) -> None:
    for student in (A, 3 * A, A[:, [2, 0, 1]]):
        close(relation(student, A), 0, 1e-12)
    assert relation(B, A) > 1e-3


def test_distances_of_close_rows_keep_their_digits() -> None:
    """Above 25 rows torch's default goes through x·y and loses them."""
    (noise,) = randoms(0, (40, 3))
    rows = (100 + 1e-2 * noise).float()
    close(losses.relational_distance(rows, rows.double()), 0, 1e-10)
    expected = losses.uniformity(rows.double(), t=1e3)
    close(losses.uniformity(rows, t=1e3), float(expected), 1e-5)


@seeds
def test_alignment_is_its_formula(seed: int) -> None:
    loop = lambda a, b: mean([((x - y) ** 2).sum() for x, y in zip(a, b, strict=True)])  # noqa: E731
    agree(losses.alignment, loop, *randoms(seed, (5, 3), (5, 3)))
    close(losses.alignment(A, B), float(losses.byol(A, B)), 1e-12)
    close(losses.alignment(2 * A, 2 * B), 4 * float(losses.alignment(A, B)), 1e-12)


@seeds
def test_uniformity_is_its_formula(seed: int) -> None:
    def loop(x: Tensor) -> Tensor:
        return mean([(-1.5 * ((a - b) ** 2).sum()).exp() for a, b in itertools.combinations(x, 2)]).log()

    agree(lambda x: losses.uniformity(x, t=1.5), loop, *randoms(seed, (5, 3)))


def test_uniformity_identities() -> None:
    close(losses.uniformity(torch.ones(5, 3)), 0, 1e-12)
    close(losses.uniformity(torch.eye(5)), -4)
    # so far apart that every exponential underflows
    assert losses.uniformity(100 * torch.eye(5)) == pytest.approx(-40_000)


@seeds
def test_tolerance_is_its_formula(seed: int) -> None:
    labels = [0, 1, 0, 0, 1]

    def loop(x: Tensor) -> Tensor:
        pairs = itertools.permutations(range(5), 2)
        return mean([(x[i] * x[j]).sum() * (labels[i] == labels[j]) for i, j in pairs])

    agree(lambda x: losses.tolerance(x, torch.tensor(labels)), loop, *randoms(seed, (5, 3)))


def test_tolerance_identities() -> None:
    assert losses.tolerance(torch.ones(4, 1), torch.zeros(4, dtype=torch.long)) == 1
    assert losses.tolerance(torch.ones(4, 1), torch.arange(4)) == 0
    assert math.isclose(
        float(losses.tolerance(2 * A, torch.zeros(4).int())), 4 * float(losses.tolerance(A, torch.zeros(4).int()))
    )
