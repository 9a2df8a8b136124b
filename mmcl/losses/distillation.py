"""What a student copies from a teacher: its predictions, or the relations between its rows.

Teachers are detached. Except for :func:`knowledge_distillation`, student and teacher may differ in width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mmcl.losses._checks import matrices, positive
from mmcl.losses._math import distances, full_precision, row_mean, unit


@full_precision
def knowledge_distillation(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float | Tensor) -> Tensor:
    """Temperature² · KL(teacher ‖ student) of softened class predictions.

    Args:
        student_logits: float ``(B, K)``.
        teacher_logits: float ``(B, K)``, detached.
        temperature: divides both logits; above 0, a number or 0-d tensor (4 in common use).

    Returns:
        0-d, ≥ 0, in nats: mean over rows; 0 without rows.

    Raises:
        ValueError: shapes differ or are not 2-d, or the temperature is not above 0.

    Source: Hinton et al. 2015 (arXiv 1503.02531), section 2.

    >>> f"{knowledge_distillation(torch.zeros(1, 2), torch.tensor([[1.0, 0.0]]), temperature=1.0):.4f}"
    '0.1109'
    """
    matrices(student_logits=student_logits, teacher_logits=teacher_logits)
    positive("temperature", temperature)
    student = (student_logits / temperature).log_softmax(1)
    teacher = (teacher_logits.detach() / temperature).log_softmax(1)
    return row_mean((teacher.exp() * (teacher - student)).sum(1)) * temperature**2


@full_precision
def similarity_preserving(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared distance between the row-normalised Gram matrices ÷ B².

    Args:
        student: float ``(B, D)``, raw.
        teacher: float ``(B, D')``, raw, detached.

    Returns:
        0-d in [0, 4/B]; 0 without rows.

    Raises:
        ValueError: not 2-d, or rows differ in number.

    Source: Tung and Mori 2019 (arXiv 1907.09682), section 3.

    >>> rows = torch.eye(3)
    >>> f"{similarity_preserving(5 * rows, rows):.1f}"
    '0.0'
    """
    matrices(same="rows", student=student, teacher=teacher)
    teacher = teacher.detach()
    gap = unit(student @ student.T) - unit(teacher @ teacher.T)
    return row_mean(gap.square().sum(1)) / max(len(student), 1)


@full_precision
def relational_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Smooth L1 between the distances of all pairs of rows, each set divided by its mean of distances above zero.

    Args:
        student: float ``(B, D)``, raw.
        teacher: float ``(B, D')``, raw, detached.

    Returns:
        0-d, ≥ 0: mean over all B² ordered pairs; 0 without rows. Distances of equal rows have zero gradient.

    Raises:
        ValueError: not 2-d, or rows differ in number.

    Source: Park et al. 2019 (arXiv 1904.05068), the distance-wise loss.

    >>> rows = torch.eye(3)
    >>> f"{relational_distance(5 * rows, rows):.1f}"
    '0.0'
    """
    matrices(same="rows", student=student, teacher=teacher)
    gaps = F.smooth_l1_loss(_relative_distances(student), _relative_distances(teacher.detach()), reduction="none")
    return row_mean(gaps.flatten())


def _relative_distances(rows: Tensor) -> Tensor:
    pairs = distances(rows)
    apart = pairs > 0
    mean = pairs.sum() / apart.sum().clamp_min(1)
    return pairs / torch.where(apart.any(), mean, 1.0)


@full_precision
def relational_angle(student: Tensor, teacher: Tensor) -> Tensor:
    """Smooth L1 between the cosines of the angles that all triples of rows form.

    Args:
        student: float ``(B, D)``, raw.
        teacher: float ``(B, D')``, raw, detached.

    Returns:
        0-d, ≥ 0: mean over all B³ ordered triples, those with two equal rows counting as cosine 0; 0 without rows.
        Needs memory for B²·max(B, D) numbers.

    Raises:
        ValueError: not 2-d, or rows differ in number.

    Source: Park et al. 2019 (arXiv 1904.05068), the angle-wise loss.

    >>> rows = torch.eye(3)
    >>> f"{relational_angle(5 * rows, rows):.1f}"
    '0.0'
    """
    matrices(same="rows", student=student, teacher=teacher)
    gaps = F.smooth_l1_loss(_angles(student), _angles(teacher.detach()), reduction="none")
    return row_mean(gaps.flatten())


def _angles(rows: Tensor) -> Tensor:
    """Cosines ``(B, B, B)``: entry (i, j, k) is the angle at row i between rows j and k."""
    directions = unit(rows[None, :] - rows[:, None])
    return directions @ directions.mT


@full_precision
def probabilistic_transfer(student: Tensor, teacher: Tensor) -> Tensor:
    """KL between the teacher's and the student's neighbour probabilities, (cos + 1) / 2 normalised per row.

    Args:
        student: float ``(B, D)``, normalised inside.
        teacher: float ``(B, D')``, normalised inside, detached.

    Returns:
        0-d, ≥ 0, in nats: mean over all B² entries (so the mean KL of rows ÷ B); 0 without rows. Probabilities below
        1e-7 count as 1e-7 in the logarithms.

    Raises:
        ValueError: not 2-d, or rows differ in number.

    Source: Passalis and Tefas 2018 (arXiv 1803.10837), section 3.

    >>> rows = torch.eye(3)
    >>> f"{probabilistic_transfer(5 * rows, rows):.1f}"
    '0.0'
    """
    matrices(same="rows", student=student, teacher=teacher)
    p, q = _neighbours(teacher.detach()), _neighbours(student)
    gaps = p * (p.clamp_min(1e-7).log() - q.clamp_min(1e-7).log())
    return row_mean(gaps.flatten())


def _neighbours(rows: Tensor) -> Tensor:
    rows = unit(rows)
    similarities = (rows @ rows.T + 1) / 2
    return similarities / similarities.sum(1, keepdim=True)
