"""What all workers of all ranks agree on."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from mmcl.data.cluster_order import ClusterOrder
from mmcl.data.clusters import Clusters
from mmcl.data.journal import short_name
from mmcl.data.order import Integers, MixedOrder, Order, rank_rows, worker_rows
from mmcl.data.views import ViewMaker
from mmcl.shards.manifest import Manifest
from mmcl.shards.remote import RemoteOptions
from mmcl.shards.sequential import TarList
from mmcl.types import redact


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that a worker must know; picklable, the same for all workers of all ranks but for ``rank``."""

    manifests: tuple[Manifest, ...]
    weights: tuple[int, ...]
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
    """keys (or places, where a shard itself stopped the worker) that are never decoded again: holes in every epoch"""
    remote: RemoteOptions
    """of the whole rank"""
    tars: TarList | None = None
    """tars without an index, read one after the other, instead of ``manifests``"""
    samples: Integers | None = None
    """int64: the draws that are made, in this order, instead of 0, 1, 2, …; ``last_draw`` stands for a hole"""
    clusters: Clusters | None = None
    """pseudo-labels of the only manifest"""
    mixed: bool = False
    """batches hold samples of all labels, each row with its own; else samples of one"""

    @property
    def steps(self) -> float:
        """Batches of the whole stream."""
        draws = self.last_draw if self.samples is None else len(self.samples)
        return math.inf if draws is None else -(-draws // self.global_batch)

    def order(self) -> Order:
        if self.clusters is not None and not self.mixed:
            return ClusterOrder(
                self.manifests[0].sizes,
                self.clusters,
                batch=self.global_batch,
                seed=self.maker.seed,
                streams=self.streams,
                block=self.block,
            )
        return MixedOrder(
            [manifest.sizes for manifest in self.manifests],
            self.weights,
            seed=self.maker.seed,
            streams=self.streams,
            block=self.block,
            shuffle=self.shuffle,
        )

    def pool(self, shard: int, index: int) -> int:
        """The pseudo-label of a sample, where rows carry theirs."""
        if self.clusters is None or not self.mixed:
            return -1
        return int(self.clusters.labels[int(self.manifests[0].sizes[:shard].sum()) + index])

    def worker_remote(self) -> RemoteOptions:
        """The share of one worker in what its rank may ask for ahead."""
        return replace(
            self.remote,
            read_ahead_bytes=self.remote.read_ahead_bytes // self.workers,
            connections=-(-self.remote.connections // self.workers),
        )

    def is_quarantined(self, source: int, shard: int, index: int, key: str) -> bool:
        """Whether a sample is never decoded again."""
        return short_name(key) in self.quarantine or self.place(source, shard, index) in self.quarantine

    def place_of(self, draw: int) -> str:
        """Where the sample of a draw lies, as far as that can be told without reading."""
        if self.tars is not None:
            return redact(f"draw {draw} of {self.tars.urls[0]}")
        source, _, shard, index = (int(part) for part in self.order().locate(np.array(draw)))
        return self.place(source, shard, index)

    def draws(self, step: int, worker: int) -> Integers:
        """Draw numbers that one worker decodes of a batch."""
        mine = rank_rows(step, global_batch=self.global_batch, rank=self.rank, world_size=self.world_size)
        numbers = worker_rows(mine, worker=worker, workers=self.workers)
        return numbers if self.samples is None else self.samples[numbers]

    def place(self, source: int, shard: int, index: int) -> str:
        """Where a sample lies, in words."""
        if self.tars is not None:
            return redact(f"{self.tars.urls[shard]}#{index}")
        return redact(f"{self.manifests[source].shard_url(shard)}#{index}")
