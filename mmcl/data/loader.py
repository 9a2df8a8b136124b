"""Worker processes: each decodes its part of every batch of its rank."""

from __future__ import annotations

import itertools
import signal
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from mmcl.data.collate import Row, collate
from mmcl.data.order import SampleOrder, rank_rows, worker_rows
from mmcl.data.views import ViewMaker
from mmcl.shards.manifest import Manifest
from mmcl.shards.members import parse_sample
from mmcl.shards.reader import ShardReader
from mmcl.types import Batch, SampleError


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that a worker must know; picklable, the same for all workers of all ranks but for ``rank``."""

    manifest: Manifest
    maker: ViewMaker
    global_batch: int
    rank: int
    world_size: int
    workers: int
    streams: int
    block: int
    shuffle: bool
    last_draw: int | None
    """where a finite stream ends; draws from there on are holes"""
    with_metadata: bool
    quarantine: frozenset[str]
    """keys that are never decoded again: holes in every epoch"""


class PartStream(IterableDataset[Batch]):
    """The parts that this worker decodes of batches ``first_step``, ``first_step + 1``, …"""

    def __init__(self, plan: Plan, first_step: int) -> None:
        self.plan, self.first_step = plan, first_step

    def __iter__(self) -> Iterator[Batch]:
        plan = self.plan
        info = get_worker_info()
        worker = 0 if info is None else info.id
        if info is not None:
            torch.set_num_threads(1)
            # Ctrl-C reaches every process of a terminal; the trainer still wants batches for its last step
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        reader = ShardReader(plan.manifest)
        order = SampleOrder(
            plan.manifest.sizes,
            seed=plan.maker.seed,
            streams=plan.streams,
            block=plan.block,
            shuffle=plan.shuffle,
        )
        for step in itertools.count(self.first_step):
            if plan.last_draw is not None and step * plan.global_batch >= plan.last_draw:
                return
            mine = rank_rows(step, global_batch=plan.global_batch, rank=plan.rank, world_size=plan.world_size)
            draws = worker_rows(mine, worker=worker, workers=plan.workers)
            epochs, shards, indices = order.locate(draws)
            rows = [
                read_row(plan, reader, draw=int(draw), epoch=int(epoch), shard=int(shard), index=int(index))
                for draw, epoch, shard, index in zip(draws, epochs, shards, indices, strict=True)
            ]
            yield collate(rows, plan.maker.views, with_metadata=plan.with_metadata, blank=plan.maker.blank)


def read_row(plan: Plan, reader: ShardReader, *, draw: int, epoch: int, shard: int, index: int) -> Row:
    """One draw, decoded; a bad sample becomes a hole that carries its reason."""
    if plan.last_draw is not None and draw >= plan.last_draw:
        return Row(draw)
    key = f"{plan.manifest.shard_url(shard)}#{index}"
    try:
        raw = reader.read(shard, index)
        key = raw.key
        if key in plan.quarantine:
            return Row(draw, skipped=(key, "quarantined", "stopped a decoder before"))
        sample = parse_sample(raw)
        values, caption = plan.maker(sample, epoch=epoch)
    except SampleError as error:
        return Row(draw, skipped=(key, error.reason, error.detail))
    return Row(
        draw,
        key=key,
        values=values,
        group=sample.group,
        label=-1 if sample.label is None else sample.label,
        caption=caption,
        captions=sample.captions,
        metadata=sample.metadata if plan.with_metadata else {},
    )


def part_loader(plan: Plan, first_step: int, *, in_process: bool) -> DataLoader[Batch]:
    """A plain ``DataLoader`` whose items are parts, worker by worker in turn.

    Decoders are opened inside the worker, never before a fork: workers start by forkserver.
    """
    stream = PartStream(plan, first_step)
    if in_process:
        return DataLoader(stream, batch_size=None)
    return DataLoader(
        stream,
        batch_size=None,
        num_workers=plan.workers,
        multiprocessing_context="forkserver",
        prefetch_factor=2,
    )
