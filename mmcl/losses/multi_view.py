"""Contrast of any number of views at once: all views of an instance are one positive."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from mmcl.losses._checks import matrix_list, positive
from mmcl.losses._math import full_precision, masked_logsumexp, row_mean, unit


@full_precision
def mv_info_nce(
    views: Sequence[Tensor], *, temperature: float | Tensor, negatives: Literal["cross", "all"] = "cross"
) -> Tensor:
    """−log [P_i / Σ_l Σ_m Σ_j exp(⟨u_il, u_jm⟩ / τ)], P_i = Σ_{l≠m} exp(⟨u_il, u_im⟩ / τ) over ordered pairs of views.

    Args:
        views: at least two float ``(B, D)``, normalised inside; gradients reach all.
        temperature: τ; above 0, a number or 0-d tensor.
        negatives: ``cross``: m ≠ l, as the authors describe it; ``all``: also other instances in the same view, as
            their code does.

    Returns:
        0-d, ≥ 0, in nats: mean over instances; 0 with no rows.

    Raises:
        ValueError: fewer than two views, shapes differ, the temperature is not above 0, or unknown ``negatives``.

    Source: Koromilas et al. 2025 (arXiv 2507.06979). In log space: the sums overflow float32 otherwise.

    >>> f"{mv_info_nce([torch.ones(4, 2)] * 3, temperature=0.5):.4f}"  # log 4
    '1.3863'
    """
    stacked, rows, count = _stacked(views, temperature)
    if negatives not in ("cross", "all"):
        raise ValueError(f"negatives must be 'cross' or 'all', got {negatives!r}")
    logits = stacked @ stacked.T / temperature
    numbers = torch.arange(len(stacked), device=stacked.device)
    same_view = (numbers // max(rows, 1))[:, None] == numbers // max(rows, 1)
    same_instance = (numbers % max(rows, 1))[:, None] == numbers % max(rows, 1)
    hidden = same_view if negatives == "cross" else same_view & same_instance
    positives = masked_logsumexp(logits, ~same_instance | same_view).view(count, rows)
    candidates = masked_logsumexp(logits, hidden).view(count, rows)
    return row_mean(candidates.logsumexp(0) - positives.logsumexp(0))


@full_precision
def mv_dhel(views: Sequence[Tensor], *, temperature: float | Tensor) -> Tensor:
    """Σ_l log Σ_{j≠i} exp(⟨u_il, u_jl⟩ / τ) − log P_i with P_i over unordered pairs of views: uniform within each view.

    Args:
        views: at least two float ``(B, D)``, normalised inside; gradients reach all.
        temperature: τ; above 0, a number or 0-d tensor.

    Returns:
        0-d, in nats, may be negative: mean over instances; 0 with fewer than two rows, which have no negatives.

    Raises:
        ValueError: fewer than two views, shapes differ, or the temperature is not above 0.

    Source: Koromilas et al. 2025 (arXiv 2507.06979), MV-DHEL; for two views the pair loss DHEL.

    >>> f"{mv_dhel([torch.ones(4, 2)] * 2, temperature=1.0):.4f}"  # 2 (log 3 + 1) − 1
    '3.1972'
    """
    stacked, rows, count = _stacked(views, temperature)
    if rows < 2:
        return 0 * stacked.sum()
    each = stacked.view(count, rows, -1)
    itself = torch.eye(rows, dtype=torch.bool, device=stacked.device).expand(count, -1, -1)
    spread = masked_logsumexp(each @ each.transpose(1, 2) / temperature, itself)
    pairs = torch.einsum("lid,mid->lmi", each, each) / temperature
    first, second = torch.triu_indices(count, count, 1, device=stacked.device)
    return row_mean(spread.sum(0) - pairs[first, second].logsumexp(0))


def _stacked(views: Sequence[Tensor], temperature: float | Tensor) -> tuple[Tensor, int, int]:
    """Unit rows ``(views · B, D)``, view after view; B; the number of views."""
    matrix_list("views", views, at_least=2)
    positive("temperature", temperature)
    return unit(torch.cat(list(views))), len(views[0]), len(views)
