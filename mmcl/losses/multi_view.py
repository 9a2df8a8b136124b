"""Contrast of any number of views at once: all views of an instance are one positive.

The forms of all rows of ``(V, B, D)`` take views that are missing: a sum then stands for all of its terms by the mean
of those that are there. Where nothing is missing they are the sums as published.
"""

from __future__ import annotations

import math
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
    own = _stacked(views, temperature)
    if negatives not in ("cross", "all"):
        raise ValueError(f"negatives must be 'cross' or 'all', got {negatives!r}")
    has, itself = _complete(own)
    others = ~torch.eye(len(itself), dtype=torch.bool, device=own.device)
    return row_mean(
        mv_info_nce_rows(own, has, own, has, itself, others, temperature=temperature, within=negatives == "all")
    )


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
    own = _stacked(views, temperature)
    has, itself = _complete(own)
    if len(itself) < 2:
        return 0 * own.sum()
    others = ~torch.eye(len(itself), dtype=torch.bool, device=own.device)
    return row_mean(mv_dhel_rows(own, has, own, has, itself, others, temperature=temperature))


def mv_info_nce_rows(
    own: Tensor,
    has: Tensor,
    everyone: Tensor,
    everyone_has: Tensor,
    itself: Tensor,
    others: Tensor,
    *,
    temperature: float | Tensor,
    within: bool,
) -> Tensor:
    """:func:`mv_info_nce` of each own row, ``(B,)``; meaningful where ``has`` holds twice or more.

    Args:
        own: unit rows ``(V, B, D)``; ``everyone`` ``(V, N, D)`` those that they are compared with.
        has: bool ``(V, B)``, ``everyone_has`` ``(V, N)``: which views are there.
        itself: int64 ``(B,)``: the place of each own row among everyone.
        others: bool ``(B, N)``: the negatives of each row; never itself.
        within: compare with others in the same view too.
    """
    count = len(has)
    logits = torch.einsum("lid,mjd->ilmj", own, everyone) / temperature
    me = torch.zeros_like(others).scatter_(1, itself[:, None], True)  # (B, N)
    same = torch.eye(count, dtype=torch.bool, device=own.device)
    there = has.T[:, :, None, None] & everyone_has[None, None]  # (B, V, V, N)
    positives = there & ~same[None, :, :, None] & me[:, None, None]
    candidates = there & (~same[None, :, :, None] & (me | others)[:, None, None])
    pairs = count * (count - 1)
    full = pairs * (1 + others.sum(1))
    if within:
        candidates = candidates | (there & same[None, :, :, None] & others[:, None, None])
        full = full + count * others.sum(1)
    flat = logits.flatten(1)
    top = _whole_sum(flat, positives.flatten(1), torch.full_like(full, pairs))
    return _whole_sum(flat, candidates.flatten(1), full) - top


def mv_dhel_rows(
    own: Tensor,
    has: Tensor,
    everyone: Tensor,
    everyone_has: Tensor,
    itself: Tensor,
    others: Tensor,
    *,
    temperature: float | Tensor,
) -> Tensor:
    """:func:`mv_dhel` of each own row, ``(B,)``; arguments as of :func:`mv_info_nce_rows`.

    A view in which no other is there says nothing of how rows spread: the row's other views stand for it. Meaningful
    where ``has`` holds twice or more and there is another in some view.
    """
    count = len(has)
    seen = others[None] & everyone_has[:, None]  # (V, B, N)
    number = others.sum(1).expand(count, -1)
    spread = _whole_sum(torch.einsum("lid,ljd->lij", own, everyone) / temperature, seen, number)
    counts = has & seen.any(2)
    spread = spread.masked_fill(~counts, 0).sum(0) * count / counts.sum(0).clamp_min(1)
    first, second = torch.triu_indices(count, count, 1, device=own.device)
    pairs = torch.einsum("lid,mid->ilm", own, own)[:, first, second] / temperature
    both = (has[first] & has[second]).T
    return spread - _whole_sum(pairs, both, torch.full_like(both.sum(1), count * (count - 1) // 2))


def _whole_sum(logits: Tensor, there: Tensor, full: Tensor) -> Tensor:
    """log of ``full`` × the mean of exp(logits) over the terms that are ``there``, along the last axis; 0 for none."""
    number = there.sum(-1)
    # the quotient is exactly 1 where nothing is missing
    share = (full / number.clamp_min(1)).to(logits.dtype).clamp_min(math.ulp(1.0)).log()
    return (masked_logsumexp(logits, ~there) + share).masked_fill(number == 0, 0)


def _complete(own: Tensor) -> tuple[Tensor, Tensor]:
    """Every view is there, and each row is at its own place."""
    return own.new_ones(own.shape[:2], dtype=torch.bool), torch.arange(own.shape[1], device=own.device)


def _stacked(views: Sequence[Tensor], temperature: float | Tensor) -> Tensor:
    """Unit rows ``(V, B, D)``."""
    matrix_list("views", views, at_least=2)
    positive("temperature", temperature)
    return unit(torch.stack(list(views)))
