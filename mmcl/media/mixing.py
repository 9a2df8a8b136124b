"""Mixing of rows: a part of another sample of the batch is laid over each (Zhang et al. 2018, arXiv 1710.09412).

The one change of a row that depends on other rows, so it runs last, on the whole batch. Which two meet is a function of
seed and draw numbers alone: the present rows of a view, sorted by a hash of their draws, form a ring, and each is mixed
with the next. An absent row is as good as a deleted one. ``scope``: the ring of one rank's rows needs no exchange and
changes with the number of ranks; that of all ranks' rows is the same on any number.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from mmcl.media.device_hash import device_uniform
from mmcl.types import Batch, ViewBatch

RANK, GLOBAL = "rank_mix_share", "global_mix_share"
"""names of the parameter float32 ``(B,)``, the share of the other sample, by scope"""
_MIX = 48
"""what the random numbers of this file are for"""


class Exchange(Protocol):
    """What mixing over ranks needs of a communicator (``mmcl.distributed.Comm``)."""

    def gather(self, x: Tensor) -> Tensor: ...

    def index(self, rows: int, device: torch.device | str | None = None) -> Tensor: ...


@torch.no_grad()
def mix(batch: Batch, *, seed: int, exchange: Exchange) -> Batch:
    """The batch with rows mixed as their parameters say; a new one, nothing is modified.

    Video is rounded to uint8 once. Each mixed view also gets ``mix_draw`` int64 ``(B,)``, the draw number of the row
    that was laid over; a row that is alone meets itself, which changes nothing. Every rank makes the same collectives.
    """
    return replace(
        batch,
        views={view: _mix_view(values, batch.draws, seed, exchange) for view, values in batch.views.items()},
    )


def _mix_view(values: ViewBatch, draws: Tensor, seed: int, exchange: Exchange) -> ViewBatch:
    if RANK in values.params:
        partners = ring(draws, values.present, seed)
        return _mixed(values, values.params[RANK], values.data[partners], draws[partners])
    if GLOBAL in values.params:
        all_draws, present = exchange.gather(draws), exchange.gather(values.present)
        own = exchange.index(len(draws), draws.device)
        partners = ring(all_draws, present, seed)[own]
        return _mixed(values, values.params[GLOBAL], exchange.gather(values.data)[partners], all_draws[partners])
    return values


def ring(draws: Tensor, present: Tensor, seed: int) -> Tensor:
    """int64 ``(B,)``: the row that each present row is mixed with; absent rows get themselves."""
    order = device_uniform(seed, _MIX, draws).masked_fill(~present, 2.0).argsort(stable=True)
    followers = order.roll(-1)
    count = int(present.sum())
    if count:
        followers[count - 1] = order[0]
    partners = torch.arange(len(draws), device=draws.device)
    partners[order[:count]] = followers[:count]
    return partners


def _mixed(values: ViewBatch, share: Tensor, others: Tensor, draws: Tensor) -> ViewBatch:
    wide = share.view(-1, *[1] * (values.data.ndim - 1))
    mixed = torch.lerp(values.data.float(), others.float(), wide)
    if not values.data.is_floating_point():
        mixed = mixed.round()
    params: Mapping[str, Tensor] = {**values.params, "mix_draw": draws}
    return replace(values, data=mixed.to(values.data.dtype), params=params)
