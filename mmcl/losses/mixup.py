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
    logits = unit(mixed) @ unit(fixed).T / temperature
    targets = torch.diag(beta).scatter_add(1, permutation[:, None], (1 - beta)[:, None])
    directions = [(targets * logits.log_softmax(1)).sum(1), (targets * logits.log_softmax(0)).sum(0)]
    return -row_mean(torch.stack(directions).mean(0))


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
    targets = (b @ b.T / temperature).softmax(1)
    targets = targets.detach() if detach_targets else targets
    logits = a @ b.T / temperature
    directions = [(targets * each.log_softmax(1)).sum(1) for each in (logits, logits.T)]
    return -row_mean(torch.stack(directions).mean(0))
