"""The masked-answer contrast of multiple-choice video question answering."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from mmcl.losses._checks import feature_maps, labels_of, matrices, positive
from mmcl.losses._math import full_precision, row_mean, unit


@full_precision
def masked_answer_contrast(
    masked: Tensor,
    options: Tensor,
    target: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    similarity: Literal["dot", "cosine"] = "dot",
) -> Tensor:
    """−log [e^{⟨h̃, h_y⟩/τ} / Σ_a e^{⟨h̃, h_a⟩/τ}]: what was read with masked tokens finds the option that it was.

    Args:
        masked: float ``(B, D)``, h̃, of the right option's text with masked tokens.
        options: float ``(B, K, D)``, h, of all options as they are; gradients reach both sides.
        target: int ``(B,)``, y, number of the right option.
        temperature: divides the similarity; above 0, a number or 0-d tensor.
        similarity: the dot product, as in the paper, or the cosine.

    Returns:
        0-d, ≥ 0, in nats: mean over rows; log K where all options are equal.

    Raises:
        ValueError: shapes do not fit, or the temperature is not above 0.

    Source: Kim et al. 2021 (arXiv 2009.08043); no official code.

    >>> f"{masked_answer_contrast(torch.ones(2, 3), torch.ones(2, 5, 3), torch.tensor([0, 4])):.4f}"
    '1.6094'
    """
    matrices(masked=masked)
    feature_maps(same="rows", options=options)
    if (len(options), options.shape[2]) != tuple(masked.shape):
        raise ValueError(f"masked must be {(len(options), options.shape[2])}, got {tuple(masked.shape)}")
    labels_of(target, len(masked))
    positive("temperature", temperature)
    return row_mean(masked_answer_rows(masked, options, target, temperature=temperature, similarity=similarity))


def masked_answer_rows(
    masked: Tensor,
    options: Tensor,
    target: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    similarity: Literal["dot", "cosine"] = "dot",
) -> Tensor:
    """The same of each row, ``(B,)``."""
    if similarity == "cosine":
        masked, options = unit(masked), unit(options)
    logits = (options @ masked[:, :, None])[:, :, 0] / temperature
    return torch.nn.functional.cross_entropy(logits, target, reduction="none")
