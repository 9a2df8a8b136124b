"""Rows of one pair of towers, of this rank and of all, and the keys of earlier batches."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmcl.distributed import Comm
from mmcl.objectives.views import KeyQueue
from mmcl.types import Batch

GROUPS = 3
"""columns of ``Batch.groups`` that a queue remembers: key, group, caption"""


@dataclass(frozen=True, eq=False)
class Rows:
    """The M samples, of all ranks and in draw order, that have every view of a pair; n of them are this rank's."""

    comm: Comm
    own: Tensor
    """bool ``(B,)``"""
    numbers: Tensor
    """int64 ``(n,)``: which of the M the own ones are"""
    places: Tensor
    """int64 ``(M,)``: where they stand among gathered rows"""
    draws: Tensor
    """int64 ``(M,)``"""
    groups: Tensor
    """int64 ``(M, G)``; −1 throughout where false negatives are not to be masked"""
    hidden: Tensor
    """bool ``(n, M)``: other samples of a group of the row, which are no negatives of it"""

    @classmethod
    def of(cls, batch: Batch, own: Tensor, comm: Comm, *, mask_false_negatives: bool) -> Rows:
        everyone = comm.gather(own)
        numbers = (everyone.cumsum(0) - 1)[comm.index(len(own), own.device)][own]
        groups = comm.gather(batch.groups if mask_false_negatives else torch.full_like(batch.groups, -1))[everyone]
        hidden = same_group(groups[numbers], groups)
        hidden &= numbers[:, None] != torch.arange(len(groups), device=own.device)
        return cls(comm, own, numbers, everyone.nonzero()[:, 0], comm.gather(batch.draws)[everyone], groups, hidden)

    @property
    def itself(self) -> Tensor:
        """bool ``(n, M)``: the column of each row's own sample."""
        return self.numbers[:, None] == torch.arange(len(self.places), device=self.numbers.device)

    def all(self, x: Tensor) -> Tensor:
        """``(B, …)`` to ``(M, …)``, without a gradient."""
        return self.comm.gather(x.detach())[self.places]

    def mean(self, values: Tensor) -> Tensor:
        """Over the entries of all ranks; 0 where there are none."""
        return self.comm.mean(values, torch.ones_like(values, dtype=torch.bool))


def same_group(a: Tensor, b: Tensor) -> Tensor:
    """``(n, G)`` and ``(m, G)`` to bool ``(n, m)``: which share a number in a column."""
    return ((a[:, None] == b) & (b >= 0)).any(2)


class PairQueue(nn.Module):
    """The newest keys of both towers of a pair, row by row of the same samples, and the groups of these."""

    groups: Tensor
    """int64 ``(K, GROUPS)``"""

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.keys = nn.ModuleList(KeyQueue(size, width) for _ in range(2))
        self.register_buffer("groups", torch.full((size, GROUPS), -1, dtype=torch.int64))

    def side(self, number: int) -> KeyQueue:
        queue = self.keys[number]
        assert isinstance(queue, KeyQueue)
        return queue

    def hidden(self, groups: Tensor) -> Tensor:
        """bool ``(n, K)``: places without a key, or with one of a group of the row; ``groups`` int64 ``(n, G)``."""
        return same_group(_columns(groups), self.groups) | ~self.side(0).mask()

    @torch.no_grad()
    def push(self, keys: tuple[Tensor, Tensor], groups: Tensor) -> None:
        """Takes in keys ``(m, D)`` of both towers and their groups ``(m, G)`` over the oldest."""
        places = self.side(0).places(len(groups))
        self.groups[places] = _columns(groups)[len(groups) - len(places) :]
        for number, rows in enumerate(keys):
            self.side(number).push(rows)


def _columns(groups: Tensor) -> Tensor:
    return F.pad(groups, (0, GROUPS - groups.shape[1]), value=-1)  # a negative width cuts
