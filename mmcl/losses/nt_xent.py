"""SimCLR's loss over two views."""

from __future__ import annotations

import torch
from torch import Tensor

from mmcl.losses._checks import matrices, positive
from mmcl.losses._math import full_precision, row_mean, unit


@full_precision
def nt_xent(a: Tensor, b: Tensor, *, temperature: float | Tensor) -> Tensor:
    """Each of the 2B rows finds its other view among the 2B − 1 rows that are not itself.

    Args:
        a: float ``(B, D)``, the first view, normalised inside.
        b: float ``(B, D)``, the second view, normalised inside; gradients reach both.
        temperature: divides the cosine; above 0, a number or 0-d tensor.

    Returns:
        0-d, ≥ 0, in nats: mean over 2B rows (the authors' code reports twice that); 0 with fewer than two rows.

    Raises:
        ValueError: shapes differ or are not 2-d, or the temperature is not above 0.

    Source: Chen et al. 2020 (arXiv 2002.05709), eq. 1.

    >>> f"{nt_xent(torch.ones(4, 2), torch.ones(4, 2), temperature=0.1):.4f}"  # log 7
    '1.9459'
    """
    matrices(a=a, b=b)
    positive("temperature", temperature)
    rows = unit(torch.cat([a, b]))
    itself = torch.eye(len(rows), dtype=torch.bool, device=rows.device)
    logits = (rows @ rows.T / temperature).masked_fill(itself, float("-inf"))
    # rolling the columns by B puts every positive on the diagonal
    return row_mean(-logits.roll(len(a), 1).log_softmax(1).diagonal())
