"""Who reads what, when: the order of samples as arithmetic.

The order is a pure function of (shard sizes, seed, streams, block); the position in it is one integer, the number ``g``
of samples drawn so far. Draw ``g`` is draw ``g mod N`` of epoch ``g div N``. Nothing here is a list of all samples.

One epoch: shuffle the shards, lay their samples end to end (``N``), turn the whole by a hashed offset. Cut it into
``streams`` runs, the first ``N mod streams`` of them one sample longer; cut each run into blocks of ``block``, each
permuted. In-epoch draw ``g`` is position ``g div streams`` of stream ``g mod streams``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import numpy as np
import numpy.typing as npt

from mmcl.hashing import hash64

Integers = npt.NDArray[np.int64]

# what a hashed number is for: the third word, so that no two uses share their numbers
_SHARD_ORDER, _OFFSET, _WITHIN_BLOCK = 0, 1, 2


class HasSizes(Protocol):
    """What the order needs of a manifest."""

    @property
    def sizes(self) -> Integers:
        """samples per shard, int64 ``(num_shards,)``"""
        ...


class EpochOrder:
    """The order of one epoch: in-epoch draw number → (shard, index in the shard)."""

    def __init__(self, sizes: Integers, *, seed: int, epoch: int, streams: int = 64, block: int = 256) -> None:
        if streams < 1 or block < 1:
            raise ValueError(f"streams and block must be at least 1, got {streams} and {block}")
        self.seed, self.epoch, self.block = seed, epoch, block
        sizes = np.asarray(sizes, np.int64)
        keys = hash64(seed, epoch, _SHARD_ORDER, np.arange(len(sizes), dtype=np.uint64))
        self.shards: Integers = np.argsort(keys, kind="stable").astype(np.int64)
        self.sizes = sizes[self.shards]
        self.ends: Integers = np.cumsum(self.sizes)
        self.num_samples = int(self.ends[-1]) if len(self.ends) else 0
        self.streams = streams
        if self.num_samples <= streams * block:  # a small epoch is one permutation
            self.streams, self.block = 1, max(self.num_samples, 1)
        self.run_length, self.longer_runs = divmod(self.num_samples, self.streams)
        self.offset = int(hash64(seed, epoch, _OFFSET)) % max(self.num_samples, 1)

    def locate(self, draws: Integers) -> tuple[Integers, Integers]:
        """Shard numbers and indices of in-epoch draws, int64, same shape as ``draws``."""
        draws = np.asarray(draws, np.int64)
        stream, position = draws % self.streams, draws // self.streams
        block, in_block = position // self.block, position % self.block
        blocks_per_stream = self.run_length // self.block + 2
        wanted, which = np.unique(stream * blocks_per_stream + block, return_inverse=True)
        permutations = self._permutations(*np.divmod(wanted, blocks_per_stream))
        within = permutations[which.reshape(draws.shape), in_block]
        run_start = stream * self.run_length + np.minimum(stream, self.longer_runs)
        flat = (run_start + block * self.block + within + self.offset) % self.num_samples
        shard = np.searchsorted(self.ends, flat, side="right")
        return self.shards[shard], flat - (self.ends[shard] - self.sizes[shard])

    def _permutations(self, stream: Integers, block: Integers) -> Integers:
        """One permutation per (stream, block): sort hashed keys; the short last block keeps its tail in place."""
        length = self.run_length + (stream < self.longer_runs)
        count = np.minimum(self.block, length - block * self.block)
        place = np.arange(self.block, dtype=np.uint64)[None]
        keys = hash64(self.seed, self.epoch, _WITHIN_BLOCK, stream[:, None], block[:, None], place)
        keys = np.where(place < count[:, None].astype(np.uint64), keys >> np.uint64(1), np.uint64(2**64 - 1))
        return np.argsort(keys, axis=1, kind="stable").astype(np.int64)


class SampleOrder:
    """Draw number → (epoch, shard, index) over any number of epochs.

    ``shuffle=False`` reads shards and samples in the order of the manifest (evaluation).
    """

    def __init__(
        self, sizes: Integers, *, seed: int = 0, streams: int = 64, block: int = 256, shuffle: bool = True
    ) -> None:
        self.sizes = np.asarray(sizes, np.int64)
        self.seed, self.streams, self.block, self.shuffle = seed, streams, block, shuffle
        self.num_samples = int(self.sizes.sum())
        self._epochs: dict[int, EpochOrder] = {}

    def locate(self, draws: Integers) -> tuple[Integers, Integers, Integers]:
        """Epochs, shards and indices of draws, each int64 with the shape of ``draws``."""
        draws = np.asarray(draws, np.int64)
        epoch, in_epoch = np.divmod(draws, self.num_samples)
        if not self.shuffle:
            ends = np.cumsum(self.sizes)
            shard = np.searchsorted(ends, in_epoch, side="right").astype(np.int64)
            return epoch, shard, in_epoch - (ends[shard] - self.sizes[shard])
        shard, index = np.empty_like(draws), np.empty_like(draws)
        for number in np.unique(epoch):
            here = epoch == number
            shard[here], index[here] = self._epoch(int(number)).locate(in_epoch[here])
        return epoch, shard, index

    def _epoch(self, number: int) -> EpochOrder:
        if number not in self._epochs:
            # a batch touches at most the epoch before; older tables only cost memory
            self._epochs = {n: order for n, order in self._epochs.items() if n >= number - 1}
            self._epochs[number] = EpochOrder(
                self.sizes, seed=self.seed, epoch=number, streams=self.streams, block=self.block
            )
        return self._epochs[number]


def sample_order(
    manifest: HasSizes, *, seed: int, epoch: int, streams: int = 64, block: int = 256
) -> Iterator[tuple[int, int]]:
    """The draws of one epoch in order, each (shard number in the manifest, member index in the shard)."""
    order = EpochOrder(manifest.sizes, seed=seed, epoch=epoch, streams=streams, block=block)
    chunk = 4096
    for start in range(0, order.num_samples, chunk):
        draws = np.arange(start, min(start + chunk, order.num_samples), dtype=np.int64)
        shards, indices = order.locate(draws)
        yield from zip(shards.tolist(), indices.tolist(), strict=True)


def rank_rows(step: int, *, global_batch: int, rank: int, world_size: int) -> Integers:
    """Draw numbers of a rank's rows in global batch ``step``: row i is draw ``step·B + rank + i·W``."""
    return np.arange(step * global_batch + rank, (step + 1) * global_batch, world_size, dtype=np.int64)


def worker_rows(draws: Integers, *, worker: int, workers: int) -> Integers:
    """The part of a rank's rows that one of its workers decodes: every ``workers``-th, from ``worker``."""
    return draws[worker::workers]


def fitting_workers(workers: int, rows: int) -> int:
    """The largest number of workers up to ``workers`` that divides a rank's rows; at least 1."""
    return max(count for count in range(1, max(1, min(workers, rows)) + 1) if rows % count == 0)
