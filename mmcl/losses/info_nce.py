"""Pairs of rows against all other pairs of the batch: InfoNCE, CLIP, SigLIP."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mmcl.losses._checks import matrices, positive
from mmcl.losses._math import diagonal_nll, full_precision, row_mean, unit


@full_precision
def info_nce(queries: Tensor, keys: Tensor, *, temperature: float | Tensor) -> Tensor:
    """Cross-entropy of each query against all keys; key i is the positive of query i.

    Args:
        queries: float ``(B, D)``, normalised inside.
        keys: float ``(B, D)``, normalised inside; gradients reach both sides.
        temperature: divides the cosine; above 0, a number or 0-d tensor.

    Returns:
        0-d, ≥ 0, in nats: mean over rows; 0 without rows.

    Raises:
        ValueError: shapes differ or are not 2-d, or the temperature is not above 0.

    Source: van den Oord et al. 2018 (arXiv 1807.03748), eq. 4, with the cosine as critic.

    >>> rows = torch.eye(4)
    >>> f"{info_nce(rows, rows, temperature=1.0):.4f}"  # log(e + 3) - 1
    '0.7437'
    """
    matrices(queries=queries, keys=keys)
    positive("temperature", temperature)
    return row_mean(diagonal_nll(unit(queries) @ unit(keys).T / temperature))


@full_precision
def clip(a: Tensor, b: Tensor, *, scale: float | Tensor) -> Tensor:
    """The mean of InfoNCE from ``a`` to ``b`` and from ``b`` to ``a``.

    Args:
        a: float ``(B, D)``, normalised inside.
        b: float ``(B, D)``, normalised inside; row i is the partner of row i of ``a``.
        scale: multiplies the cosine (1 / temperature); at least 0, a number or 0-d tensor.

    Returns:
        0-d, ≥ 0, in nats: mean over rows and directions; 0 without rows.

    Raises:
        ValueError: shapes differ or are not 2-d, or the scale is negative.

    Source: Radford et al. 2021 (arXiv 2103.00020), figure 3.

    >>> rows = torch.eye(4)
    >>> f"{clip(rows, rows, scale=0.0):.4f}"  # log 4
    '1.3863'
    """
    matrices(a=a, b=b)
    positive("scale", scale, or_zero=True)
    logits = scale * (unit(a) @ unit(b).T)
    return (row_mean(diagonal_nll(logits)) + row_mean(diagonal_nll(logits.T))) / 2


@full_precision
def siglip(a: Tensor, b: Tensor, *, scale: float | Tensor, bias: float | Tensor) -> Tensor:
    """Each of the B² pairs is a question of its own: same row or not.

    Args:
        a: float ``(B, D)``, normalised inside.
        b: float ``(B, D)``, normalised inside; row i is the partner of row i of ``a``.
        scale: multiplies the cosine; at least 0, a number or 0-d tensor (10 at the start of training in the paper).
        bias: is added to it; a number or 0-d tensor (−10 at the start).

    Returns:
        0-d, ≥ 0, in nats: sum over all pairs ÷ B; 0 without rows.

    Raises:
        ValueError: shapes differ or are not 2-d, or the scale is negative.

    Source: Zhai et al. 2023 (arXiv 2303.15343), section 3.

    >>> rows = torch.eye(4)
    >>> f"{siglip(rows, rows, scale=0.0, bias=0.0):.4f}"  # 4 log 2
    '2.7726'
    """
    matrices(a=a, b=b)
    positive("scale", scale, or_zero=True)
    logits = scale * (unit(a) @ unit(b).T) + bias
    signs = 2 * torch.eye(len(a), dtype=logits.dtype, device=logits.device) - 1
    return row_mean(-F.logsigmoid(signs * logits).sum(1))
