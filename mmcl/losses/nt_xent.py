"""SimCLR's loss over two views, and its form for rows that are spread over ranks."""

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
    numbers = torch.arange(len(a), device=a.device)
    return row_mean(
        (
            nt_xent_rows(a, b, a, b, numbers, temperature=temperature)
            + nt_xent_rows(b, a, b, a, numbers, temperature=temperature)
        )
        / 2
    )


@full_precision
def nt_xent_rows(
    anchors: Tensor,
    partners: Tensor,
    same_view: Tensor,
    other_view: Tensor,
    numbers: Tensor,
    *,
    temperature: float | Tensor,
    groups: Tensor | None = None,
    weight: Tensor | float = 1.0,
    decoupled: bool = False,
) -> Tensor:
    """log Σ exp over the candidates − weight · positive, one direction, ``(B,)``. Rows are taken as unit rows.

    Args:
        anchors: float ``(B, D)``.
        partners: float ``(B, D)``, the other view of the anchors.
        same_view: float ``(N, D)``, all rows of the anchors' view; an anchor does not see itself.
        other_view: float ``(N, D)``, all rows of the partners' view.
        numbers: int64 ``(B,)``: where the anchors stand among the N.
        temperature: divides the cosine.
        groups: int64 ``(N, G)`` or None; rows of equal number (−1: none) in any column are not each other's negatives.
        weight: ``(B,)`` or a number, of the positives.
        decoupled: leave the positive out of the sum (DCL); an anchor without negatives then gives 0.
    """
    count = len(same_view)
    columns = torch.arange(count, device=numbers.device)

    def hidden(rows: Tensor) -> Tensor:
        own = numbers[rows, None] == columns
        negatives = own
        if groups is not None:
            for group in groups.unbind(1):
                mine = group[numbers[rows], None]
                negatives = negatives | ((mine == group) & (mine >= 0))
        return torch.cat([negatives, negatives if decoupled else negatives & ~own], 1)

    total = log_sum_of_candidates(anchors, torch.cat([same_view, other_view]), hidden, temperature=temperature)
    alone = total == float("-inf")
    pull = weight * (anchors * partners).sum(1) / temperature
    return (total - pull).masked_fill(alone, 0.0)
