"""The contrastive half of cMIM: a negative's weight is a mean, so the batch size does not matter."""

from __future__ import annotations

import math

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
    z, z_other = unit(z), unit(z_other)
    if len(z) < 2:
        return 0 * (z.sum() + z_other.sum())
    logits = z @ z_other.T / temperature
    itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
    negatives = masked_logsumexp(logits, itself) - math.log(len(z) - 1)
    positives = logits.diagonal()
    return row_mean(torch.logaddexp(positives, negatives) - positives)
