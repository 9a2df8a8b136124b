"""The two contrasts against keys of the batch and of the queue, and the one against tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mmcl.losses.local_mutual_information import local_mutual_information_rows
from mmcl.losses.soft_targets import soft_target_rows
from mmcl.objectives.tcl.rows import PairQueue, Rows


@dataclass(frozen=True, eq=False)
class Keys:
    """The momentum keys of one tower that rows search among."""

    rows: Tensor
    """``(M + K, D)``: of the batch, then of the queue"""
    hidden: Tensor
    """bool ``(n, M + K)``: false negatives and empty places"""

    @classmethod
    def of(cls, number: int, joint: Tensor, queue: PairQueue | None, rows: Rows) -> Keys:
        """Of side ``number`` of the pair, from this rank's ``joint (B, D)``."""
        batch = rows.all(joint)
        if queue is None:
            return cls(batch, rows.hidden)
        hidden = torch.cat([rows.hidden, queue.hidden(rows.groups[rows.numbers])], 1)
        return cls(torch.cat([batch, queue.side(number).rows.to(batch.dtype)]), hidden)


def contrast(
    queries: Tensor, keys: Keys, rows: Rows, scale: Tensor, teachers: Tensor | None = None, alpha: Tensor | float = 0.0
) -> Tensor:
    """Cross-entropy of ``queries (B, D)`` against keys, 0-d; ``teachers (B, D)`` give the soft share of the targets."""
    with torch.autocast(queries.device.type, enabled=False):
        logits = _logits(queries[rows.own], keys, scale)
        if teachers is None:
            return rows.mean(F.cross_entropy(logits, rows.numbers, reduction="none"))
        teacher = _logits(teachers[rows.own].detach(), keys, scale.detach())
        return rows.mean(soft_target_rows(logits, teacher, rows.numbers, alpha=alpha))


def _logits(x: Tensor, keys: Keys, scale: Tensor) -> Tensor:
    return (scale * (x @ keys.rows.T)).masked_fill(keys.hidden, -torch.inf)


def local_information(joint: Tensor, locals_: Tensor, mask: Tensor, rows: Rows, scale: Tensor) -> Tensor:
    """Each own global ``joint (B, D)`` against tokens ``(B, L, D)`` of all ranks, real where ``mask (B, L)``; 0-d."""
    comm = rows.comm
    every, real = comm.gather(locals_.detach(), pad=True)[rows.places], comm.gather(mask, pad=True)[rows.places]
    values = local_mutual_information_rows(
        joint[rows.own], every, real, rows.numbers, rows.hidden, temperature=1 / scale
    )
    return comm.mean(values, real[rows.numbers].any(1))


def pooled_locals(tokens: Tensor, mask: Tensor, pool: int) -> tuple[Tensor, Tensor]:
    """Means over runs of ``pool`` tokens, the last as long as there are; tokens ``(B, L, D)``, mask bool ``(B, L)``."""
    if pool == 1:
        return tokens, mask
    missing = -tokens.shape[1] % pool
    real = F.pad(mask, (0, missing)).view(len(mask), (mask.shape[1] + missing) // pool, pool)
    runs = F.pad(tokens.masked_fill(~mask[..., None], 0), (0, 0, 0, missing)).view(*real.shape, tokens.shape[2])
    return runs.sum(2) / real.sum(2, keepdim=True).clamp_min(1), real.any(2)
