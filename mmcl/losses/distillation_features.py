"""What a student copies from a teacher, feature by feature. Teachers are detached.

Features are ``(B, D)`` or, position by position, ``(B, L, D)``; the student's come mapped to the teacher's shape.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from mmcl.losses._checks import alike, matrices, positive
from mmcl.losses._math import full_precision, row_mean

SMALLEST_VARIANCE = 1e-5


@full_precision
def hint(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of features (FitNet).

    Args:
        student: float ``(B, D)`` or ``(B, L, D)``, raw, after the regressor to the teacher's width.
        teacher: float, same shape, raw, detached.

    Returns:
        0-d, ≥ 0: mean over all numbers; 0 without rows.

    Raises:
        ValueError: shapes differ or have another number of axes.

    Source: Romero et al. 2015 (arXiv 1412.6550), eq. 3, as a mean.

    >>> f"{hint(torch.ones(2, 3), torch.zeros(2, 3)):.1f}"
    '1.0'
    """
    alike(student=student, teacher=teacher)
    return row_mean((student - teacher.detach()).square().flatten(1).mean(1))


@full_precision
def activation_boundary(student: Tensor, teacher: Tensor, *, margin: float | Tensor = 1.0) -> Tensor:
    """Squared hinge that puts each of the student's units on the side of zero where the teacher's is, by a margin.

    Args:
        student: float ``(B, D)`` or ``(B, L, D)``, raw, before the activation, after the connector.
        teacher: float, same shape, before the activation; only the sign counts, detached.
        margin: how far beyond zero; above 0.

    Returns:
        0-d, ≥ 0: sum over units, mean over rows; 0 without rows. (The authors' scripts divide it by 1,000 / 3.)

    Raises:
        ValueError: shapes differ or have another number of axes, or the margin is not above 0.

    Source: Heo et al. 2019 (arXiv 1811.03233), eq. 4.

    >>> f"{activation_boundary(torch.tensor([[0.5, 0.5]]), torch.tensor([[1.0, -1.0]])):.2f}"  # 0.25 + 2.25
    '2.50'
    """
    alike(student=student, teacher=teacher)
    positive("margin", margin)
    side = (teacher.detach() > 0).to(student.dtype) * 2 - 1
    return row_mean((margin - side * student).clamp_min(0).square().flatten(1).sum(1))


@full_precision
def variational_information(predicted: Tensor, scale: Tensor, teacher: Tensor) -> Tensor:
    """Negative log-likelihood of the teacher's features under a Gaussian that the student predicts, less its constant.

    Args:
        predicted: float ``(B, D)`` or ``(B, L, D)``: the means, from the student's features.
        scale: float ``(D,)``, learned, any real numbers: the variances are softplus(scale) + 1e-5.
        teacher: float, the shape of ``predicted``, raw, detached.

    Returns:
        0-d, of any sign: mean over all numbers of ½ [(predicted − teacher)² / σ² + log σ²]; 0 without rows.

    Raises:
        ValueError: shapes disagree.

    Source: Ahn et al. 2019 (arXiv 1904.05835), eq. 4.

    >>> at_one = torch.tensor([0.541325])  # softplus: variance 1
    >>> f"{variational_information(torch.ones(2, 1), at_one, torch.zeros(2, 1)):.3f}"
    '0.500'
    """
    alike(predicted=predicted, teacher=teacher)
    if scale.shape != predicted.shape[-1:] or not scale.is_floating_point():
        raise ValueError(f"scale must be a float tensor ({predicted.shape[-1]},), got {scale.dtype} {scale.shape}")
    variance = F.softplus(scale) + SMALLEST_VARIANCE
    values = ((predicted - teacher.detach()).square() / variance + variance.log()) / 2
    return row_mean(values.flatten(1).mean(1))


@full_precision
def correlation_congruence(student: Tensor, teacher: Tensor) -> Tensor:
    """How far the errors |student − teacher| of different rows go together: mean over pairs i ≠ j of Σ_d δ_id · δ_jd.

    The authors' code takes the pairs of neighbouring rows, so that its value depends on the order of the batch; this is
    the mean of that value over all orders.

    Args:
        student: float ``(B, D)``, raw, after the map to the teacher's width.
        teacher: float ``(B, D)``, raw, detached.

    Returns:
        0-d, ≥ 0; 0 with fewer than two rows.

    Raises:
        ValueError: shapes differ or are not 2-d.

    Source: Peng et al. 2019 (arXiv 1904.01802); the form is that of the RepDistiller collection (arXiv 1910.10699).

    >>> f"{correlation_congruence(torch.ones(4, 3), torch.zeros(4, 3)):.1f}"
    '3.0'
    """
    matrices(student=student, teacher=teacher)
    errors = (student - teacher.detach()).abs()
    rows = len(errors)
    both = errors.sum(0).square() - errors.square().sum(0)
    return both.sum() / max(rows * (rows - 1), 1)
