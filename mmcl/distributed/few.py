"""Few rows: every rank gathers all of them at once and computes the whole loss, as one process does.

To share the work of a small block takes exchanges that cost more than the block. Here a rank has the whole loss, and so
the whole gradient of its own rows: nothing is handed back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mmcl.distributed.comm import Comm
from mmcl.distributed.pair import SIDES, Pair, distinct, sides

FEW_ROWS = 128
"""of one side on all ranks; beyond it the block soon takes longer than the exchanges (tools/bench/few.py)"""


def is_few(pairs: Sequence[Pair], comm: Comm) -> bool:
    """Whether to compute everything everywhere; the same on all ranks where their shapes are."""
    rows = max(pair.b[..., 0].numel() for pair in pairs)
    return comm.world_size > 1 and rows * comm.world_size <= FEW_ROWS


def of_all_ranks(pairs: Sequence[Pair], comm: Comm) -> list[Pair]:
    """The pairs with the rows of all ranks, in draw order, after one exchange.

    A loss of them that every rank computes has the gradient of :meth:`Comm.share`: ``world_size`` times what it is by
    own rows; by what has no rows, such as ``scale``, what it is.
    """
    tensors, places = distinct(sides(pairs))
    everyone: tuple[Tensor, ...] = _OfAllRanks.apply(comm, *tensors)
    rows = (None if place < 0 else everyone[place] for place in places)
    found = []
    for pair in pairs:
        changed: dict[str, Any] = {side: next(rows) for side in SIDES}
        found.append(replace(pair, **changed))
    return found


class _OfAllRanks(torch.autograd.Function):
    """Tensors of any dtypes, ``(B, …)`` to ``(B * world_size, …)``, as bytes in one exchange."""

    @staticmethod
    def forward(ctx: Any, comm: Comm, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.comm = comm
        own = [x.contiguous().view(torch.uint8).view(-1) for x in tensors]
        parts = torch.split(comm.gather_by_rank(torch.cat(own)[None]), [len(x) for x in own], 1)
        everyone = tuple(
            part.contiguous().view(x.dtype).view(comm.world_size, *x.shape).transpose(0, 1).flatten(0, 1)
            for part, x in zip(parts, tensors, strict=True)
        )
        ctx.mark_non_differentiable(*(x for x in everyone if not x.is_floating_point()))
        return everyone

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        rank, world = ctx.comm.rank, ctx.comm.world_size
        wanted = ctx.needs_input_grad[1:]
        return None, *(g[rank::world] * world if w else None for g, w in zip(gradients, wanted, strict=True))
