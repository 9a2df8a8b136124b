"""Decoupled contrastive learning: the positive leaves the denominator."""

from __future__ import annotations

import torch
from torch import Tensor

from mmcl.losses._checks import matrices, positive
from mmcl.losses._math import full_precision, row_mean, unit
from mmcl.losses.nt_xent import nt_xent_rows


@full_precision
def dcl(a: Tensor, b: Tensor, *, temperature: float | Tensor, sigma: float | None = None) -> Tensor:
    """−w·(positive) + log-sum-exp over the 2(B − 1) negatives of both views.

    Args:
        a: float ``(B, D)``, the first view, normalised inside.
        b: float ``(B, D)``, the second view, normalised inside; gradients reach both.
        temperature: divides the cosine; above 0, a number or 0-d tensor (0.1 in the paper).
        sigma: None: DCL, w = 1. Above 0: DCLW, w_i = 2 − B·softmax_i(⟨a_i, b_i⟩ / sigma), detached, of mean 1 (0.5 in
            the paper).

    Returns:
        0-d, in nats, may be negative: mean over rows and both directions; 0 with fewer than two rows, which have no
        negatives.

    Raises:
        ValueError: shapes differ or are not 2-d, or the temperature or sigma is not above 0.

    Source: Yeh et al. 2021 (arXiv 2110.06848), section 3.

    >>> f"{dcl(torch.ones(4, 2), torch.ones(4, 2), temperature=0.1):.4f}"  # log 6
    '1.7918'
    """
    matrices(a=a, b=b)
    positive("temperature", temperature)
    if sigma is not None:
        positive("sigma", sigma)
    a, b = unit(a), unit(b)
    weight = 1.0 if sigma is None else dcl_weights(a, b, sigma=sigma).detach()
    directions = [
        nt_xent_rows(x, y, temperature=temperature, weight=weight, decoupled=True) for x, y in ((a, b), (b, a))
    ]
    return row_mean(torch.stack(directions).mean(0))


def dcl_weights(a: Tensor, b: Tensor, *, sigma: float) -> Tensor:
    """2 − N · softmax(⟨a_i, b_i⟩ / sigma), ``(N,)``, of all pairs of unit rows ``(N, D)``."""
    return 2 - len(a) * ((a * b).sum(1) / sigma).softmax(0)
