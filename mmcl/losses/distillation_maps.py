"""What a student copies from a teacher's feature maps. Teachers are detached.

Maps are ``(B, L, D)``: L positions of any layout (space, time, frequency), D channels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmcl.losses._checks import feature_maps
from mmcl.losses._math import full_precision, row_mean, unit


@full_precision
def attention_transfer(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of where the features have their energy: the mean over channels of f², as a unit row.

    Args:
        student: float ``(B, L, D)``; the length of a sample's map does not matter.
        teacher: float ``(B, L, D')``, likewise, detached.

    Returns:
        0-d in [0, 2/L]: mean over positions and rows; 0 without rows.

    Raises:
        ValueError: not 3-d, or rows or positions differ in number.

    Source: Zagoruyko and Komodakis 2017 (arXiv 1612.03928), eq. 2 with p = 2, as a mean of squares.

    >>> f"{attention_transfer(torch.eye(2)[None], 5 * torch.eye(2)[None]):.1f}"
    '0.0'
    """
    feature_maps(same="positions", student=student, teacher=teacher)
    return row_mean((_attention(student) - _attention(teacher.detach())).square().mean(1))


@full_precision
def factor_transfer(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean absolute difference of the energy of factors over positions: the mean over factors of f², as a unit row.

    Args:
        student: float ``(B, L, D)``: factors from the student's translator; a sample's length does not matter.
        teacher: float ``(B, L, D')``: factors from the teacher's paraphraser, likewise, detached.

    Returns:
        0-d, ≥ 0: mean over positions and rows; 0 without rows.

    Raises:
        ValueError: not 3-d, or rows or positions differ in number.

    Source: Kim et al. 2018 (arXiv 1802.04977), eq. 3 with p = 1; energies as in the RepDistiller collection
    (arXiv 1910.10699).

    >>> f"{factor_transfer(torch.eye(2)[None], 5 * torch.eye(2)[None]):.1f}"
    '0.0'
    """
    feature_maps(same="positions", student=student, teacher=teacher)
    return row_mean((_attention(student) - _attention(teacher.detach())).abs().mean(1))


def _attention(maps: Tensor) -> Tensor:
    """Unit rows ``(B, L)``; the map is made a unit first, so that squares neither overflow nor vanish."""
    return unit(_whole_unit(maps).square().mean(2))


def _whole_unit(maps: Tensor) -> Tensor:
    return unit(maps.flatten(1)).view_as(maps)


@full_precision
def neuron_selectivity(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared maximum mean discrepancy, kernel (x·y)², between the channels' patterns of activity over positions.

    Args:
        student: float ``(B, L, D)``; each channel's pattern is normalised inside.
        teacher: float ``(B, L, D')``, likewise, detached.

    Returns:
        0-d, ≥ 0: mean over rows; 0 without rows. Needs memory for B·L² numbers.

    Raises:
        ValueError: not 3-d, or rows or positions differ in number.

    Source: Huang and Wang 2017 (arXiv 1707.01219), eq. 4 with the polynomial kernel of degree 2.

    >>> f"{neuron_selectivity(torch.eye(2)[None], 5 * torch.eye(2)[None]):.1f}"
    '0.0'
    """
    feature_maps(same="positions", student=student, teacher=teacher)
    # Σ over channels c, d of (x_c · y_d)² is the inner product of Σ x_c x_cᵀ and Σ y_d y_dᵀ
    gap = _pattern_moment(student) - _pattern_moment(teacher.detach())
    return row_mean(gap.square().sum((1, 2)))


def _pattern_moment(maps: Tensor) -> Tensor:
    patterns = unit(maps.mT)
    return patterns.mT @ patterns / maps.shape[2]


@full_precision
def flow(student_first: Tensor, student_second: Tensor, teacher_first: Tensor, teacher_second: Tensor) -> Tensor:
    """Mean squared difference of how two stages go together: the D × E products of their channels over positions.

    Args:
        student_first, student_second: float ``(B, L, D)`` and ``(B, L, E)``, raw: two stages of one tower.
        teacher_first, teacher_second: float ``(B, L', D)`` and ``(B, L', E)``, raw, detached.

    Returns:
        0-d, ≥ 0: mean over channel pairs and rows; 0 without rows.

    Raises:
        ValueError: not 3-d, or rows, a tower's positions or a stage's channels differ in number.

    Source: Yim et al. 2017, "A gift from knowledge distillation", eq. 1-2 (FSP).

    >>> maps = torch.eye(2)[None]
    >>> f"{flow(maps, maps, 2 * maps, maps):.3f}"  # half of the entries differ by 1/2
    '0.125'
    """
    _two_stages(student_first, student_second, teacher_first, teacher_second)
    student = student_first.mT @ student_second / max(student_first.shape[1], 1)
    teacher = teacher_first.detach().mT @ teacher_second.detach() / max(teacher_first.shape[1], 1)
    return row_mean((student - teacher).square().flatten(1).mean(1))


def _two_stages(student_first: Tensor, student_second: Tensor, teacher_first: Tensor, teacher_second: Tensor) -> None:
    feature_maps(same="positions", student_first=student_first, student_second=student_second)
    feature_maps(same="positions", teacher_first=teacher_first, teacher_second=teacher_second)
    feature_maps(same="rows", student_first=student_first, teacher_first=teacher_first)
    for stage, student, teacher in (
        ("first", student_first, teacher_first),
        ("second", student_second, teacher_second),
    ):
        if student.shape[2] != teacher.shape[2]:
            raise ValueError(f"need equal channels: student_{stage} {student.shape}, teacher_{stage} {teacher.shape}")


@full_precision
def kdsvd(student_first: Tensor, student_second: Tensor, teacher_first: Tensor, teacher_second: Tensor) -> Tensor:
    """Squared difference of how the main directions of two stages lie to each other, exp(−(v_i − w_j)² / 8).

    v and w are the first right singular vectors of the stages' ``(L, D)`` maps. The teacher's point to the side where
    their largest entry is positive; the student's are those among its first four that lie closest to them, likewise.

    Args:
        student_first, student_second: float ``(B, L, D)`` and ``(B, L, E)``: two stages of one tower; the length of a
            sample's map does not matter.
        teacher_first, teacher_second: float ``(B, L', D)`` and ``(B, L', E)``, likewise, detached.

    Returns:
        0-d, ≥ 0: sum over pairs of channels, mean over rows; 0 without rows. Directions of equal singular values,
        which are not defined, give each other no gradient.

    Raises:
        ValueError: not 3-d, or rows, a tower's positions or a stage's channels differ in number.

    Source: Lee, Kim and Song 2018 (arXiv 1807.06819), section 3, with one singular vector per stage.

    >>> maps = torch.eye(2)[None] * torch.tensor([2.0, 1.0])
    >>> f"{kdsvd(5 * maps, maps, maps, maps):.1f}"
    '0.0'
    """
    _two_stages(student_first, student_second, teacher_first, teacher_second)
    targets = [_main_direction(maps.detach()) for maps in (teacher_first, teacher_second)]
    stages = zip((student_first, student_second), targets, strict=True)
    student = _placement(*(_closest_direction(maps, target) for maps, target in stages))
    return row_mean((student - _placement(*targets)).square().sum((1, 2)))


def _placement(first: Tensor, second: Tensor) -> Tensor:
    return (-(second[:, :, None] - first[:, None]).square() / 8).exp()


def _main_direction(maps: Tensor) -> Tensor:
    direction = _directions(maps)[..., 0]
    largest = direction.abs().argmax(1, keepdim=True)
    sign: Tensor = direction.gather(1, largest).sign()
    return direction * sign


def _closest_direction(maps: Tensor, target: Tensor) -> Tensor:
    directions = _directions(maps)[..., : min(4, maps.shape[1])]
    cosines = (target[:, :, None] * directions).sum(1)
    best: Tensor = cosines.detach().abs().argmax(1, keepdim=True)
    sign: Tensor = cosines.detach().gather(1, best).sign()
    chosen: Tensor = directions.gather(2, best[:, None].expand(-1, directions.shape[1], 1))[..., 0]
    return chosen * sign


def _directions(maps: Tensor) -> Tensor:
    """Right singular vectors as columns ``(B, D, D)``, the largest singular value first."""
    maps = _whole_unit(maps)
    directions: Tensor = _Eigenvectors.apply(maps.mT @ maps)
    return directions.flip(2)


class _Eigenvectors(torch.autograd.Function):
    """Of symmetric matrices; torch's own gradient is infinite where two eigenvalues are equal, here it is left out."""

    @staticmethod
    def forward(ctx: Any, matrices: Tensor) -> Tensor:
        values: Tensor
        vectors: Tensor
        values, vectors = torch.linalg.eigh(matrices)
        ctx.save_for_backward(values, vectors)
        return vectors

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        values, vectors = ctx.saved_tensors
        gaps = values[:, None, :] - values[:, :, None]
        apart = gaps.abs() > torch.finfo(values.dtype).eps ** 0.5  # of eigenvalues that sum to 1
        mixed = torch.where(apart, vectors.mT @ gradient / gaps.masked_fill(~apart, 1.0), 0.0)
        full: Tensor = vectors @ mixed @ vectors.mT
        return (full + full.mT) / 2
