"""Prediction of a target that gets no gradient."""

from __future__ import annotations

from torch import Tensor

from mmcl.losses._checks import matrices
from mmcl.losses._math import full_precision, row_mean, unit


@full_precision
def byol(predictions: Tensor, targets: Tensor) -> Tensor:
    """Squared distance between unit rows, 2 − 2 cos; one direction.

    Args:
        predictions: float ``(B, D)``, normalised inside.
        targets: float ``(B, D)``, normalised inside, detached.

    Returns:
        0-d in [0, 4]: mean over rows; 0 without rows.

    Raises:
        ValueError: shapes differ or are not 2-d.

    Source: Grill et al. 2020 (arXiv 2006.07733), eq. 2.

    >>> f"{byol(torch.eye(3), -torch.eye(3)):.1f}"
    '4.0'
    """
    matrices(predictions=predictions, targets=targets)
    return row_mean(2 - 2 * cosine_rows(predictions, targets))


@full_precision
def cosine_rows(predictions: Tensor, targets: Tensor) -> Tensor:
    """Cosine of each prediction with its detached target, ``(B,)``; both float ``(B, D)``."""
    matrices(predictions=predictions, targets=targets)
    return (unit(predictions) * unit(targets.detach())).sum(1)
