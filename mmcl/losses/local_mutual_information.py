"""A sample's global feature against its own local ones."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mmcl.losses._checks import matrices, positive
from mmcl.losses._math import full_precision, masked_logsumexp, unit


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
    anchors, tokens = unit(globals_), unit(locals_.masked_fill(~mask[..., None], 0.0))
    logits = torch.einsum("id,jld->ijl", anchors, tokens) / temperature
    own = torch.eye(len(anchors), dtype=torch.bool, device=logits.device)
    negatives = masked_logsumexp(logits.flatten(1), (own[..., None] | ~mask).flatten(1))
    positives = logits.diagonal().T
    per_token = F.softplus(negatives[:, None] - positives).masked_fill(~mask, 0.0)
    per_sample = per_token.sum(1) / mask.sum(1).clamp_min(1)
    return per_sample.sum() / mask.any(1).sum().clamp_min(1)


def _check(globals_: Tensor, locals_: Tensor, mask: Tensor) -> None:
    matrices(globals_=globals_)
    if locals_.ndim != 3 or not locals_.is_floating_point():
        raise ValueError(f"locals_ must be a float tensor (B, L, D), got {locals_.dtype} {tuple(locals_.shape)}")
    if (len(locals_), locals_.shape[2]) != tuple(globals_.shape):
        raise ValueError(f"globals_ {tuple(globals_.shape)} and locals_ {tuple(locals_.shape)} need equal B and D")
    if mask.dtype != torch.bool or mask.shape != locals_.shape[:2]:
        wanted = tuple(locals_.shape[:2])
        raise ValueError(f"mask must be a bool tensor {wanted}, got {mask.dtype} {tuple(mask.shape)}")
