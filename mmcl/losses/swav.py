"""Codes by balanced assignment to prototypes, and their swapped prediction."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from mmcl.losses._checks import matrices, matrix_list, positive
from mmcl.losses._math import full_precision, row_mean


@full_precision
def sinkhorn(
    scores: Tensor,
    *,
    epsilon: float = 0.05,
    iterations: int = 3,
    over_ranks: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Soft assignment of rows to prototypes in which all prototypes get (nearly) the same mass.

    Args:
        scores: float ``(B, K)``, similarities to the prototypes, taken as given; detached.
        epsilon: strength of the entropy term, in units of the scores; above 0. Smaller: sharper codes.
        iterations: rounds of balancing prototypes, then rows; at least 1. More: columns nearer to B / K.
        over_ranks: takes the log-sum-exp of these rows, ``(K,)``, to that of the rows of all ranks; None: these are
            all.

    Returns:
        codes ``(B, K)`` ≥ 0, rows sum to 1, no gradient.

    Raises:
        ValueError: scores are not 2-d, epsilon is not above 0, or iterations is below 1.

    Source: Caron et al. 2020 (arXiv 2006.09882), section 3.1; Cuturi 2013 (arXiv 1306.0895).

    >>> sinkhorn(torch.zeros(2, 4))
    tensor([[0.2500, 0.2500, 0.2500, 0.2500],
            [0.2500, 0.2500, 0.2500, 0.2500]])
    """
    matrices(scores=scores)
    positive("epsilon", epsilon)
    positive("iterations", iterations)
    log_codes = scores.detach() / epsilon
    for _ in range(iterations):
        # the masses 1/K and 1/B of the usual form cancel; in logarithms no prototype can underflow to 0/0
        mass = log_codes.logsumexp(0)
        if over_ranks is not None:
            mass = over_ranks(mass)
        log_codes = (log_codes - mass).log_softmax(1)
    return log_codes.exp()


@full_precision
def swav(scores: Sequence[Tensor], *, temperature: float = 0.1, epsilon: float = 0.05, iterations: int = 3) -> Tensor:
    """Each of the first two views gives codes, which every other view predicts.

    Args:
        scores: two or more float ``(B, K)``, one per view: cosines of its rows with the prototypes, taken as given. All
            views get gradients as predictions, none through the codes.
        temperature: divides the scores of the predictions; above 0.
        epsilon: as in :func:`sinkhorn`.
        iterations: as in :func:`sinkhorn`.

    Returns:
        0-d, ≥ 0, in nats: mean over rows, over the predicting views, over the two codes; 0 without rows.

    Raises:
        ValueError: fewer than two views, shapes differ, or a number is not above 0.

    Source: Caron et al. 2020 (arXiv 2006.09882), section 3, with multi-crop.

    >>> f"{swav([torch.zeros(2, 4)] * 3):.4f}"  # log 4
    '1.3863'
    """
    matrix_list("scores", scores, at_least=2)
    positive("temperature", temperature)
    predictions = [view.div(temperature).log_softmax(1) for view in scores]
    codes = {coded: sinkhorn(scores[coded], epsilon=epsilon, iterations=iterations) for coded in (0, 1)}
    return row_mean(swapped_rows(codes, predictions))


def swapped_rows(
    codes: Mapping[int, Tensor],
    predictions: Sequence[Tensor],
    predicted_by: Mapping[int, Sequence[int]] | None = None,
) -> Tensor:
    """Cross-entropy of every view's log-softmax with the codes of every other view, mean over the pairs, ``(B,)``.

    ``codes``: ``(B, K)`` by the number of the view that gave them. ``predicted_by``: by the same number the views that
    predict them; None: all others.
    """
    others = {code: [view for view in range(len(predictions)) if view != code] for code in codes}
    pairs = [(code, view) for code in codes for view in (predicted_by or others)[code]]
    rows = [-(codes[code] * predictions[view]).sum(1) for code, view in pairs]
    return torch.stack(rows).mean(0)
