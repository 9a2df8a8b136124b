"""How a pure loss becomes the loss of all ranks: either a mean of own rows is joined, or all rows come together.

Both leave gradients that, averaged over ranks, are those of one process.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mmcl.distributed import Comm
from mmcl.types import RunError


def mean_over_ranks(mean: Tensor, rows: int, comm: Comm) -> Tensor:
    """The mean over rows of all ranks from the mean over the ``rows`` of this one; 0 where there are none."""
    return comm.mean(mean.expand(rows), torch.ones(rows, dtype=torch.bool, device=mean.device))


def all_rows(x: Tensor, present: Tensor, comm: Comm) -> Tensor:
    """The present rows of all ranks, in draw order, with gradients: what a loss of relations between rows takes."""
    return comm.gather(x)[comm.gather(present)]


def classification(logits: Tensor, labels: Tensor, rows: Tensor, comm: Comm) -> Tensor:
    """Cross-entropy of ``(B, K)`` logits, the mean over these ``rows`` of all ranks that have a label (not −1).

    Raises:
        RunError: on all ranks, if one has a label of K or above.
    """
    highest = int(comm.max(labels.amax())) if len(labels) else -1
    if highest >= logits.shape[1]:
        raise RunError(f"a sample has label {highest}, but the objective was given classes: {logits.shape[1]}")
    with torch.autocast(logits.device.type, enabled=False):
        wide = logits if logits.dtype == torch.float64 else logits.float()
        return comm.mean(F.cross_entropy(wide, labels.clamp_min(0), reduction="none"), rows & (labels >= 0))
