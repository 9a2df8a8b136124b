"""A query against its key and a queue of older keys."""

from __future__ import annotations

import torch
from torch import Tensor

from mmcl.losses._checks import matrices, positive
from mmcl.losses._math import full_precision, row_mean, unit


@full_precision
def moco(queries: Tensor, keys: Tensor, queue: Tensor, *, temperature: float | Tensor) -> Tensor:
    """Cross-entropy of each query against its own key (the positive) and the queue.

    Args:
        queries: float ``(B, D)``, normalised inside.
        keys: float ``(B, D)``, normalised inside, detached.
        queue: float ``(K, D)``, normalised inside, detached; only rows that hold keys (K may be 0, then the loss is 0).
        temperature: divides the cosine; above 0, a number or 0-d tensor (0.07 in the paper).

    Returns:
        0-d, ≥ 0, in nats: mean over rows; 0 without rows.

    Raises:
        ValueError: shapes disagree, or the temperature is not above 0.

    Source: He et al. 2020 (arXiv 1911.05722), eq. 1.

    >>> rows = torch.ones(2, 3)
    >>> f"{moco(rows, rows, torch.ones(7, 3), temperature=0.07):.4f}"  # log 8
    '2.0794'
    """
    matrices(queries=queries, keys=keys)
    matrices(same="columns", queries=queries, queue=queue)
    positive("temperature", temperature)
    return row_mean(moco_rows(queries, keys, queue, temperature=temperature))


@full_precision
def moco_rows(
    queries: Tensor,
    keys: Tensor,
    queue: Tensor,
    filled: Tensor | None = None,
    *,
    temperature: float | Tensor,
    hard: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """:func:`moco` of each row, ``(B,)``. ``filled`` bool ``(K,)``: rows of the queue that hold a key; None: all.

    ``hard``: one more negative of each row, float ``(B, D)``, with a gradient, and bool ``(B,)``: which rows have one.
    """
    queries, keys, queue = unit(queries), unit(keys.detach()), unit(queue.detach())
    positives = (queries * keys).sum(1, keepdim=True)
    negatives = queries @ queue.T
    if filled is not None:
        negatives = negatives.masked_fill(~filled, float("-inf"))
    own = [] if hard is None else [(queries * unit(hard[0])).sum(1).masked_fill(~hard[1], float("-inf"))[:, None]]
    logits = torch.cat([positives, negatives, *own], dim=1) / temperature
    return -logits.log_softmax(1)[:, 0]
