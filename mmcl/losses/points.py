"""Points of feature maps against all points of all maps: motion prediction."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mmcl.losses._checks import feature_maps, positive
from mmcl.losses._math import full_precision, log_sum_of_candidates, row_mean, unit


@full_precision
def point_info_nce(queries: Tensor, keys: Tensor, *, temperature: float | Tensor) -> Tensor:
    """Cross-entropy of each point of each query map against every point of every key map.

    Args:
        queries: float ``(B, P, D)``: P points of each map, normalised inside.
        keys: float ``(K, B, P, D)``, normalised inside; ``keys[0]`` holds the positive of each query, at the same place
            of the same row, and the others further maps of the same rows, negatives all.
        temperature: divides the cosine; above 0, a number or 0-d tensor.

    Returns:
        0-d, ≥ 0, in nats: mean over rows and points; 0 without rows.

    Raises:
        ValueError: shapes do not fit, or the temperature is not above 0.

    Source: Huang et al. 2021 (arXiv 2104.00862), motion prediction.

    >>> rows = torch.ones(3, 4, 2)
    >>> f"{point_info_nce(rows, torch.stack([rows, rows]), temperature=0.1):.4f}"  # log (2 · 3 · 4)
    '3.1781'
    """
    if keys.ndim != 4 or not len(keys):
        raise ValueError(f"keys must be (K, B, P, D), at least one of them, got {tuple(keys.shape)}")
    feature_maps(same="shape", queries=queries, **{f"keys[{i}]": own for i, own in enumerate(keys)})
    positive("temperature", temperature)
    own, candidates = unit(queries), unit(keys)

    def nothing_hidden(numbers: Tensor) -> Tensor:
        return numbers.new_zeros((len(numbers), candidates[..., 0].numel()), dtype=torch.bool)

    values = point_rows(own, candidates[0], candidates.flatten(0, 2), nothing_hidden, temperature=temperature)
    return row_mean(values.flatten())


def point_rows(
    queries: Tensor,
    positives: Tensor,
    candidates: Tensor,
    hidden: Callable[[Tensor], Tensor],
    *,
    temperature: float | Tensor,
) -> Tensor:
    """The value of each point, ``(B, P)``, of unit ``queries`` and ``positives`` ``(B, P, D)`` and ``candidates``
    ``(M, D)``, among which the positives are.

    ``hidden`` takes numbers of points, int64 ``(b,)``, point p of row i being ``i · P + p``, and says which candidates
    they do not see, bool ``(b, M)``. A point that sees nothing has −inf.
    """
    total = log_sum_of_candidates(queries.flatten(0, 1), candidates, hidden, temperature=temperature)
    return total.view(queries.shape[:2]) - (queries * positives).sum(-1) / temperature
