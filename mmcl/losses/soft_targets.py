"""Cross-entropy against targets that are partly one class, partly what a teacher believes."""

from __future__ import annotations

from torch import Tensor

from mmcl.losses._checks import labels_of, matrices
from mmcl.losses._math import full_precision, row_mean


@full_precision
def soft_target_cross_entropy(logits: Tensor, teacher: Tensor, labels: Tensor, *, alpha: float | Tensor) -> Tensor:
    """Cross-entropy of each row against (1 − alpha) · onehot(label) + alpha · softmax(teacher).

    Args:
        logits: float ``(B, K)``; −inf hides a class from a row.
        teacher: float ``(B, K)``, detached; −inf in the same places.
        labels: int64 ``(B,)``, of classes that are not hidden.
        alpha: in [0, 1], a number or 0-d tensor.

    Returns:
        0-d, ≥ 0, in nats: mean over rows; 0 without rows.

    Raises:
        ValueError: logits and teacher differ in shape, or labels are not one per row.

    Source: Li et al. 2021 (arXiv 2107.07651), momentum distillation.

    >>> import torch
    >>> logits = torch.tensor([[1.0, 0.0]])
    >>> f"{soft_target_cross_entropy(logits, 0 * logits, torch.tensor([0]), alpha=0.4):.4f}"
    '0.5133'
    """
    matrices(logits=logits, teacher=teacher)
    labels_of(labels, len(logits))
    return row_mean(soft_target_rows(logits, teacher, labels, alpha=alpha))


@full_precision
def soft_target_rows(logits: Tensor, teacher: Tensor, labels: Tensor, *, alpha: float | Tensor) -> Tensor:
    """:func:`soft_target_cross_entropy` of each row, ``(B,)``."""
    scores = logits.log_softmax(1)
    hard = -scores.gather(1, labels[:, None])[:, 0]
    # 0 · −inf would be NaN where a class is hidden
    soft = -(teacher.detach().softmax(1) * scores.masked_fill(logits.isneginf(), 0.0)).sum(1)
    return (1 - alpha) * hard + alpha * soft
