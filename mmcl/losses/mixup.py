"""Contrast whose targets are soft: between mixed samples, or by how alike the targets are."""

from __future__ import annotations

import torch
from torch import Tensor

from mmcl.losses._checks import matrices, positive
from mmcl.losses._math import full_precision, row_mean, unit


@full_precision
def m3co(mixed: Tensor, fixed: Tensor, beta: Tensor, permutation: Tensor, *, temperature: float | Tensor) -> Tensor:
    """½ · [cross-entropy of T against mixed→fixed + of Tᵀ against fixed→mixed], T_ii = β_i, T_iπ(i) += 1 − β_i.

    Args:
        mixed: float ``(B, D)``, embeddings of β_i·x_i + (1 − β_i)·x_π(i), normalised inside.
        fixed: float ``(B, D)``, embeddings of the other modality, normalised inside; gradients reach both.
        beta: float ``(B,)`` in [0, 1]; all 1: symmetric InfoNCE.
        permutation: int64 ``(B,)``, π.
        temperature: divides the cosine; above 0, a number or 0-d tensor (0.1 in the paper).

    Returns:
        0-d, ≥ 0, in nats: mean over rows of both directions; 0 with no rows.

    Raises:
        ValueError: shapes differ or are not those above, or the temperature is not above 0.

    Source: Kumar et al. 2024 (arXiv 2409.17777), M3Co. Targets are added where the authors' code assigns them, so
    that π(i) = i keeps its weight of 1.

    >>> x = torch.eye(2)
    >>> f"{m3co(x, x, torch.tensor([0.5, 0.5]), torch.tensor([1, 0]), temperature=1.0):.4f}"
    '0.8133'
    """
    matrices(mixed=mixed, fixed=fixed)
    positive("temperature", temperature)
    if beta.shape != (len(mixed),) or permutation.shape != (len(mixed),):
        raise ValueError(f"beta and permutation must be ({len(mixed)},), got {beta.shape} and {permutation.shape}")
    mixed, fixed = unit(mixed), unit(fixed)
    targets = torch.diag(beta).scatter_add(1, permutation[:, None], (1 - beta)[:, None])
    directions = [
        soft_target_contrast(mixed, fixed, targets, temperature=temperature),
        soft_target_contrast(fixed, mixed, targets.T, temperature=temperature),
    ]
    return row_mean(torch.stack(directions).mean(0))


@full_precision
def soft_clip(a: Tensor, b: Tensor, *, temperature: float | Tensor, detach_targets: bool = True) -> Tensor:
    """½ · [cross-entropy of T against a→b + of T against b→a], T = softmax(b bᵀ / τ): how alike the rows of ``b`` are.

    Args:
        a: float ``(B, D)``, normalised inside.
        b: float ``(B, D)``, normalised inside; gradients reach both. Exchanged, ``a`` says who is alike: the paper adds
            both.
        temperature: τ of logits and targets; above 0, a number or 0-d tensor (0.125 in the paper's code).
        detach_targets: False lets gradients flow through the targets too, as the authors' code does.

    Returns:
        0-d, ≥ 0, in nats: mean over rows and both directions; 0 with no rows.

    Raises:
        ValueError: shapes differ or are not 2-d, or the temperature is not above 0.

    Source: Kumar et al. 2024 (arXiv 2409.17777), the second phase of M3CoL; Gao et al. 2023 (arXiv 2303.17561).

    >>> f"{soft_clip(torch.ones(4, 2), torch.ones(4, 2), temperature=1.0):.4f}"  # log 4
    '1.3863'
    """
    matrices(a=a, b=b)
    positive("temperature", temperature)
    a, b = unit(a), unit(b)
    return row_mean(soft_clip_rows((a, b), (a, b), temperature=temperature, detach_targets=detach_targets))


def soft_clip_rows(
    own: tuple[Tensor, Tensor],
    everyone: tuple[Tensor, Tensor],
    hidden: Tensor | None = None,
    *,
    temperature: float | Tensor,
    detach_targets: bool,
) -> Tensor:
    """:func:`soft_clip` of each own row, ``(B,)``: unit rows ``a``, ``b`` of this rank, then of all ranks ``(N, D)``.

    ``hidden`` bool ``(B, N)``: left out of targets and candidates.
    """
    logits = own[1] @ everyone[1].T / temperature
    logits = logits if hidden is None else logits.masked_fill(_some(hidden), -torch.inf)
    targets = logits.softmax(1)
    targets = targets.detach() if detach_targets else targets
    directions = [
        soft_target_contrast(queries, candidates, targets, hidden, temperature=temperature)
        for queries, candidates in ((own[0], everyone[1]), (own[1], everyone[0]))
    ]
    return torch.stack(directions).mean(0)


def soft_target_contrast(
    queries: Tensor,
    candidates: Tensor,
    targets: Tensor,
    hidden: Tensor | None = None,
    *,
    temperature: float | Tensor,
) -> Tensor:
    """−Σ targets · log softmax of ⟨query, candidate⟩ / temperature, ``(B,)``.

    Args:
        queries: unit rows ``(B, D)``.
        candidates: unit rows ``(N, D)``.
        targets: ``(B, N)`` ≥ 0, taken as they are.
        hidden: bool ``(B, N)``, candidates that a query does not see; a query that sees none gives 0.
        temperature: divides the cosine.
    """
    logits = queries @ candidates.T / temperature
    if hidden is None:
        return -(targets * logits.log_softmax(1)).sum(1)
    scores = logits.masked_fill(_some(hidden), -torch.inf).log_softmax(1)
    return -(targets * scores.masked_fill(hidden, 0.0)).sum(1)


def _some(hidden: Tensor) -> Tensor:
    """Where all of a row is hidden none is: a softmax over nothing would be NaN."""
    return hidden & ~hidden.all(1, keepdim=True)
