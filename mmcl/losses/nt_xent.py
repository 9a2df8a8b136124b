"""SimCLR's loss over two views, and what DCL shares with it."""

from __future__ import annotations

import torch
from torch import Tensor

from mmcl.losses._checks import matrices, positive
from mmcl.losses._math import full_precision, log_sum_of_candidates, row_mean, unit


@full_precision
def nt_xent(a: Tensor, b: Tensor, *, temperature: float | Tensor) -> Tensor:
    """Each of the 2B rows finds its other view among the 2B − 1 rows that are not itself.

    Args:
        a: float ``(B, D)``, the first view, normalised inside.
        b: float ``(B, D)``, the second view, normalised inside; gradients reach both.
        temperature: divides the cosine; above 0, a number or 0-d tensor.

    Returns:
        0-d, ≥ 0, in nats: mean over 2B rows (the authors' code reports twice that); 0 with fewer than two rows.

    Raises:
        ValueError: shapes differ or are not 2-d, or the temperature is not above 0.

    Source: Chen et al. 2020 (arXiv 2002.05709), eq. 1.

    >>> f"{nt_xent(torch.ones(4, 2), torch.ones(4, 2), temperature=0.1):.4f}"  # log 7
    '1.9459'
    """
    matrices(a=a, b=b)
    positive("temperature", temperature)
    a, b = unit(a), unit(b)
    directions = [nt_xent_rows(x, y, temperature=temperature) for x, y in ((a, b), (b, a))]
    return row_mean(torch.stack(directions).mean(0))


def nt_xent_rows(
    anchors: Tensor,
    partners: Tensor,
    *,
    temperature: float | Tensor,
    weight: Tensor | float = 1.0,
    decoupled: bool = False,
) -> Tensor:
    """log Σ exp over the rows of both views − weight · positive, one direction, ``(B,)``, of unit rows ``(B, D)``.

    ``weight``, ``(B,)`` or a number, is of the positives. ``decoupled`` leaves the positive out of the sum (DCL); an
    anchor without negatives then gives 0.
    """
    numbers = torch.arange(len(anchors), device=anchors.device)

    def hidden(rows: Tensor) -> Tensor:
        own = rows[:, None] == numbers
        return torch.cat([own, own if decoupled else torch.zeros_like(own)], 1)

    total = log_sum_of_candidates(anchors, torch.cat([anchors, partners]), hidden, temperature=temperature)
    alone = total == float("-inf")
    pull = weight * (anchors * partners).sum(1) / temperature
    return (total - pull).masked_fill(alone, 0.0)
