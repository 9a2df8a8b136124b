"""How a pure loss becomes the loss of all ranks: either a mean of own rows is joined, or all rows come together.

Both leave gradients that, averaged over ranks, are those of one process.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmcl.distributed import Comm


def mean_over_ranks(mean: Tensor, rows: int, comm: Comm) -> Tensor:
    """The mean over rows of all ranks from the mean over the ``rows`` of this one; 0 where there are none."""
    return comm.mean(mean.expand(rows), torch.ones(rows, dtype=torch.bool, device=mean.device))


def all_rows(x: Tensor, present: Tensor, comm: Comm) -> Tensor:
    """The present rows of all ranks, in draw order, with gradients: what a loss of relations between rows takes."""
    return comm.gather(x)[comm.gather(present)]
