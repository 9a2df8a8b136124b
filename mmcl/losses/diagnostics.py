"""What an embedding looks like; numbers to log, not usually to train. Rows are taken as given: pass unit rows."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mmcl.losses._checks import labels_of, matrices, positive
from mmcl.losses._math import distances, full_precision, row_mean


@full_precision
def alignment(a: Tensor, b: Tensor) -> Tensor:
    """Mean squared distance of pairs.

    Args:
        a: float ``(B, D)``, as given.
        b: float ``(B, D)``, as given; row i is the partner of row i of ``a``.

    Returns:
        0-d, ≥ 0, at most 4 for unit rows: mean over rows; 0 without rows.

    Raises:
        ValueError: shapes differ or are not 2-d.

    Source: Wang and Isola 2020 (arXiv 2005.10242), section 4, with exponent 2.

    >>> f"{alignment(torch.eye(3), -torch.eye(3)):.1f}"
    '4.0'
    """
    matrices(a=a, b=b)
    return row_mean((a - b).square().sum(1))


@full_precision
def uniformity(x: Tensor, *, t: float = 2.0) -> Tensor:
    """log of the mean of exp(−t · squared distance) over pairs of different rows.

    Args:
        x: float ``(B, D)``, as given.
        t: above 0.

    Returns:
        0-d, ≤ 0, lower is more uniform: mean over the B(B − 1)/2 pairs i < j; 0 with fewer than two rows.

    Raises:
        ValueError: not 2-d, or t is not above 0.

    Source: Wang and Isola 2020 (arXiv 2005.10242), section 4.

    >>> f"{uniformity(torch.tensor([[1.0, 0.0], [0.0, 1.0]])):.1f}"
    '-4.0'
    """
    matrices(x=x)
    positive("t", t)
    if len(x) < 2:
        return x.sum() * 0.0
    first, second = torch.triu_indices(len(x), len(x), offset=1, device=x.device)
    squared = distances(x)[first, second].square()
    return (-t * squared).logsumexp(0) - math.log(len(squared))


@full_precision
def tolerance(x: Tensor, labels: Tensor) -> Tensor:
    """Mean over ordered pairs i ≠ j of ⟨x_i, x_j⟩ where they share a label, else 0.

    Args:
        x: float ``(B, D)``, as given.
        labels: integer ``(B,)``.

    Returns:
        0-d, in [−1, 1] for unit rows: mean over all B(B − 1) pairs; 0 with fewer than two rows.

    Raises:
        ValueError: not 2-d, or labels are not integers, one per row.

    Source: Wang and Liu 2021 (arXiv 2012.09740), the tolerance of a representation.

    >>> f"{tolerance(torch.ones(3, 1), torch.tensor([0, 0, 1])):.4f}"  # 2 of 6 ordered pairs
    '0.3333'
    """
    matrices(x=x)
    labels_of(labels, len(x))
    other = labels[:, None] != labels
    itself = torch.eye(len(x), dtype=torch.bool, device=x.device)
    return (x @ x.T).masked_fill(other | itself, 0.0).sum() / max(len(x) * (len(x) - 1), 1)
