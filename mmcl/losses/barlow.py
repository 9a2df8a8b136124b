"""Redundancy reduction: the cross-correlation of two views' columns becomes the identity."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from mmcl.losses._checks import matrices, positive
from mmcl.losses._math import full_precision

EPSILON = 1e-5
"""added to variances, as batch norm does"""


@full_precision
def barlow(
    a: Tensor,
    b: Tensor,
    *,
    redundancy: float = 5e-3,
    epsilon: float = EPSILON,
    over_ranks: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Σ over columns of (1 − c_dd)² + redundancy · Σ over different columns of c_de², c their correlation.

    Args:
        a: float ``(B, D)``, the first view; columns are standardised inside (population variance).
        b: float ``(B, D)``, the second view; gradients reach both.
        redundancy: weight of the entries off the diagonal; at least 0.
        epsilon: added to variances.
        over_ranks: takes a sum over these rows to the sum over the rows of all ranks; None: these are all.

    Returns:
        0-d, ≥ 0; 0 with fewer than two rows, whose correlation is not defined.

    Raises:
        ValueError: shapes differ or are not 2-d, or the redundancy is negative.

    Source: Zbontar et al. 2021 (arXiv 2103.03230), eq. 1.

    >>> x = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    >>> f"{barlow(x, x):.3f} {barlow(x, x.flip(1)):.3f}"
    '0.000 2.010'
    """
    matrices(a=a, b=b)
    positive("redundancy", redundancy, or_zero=True)
    total = over_ranks or (lambda x: x)
    count = total(a.new_tensor(len(a)))
    rows = count.clamp_min(1)
    units = []
    for x in (a, b):
        centred = x - total(x.sum(0)) / rows
        units.append(centred * (total(centred.square().sum(0)) / rows + epsilon).rsqrt())
    correlation = total(units[0].T @ units[1]) / rows
    diagonal = correlation.diagonal()
    off_diagonal = correlation.square().sum() - diagonal.square().sum()
    return ((1 - diagonal).square().sum() + redundancy * off_diagonal) * (count >= 2)


@full_precision
def barlip(
    a: Tensor,
    b: Tensor,
    *,
    weight: float = 0.025,
    redundancy: float = 5e-3,
    over_ranks: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """weight · ``barlow(a, b)``: Barlow Twins between two modalities.

    Args:
        a: float ``(B, D)``, projections of one modality; columns are standardised inside (population variance).
        b: float ``(B, D)``, projections of the other; gradients reach both.
        weight: of the whole; at least 0.
        redundancy: weight of the entries off the diagonal; at least 0.
        over_ranks: takes a sum over these rows to the sum over the rows of all ranks; None: these are all.

    Returns:
        0-d, ≥ 0; 0 with fewer than two rows.

    Raises:
        ValueError: shapes differ or are not 2-d, or a weight is negative.

    Source: Fini et al. 2023 (arXiv 2305.08675), BarLIP.

    >>> x = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    >>> f"{barlip(x, x.flip(1)):.4f}"
    '0.0503'
    """
    positive("weight", weight, or_zero=True)
    return weight * barlow(a, b, redundancy=redundancy, epsilon=1e-8, over_ranks=over_ranks)


@full_precision
def vicreg(
    a: Tensor,
    b: Tensor,
    *,
    invariance: float = 25.0,
    variance: float = 25.0,
    covariance: float = 1.0,
    over_ranks: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Views agree, every column keeps a standard deviation of 1, different columns are uncorrelated.

    invariance · mean (a − b)² + variance · ½ Σ_views mean_d max(0, 1 − √(var_d + 1e-4)) + covariance · Σ_views
    Σ_{d≠e} cov_de² / D.

    Args:
        a: float ``(B, D)``, the first view, taken as given.
        b: float ``(B, D)``, the second view; gradients reach both.
        invariance: weight of the first term; at least 0.
        variance: weight of the second term; at least 0.
        covariance: weight of the third term; at least 0. Variances and covariances are those of a sample (B − 1).
        over_ranks: takes a sum over these rows to the sum over the rows of all ranks; None: these are all.

    Returns:
        0-d, ≥ 0; 0 with fewer than two rows, which have no variance.

    Raises:
        ValueError: shapes differ or are not 2-d, or a weight is negative.

    Source: Bardes et al. 2022 (arXiv 2105.04906), eq. 6, with the factor ½ of the authors' code.

    >>> f"{vicreg(torch.ones(4, 3), torch.ones(4, 3), variance=1.0):.2f}"
    '0.99'
    """
    matrices(a=a, b=b)
    for name, weight in {"invariance": invariance, "variance": variance, "covariance": covariance}.items():
        positive(name, weight, or_zero=True)
    total = over_ranks or (lambda x: x)
    count = total(a.new_tensor(len(a)))
    rows, freedom = count.clamp_min(1), (count - 1).clamp_min(1)
    loss = invariance * total((a - b).square().sum()) / rows / max(a.shape[1], 1)
    for x in (a, b):
        centred = x - total(x.sum(0)) / rows
        spread = total(centred.T @ centred) / freedom
        diagonal = spread.diagonal()
        off_diagonal = spread.square().sum() - diagonal.square().sum()
        hinge = (1 - (diagonal + 1e-4).sqrt()).relu().mean()
        loss = loss + variance * hinge / 2 + covariance * off_diagonal / max(a.shape[1], 1)
    return loss * (count >= 2)
