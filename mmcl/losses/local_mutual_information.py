"""A sample's global feature against its own local ones."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mmcl.losses._checks import matrices, positive
from mmcl.losses._math import full_precision, log_sum_of_candidates, unit


@full_precision
def local_mutual_information(globals_: Tensor, locals_: Tensor, mask: Tensor, *, temperature: float | Tensor) -> Tensor:
    """A sample's valid tokens are positives of its global feature; valid tokens of other samples are the negatives.

    The other tokens of the same sample are neither. What stands in masked tokens changes nothing and gets no gradient.

    Args:
        globals_: float ``(B, D)``, normalised inside.
        locals_: float ``(B, L, D)``, normalised inside (from the momentum tower in the paper; not detached here).
        mask: bool ``(B, L)``, True at valid tokens.
        temperature: divides the cosine; above 0, a number or 0-d tensor.

    Returns:
        0-d, ≥ 0, in nats: mean over a sample's valid tokens, then over the samples that have any; 0 if none has.

    Raises:
        ValueError: shapes disagree, the mask is not bool, or the temperature is not above 0.

    Source: Yang et al. 2022 (arXiv 2202.10401), the local MI maximisation term.

    >>> same = torch.ones(4, 2, 3)
    >>> valid = torch.ones(4, 2, dtype=torch.bool)
    >>> f"{local_mutual_information(same[:, 0], same, valid, temperature=0.5):.4f}"  # log 7
    '1.9459'
    """
    _check(globals_, locals_, mask)
    positive("temperature", temperature)
    own = torch.arange(len(globals_), device=globals_.device)
    per_sample = local_mutual_information_rows(globals_, locals_, mask, own, temperature=temperature)
    return per_sample.sum() / mask.any(1).sum().clamp_min(1)


@full_precision
def local_mutual_information_rows(
    globals_: Tensor,
    locals_: Tensor,
    mask: Tensor,
    own: Tensor,
    hidden: Tensor | None = None,
    *,
    temperature: float | Tensor,
) -> Tensor:
    """:func:`local_mutual_information` of some rows, ``(b,)``; 0 for one without a valid token.

    ``globals_ (b, D)``; ``own`` int64 ``(b,)``: whose sample each is among the ``N`` of ``locals_ (N, L, D)``;
    ``hidden`` bool ``(b, N)``: further samples that are no negatives of a row; None: none.
    """
    anchors, tokens = unit(globals_), unit(locals_.masked_fill(~mask[..., None], 0.0))
    samples = torch.arange(len(locals_), device=own.device)

    def out_of_sight(rows: Tensor) -> Tensor:
        gone = own[rows, None] == samples
        gone = gone if hidden is None else gone | hidden[rows]
        return (gone[..., None] | ~mask).flatten(1)

    negatives = log_sum_of_candidates(anchors, tokens.flatten(0, 1), out_of_sight, temperature=temperature, tile=256)
    positives = torch.einsum("id,ild->il", anchors, tokens[own]) / temperature
    per_token = F.softplus(negatives[:, None] - positives).masked_fill(~mask[own], 0.0)
    return per_token.sum(1) / mask[own].sum(1).clamp_min(1)


def _check(globals_: Tensor, locals_: Tensor, mask: Tensor) -> None:
    matrices(globals_=globals_)
    if locals_.ndim != 3 or not locals_.is_floating_point():
        raise ValueError(f"locals_ must be a float tensor (B, L, D), got {locals_.dtype} {tuple(locals_.shape)}")
    if (len(locals_), locals_.shape[2]) != tuple(globals_.shape):
        raise ValueError(f"globals_ {tuple(globals_.shape)} and locals_ {tuple(locals_.shape)} need equal B and D")
    if mask.dtype != torch.bool or mask.shape != locals_.shape[:2]:
        wanted = tuple(locals_.shape[:2])
        raise ValueError(f"mask must be a bool tensor {wanted}, got {mask.dtype} {tuple(mask.shape)}")
