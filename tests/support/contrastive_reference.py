"""The symmetric contrastive loss as its formula says it, row by row; slow and plain."""

from __future__ import annotations

import torch
from torch import Tensor


def contrastive_reference(
    a: Tensor,
    b: Tensor,
    scale: Tensor | float,
    present_a: Tensor | None = None,
    present_b: Tensor | None = None,
    groups: Tensor | None = None,
    unpaired_negatives: bool = False,
) -> Tensor:
    """½ · [mean over paired i of −log softmax a→b + the same b→a], in the dtype of ``a``."""
    rows = range(len(a))
    has_a = [True] * len(a) if present_a is None else present_a.tolist()
    has_b = [True] * len(a) if present_b is None else present_b.tolist()
    paired = [i for i in rows if has_a[i] and has_b[i]]
    numbers = [] if groups is None else groups.reshape(len(a), -1).tolist()

    def negative(i: int, j: int) -> bool:
        return i == j or not numbers or not any(x == y >= 0 for x, y in zip(numbers[i], numbers[j], strict=True))

    def cosine(i: int, j: int) -> Tensor:
        return (a[i] / a[i].norm()) @ (b[j] / b[j].norm())

    total = (0 * a[:0]).sum() + (0 * b[:0]).sum() + 0 * torch.as_tensor(scale, dtype=a.dtype)
    for i in paired:
        columns = [j for j in rows if has_b[j] and (unpaired_negatives or has_a[j]) and negative(i, j)]
        lines = [j for j in rows if has_a[j] and (unpaired_negatives or has_b[j]) and negative(i, j)]
        total = total + torch.stack([scale * cosine(i, j) for j in columns]).logsumexp(0) - scale * cosine(i, i)
        total = total + torch.stack([scale * cosine(j, i) for j in lines]).logsumexp(0) - scale * cosine(i, i)
    return total / (2 * max(1, len(paired)))
