"""The latent term of a mutual information machine, and the contrast of cMIM, in which a negative's weight is a mean, so
that the batch size does not matter.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from mmcl.losses._checks import matrices, positive
from mmcl.losses._math import full_precision, masked_logsumexp, row_mean, unit


@full_precision
def cmim_contrast(z: Tensor, z_other: Tensor, *, temperature: float | Tensor = 0.1) -> Tensor:
    """−log [e^{D_ii} / (e^{D_ii} + mean_{j≠i} e^{D_ij})], D the cosine over the temperature.

    Args:
        z: float ``(B, D)``, latent draws, normalised inside.
        z_other: float ``(B, D)``, second draws of the same inputs, normalised inside; gradients reach both.
        temperature: divides the cosine; above 0, a number or 0-d tensor.

    Returns:
        0-d, ≥ 0, in nats: mean over rows; log 2 where all are equal, for any B; 0 with fewer than two rows.

    Raises:
        ValueError: shapes differ or are not 2-d, or the temperature is not above 0.

    Source: Livne 2025 (arXiv 2502.19642); the critic and the pairing as understood from the paper, no official code.

    >>> f"{cmim_contrast(torch.ones(4, 2), torch.ones(4, 2)):.4f}"
    '0.6931'
    """
    matrices(z=z, z_other=z_other)
    positive("temperature", temperature)
    if len(z) < 2:
        return 0 * (unit(z).sum() + unit(z_other).sum())
    itself = torch.arange(len(z), device=z.device)
    others = itself[:, None] != itself
    return row_mean(cmim_contrast_rows(z, z_other, itself, others, temperature=temperature))


def cmim_contrast_rows(
    own: Tensor,
    everyone: Tensor,
    itself: Tensor,
    others: Tensor,
    *,
    temperature: float | Tensor,
    critic: Literal["cosine", "dot"] = "cosine",
) -> Tensor:
    """:func:`cmim_contrast` of each own row, ``(B,)``; 0 for a row without negatives.

    Args:
        own: float ``(B, D)``; ``everyone`` ``(N, D)``: what they are compared with.
        itself: int64 ``(B,)``: the place of each own row's partner among everyone.
        others: bool ``(B, N)``: the negatives of each row; never its partner.
        critic: D as the cosine, or as ⟨z, z'⟩ / √D, both over the temperature.
    """
    if critic == "cosine":
        logits = unit(own) @ unit(everyone).T / temperature
    else:
        logits = own @ everyone.T / (temperature * math.sqrt(own.shape[1]))
    count = others.sum(1)
    positives = logits.gather(1, itself[:, None])[:, 0]
    negatives = masked_logsumexp(logits, ~others).masked_fill(count == 0, 0) - count.clamp_min(1).to(logits.dtype).log()
    return (torch.logaddexp(positives, negatives) - positives).masked_fill(count == 0, 0)


@full_precision
def mim_latent(z: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """−½ (log q(z | x) + log N(z; 0, I)) of each row, log-densities summed over the latent's width.

    Unlike the divergence of a VAE it rewards a sharp posterior, without bound: give ``log_scale`` a floor.

    Args:
        z: float ``(B, D)``, draws from the posterior.
        mean, log_scale: float ``(B, D)``: q(z | x) is N(mean, exp(log_scale)²).

    Returns:
        float ``(B,)``, in nats, of any sign.

    Raises:
        ValueError: shapes differ or are not 2-d.

    Source: Livne et al. 2019 (arXiv 1910.03175), as in NVIDIA NeMo's A-MIM.

    >>> one = torch.tensor([[0.5, -1.0]])
    >>> f"{mim_latent(one, torch.tensor([[0.0, -0.5]]), torch.tensor([[1.0, 0.5]]).log()).item():.4f}"
    '2.1163'
    """
    matrices(z=z, mean=mean)
    matrices(z=z, log_scale=log_scale)
    posterior = -0.5 * ((z - mean) / log_scale.exp()).square() - log_scale
    prior = -0.5 * z.square()
    return -0.5 * (posterior + prior - math.log(2 * math.pi)).sum(1)
