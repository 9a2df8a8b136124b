"""Who reads what, when: the order of samples as arithmetic.

The order is a pure function of (shard sizes, seed, streams, block); the position in it is one integer, the number ``g``
of samples drawn so far. Draw ``g`` is draw ``g mod N`` of epoch ``g div N``. Nothing here is a list of all samples.

One epoch: shuffle the shards, lay their samples end to end (``N``), turn the whole by a hashed offset. Cut it into
``streams`` runs, the first ``N mod streams`` of them one sample longer; cut each run into blocks of ``block``, each
permuted. In-epoch draw ``g`` is position ``g div streams`` of stream ``g mod streams``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import reduce
from math import gcd
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


class Order(Protocol):
    """Where the sample of any draw lies."""

    def locate(self, draws: Integers) -> tuple[Integers, Integers, Integers, Integers]:
        """Sources, epochs, shards and indices of draws; an index of −1 is a hole."""
        ...

    def epochs(self, draws: int) -> list[float]:
        """Epochs in the first ``draws`` draws, of each source its own."""
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


MAX_PERIOD = 10_000
SHIFTED_STREAMS = 64
"""columns over which a table is shifted, at most"""


class MixedOrder:
    """Draw number → (source, epoch, shard, index) where several sources are mixed by weight; each has its own epochs.

    Weights are integers out of P, their sum, spread evenly over a table of P rows. With A = ``streams`` columns, draw g
    is column ``c = g mod A``, row ``ρ = g div A``. Its source is an entry of the table, and its draw number there is
    ``A·v + c``, v being the visits of this column to that source so far. A column meets every entry once in P rows: so
    shares are exact over P rows, every sample comes once per epoch of its source, and a worker keeps to its own streams
    of each source. Which entry:

    - ``P ≤ A ≤ 64``: ``(ρ + h) mod P`` with ``h = ⌊cP/A⌋``. A row of draws goes through the whole table.
    - else: ``(g + j) mod P``, the table in order, where ``j = (g div lcm(A, P)) mod gcd(A, P)`` steps on by one
      entry each time that rows and table come round together (a column would meet the same entries again). With offsets
      ⌊cP/A⌋, columns in steps of P/A entries meet the same source all at once where its weight is near a multiple of A,
      and A/P neighbouring columns always do: with many columns whole batches would come from one source.

    So shares hold within 2 % over any 1,000 draws for every P and A (2.5 % with fewer than 64 columns).

    Raises:
        ValueError: weights below 1, or a table of more than 10,000 rows.
    """

    def __init__(
        self,
        sizes: Sequence[Integers],
        weights: Sequence[int],
        *,
        seed: int = 0,
        streams: int = 64,
        block: int = 256,
        shuffle: bool = True,
    ) -> None:
        self.weights = reduced_weights(weights)
        self.period = sum(self.weights)
        if min(self.weights) < 1 or self.period > MAX_PERIOD:
            raise ValueError(f"weights must be at least 1 and their sum at most {MAX_PERIOD:,}, got {list(weights)}")
        self.columns = streams
        self.sources = [SampleOrder(s, seed=seed, streams=streams, block=block, shuffle=shuffle) for s in sizes]
        self.table = spread_evenly(self.weights)
        kind = _Shifted if self.period <= streams <= SHIFTED_STREAMS else _InTurn
        self._visits: _Shifted | _InTurn = kind(self.table, len(self.weights), streams)

    def locate(self, draws: Integers) -> tuple[Integers, Integers, Integers, Integers]:
        """Sources, epochs, shards and indices of draws, each int64 with the shape of ``draws``."""
        draws = np.asarray(draws, np.int64)
        source, own = self.source_draws(draws)
        epoch, shard, index = (np.empty_like(draws) for _ in range(3))
        for number, order in enumerate(self.sources):
            here = source == number
            if here.any():
                epoch[here], shard[here], index[here] = order.locate(own[here])
        return source, epoch, shard, index

    def source_draws(self, draws: Integers) -> tuple[Integers, Integers]:
        """Sources of draws, and their draw numbers there."""
        column, row = draws % self.columns, draws // self.columns
        source = self.table[self._visits.entry(column, row)]
        return source, self.columns * self._visits.count(source, column, row) + column

    def drawn(self, draws: int) -> list[int]:
        """How many of the first ``draws`` draws came from each source."""
        column = np.arange(self.columns, dtype=np.int64)
        rows = draws // self.columns + (column < draws % self.columns)
        numbers = range(len(self.weights))
        return [int(self._visits.count(np.full_like(column, k), column, rows).sum()) for k in numbers]

    def epochs(self, draws: int) -> list[float]:
        """Epochs in the first ``draws`` draws, of each source its own."""
        return [count / order.num_samples for count, order in zip(self.drawn(draws), self.sources, strict=True)]


class _Shifted:
    """Columns that go through the table from places spread over it."""

    def __init__(self, table: Integers, sources: int, columns: int) -> None:
        self.period, self.columns = len(table), columns
        self.before = _counts(table[None], sources)[:, 0]

    def entry(self, column: Integers, row: Integers) -> Integers:
        """Numbers in the table."""
        return (row + self._shift(column)) % self.period

    def count(self, source: Integers, column: Integers, rows: Integers) -> Integers:
        """Visits of columns to sources in the first ``rows`` rows."""
        shift = self._shift(column)
        return self._until(source, rows + shift) - self._until(source, shift)

    def _shift(self, column: Integers) -> Integers:
        return column * self.period // self.columns

    def _until(self, source: Integers, rows: Integers) -> Integers:
        whole, rest = np.divmod(rows, self.period)
        visits: Integers = whole * self.before[source, -1] + self.before[source, rest]
        return visits


class _InTurn:
    """Draws that go through the table in order.

    With ``d = gcd(A, P)``, P rows are d blocks of P/d rows. In block j, column ``c = qd + s`` meets the entries that
    are ``r = (s + j) mod d`` modulo d, each once: in row i of the block ``(iA + c + j) mod P``. Listed from r in steps
    of A they are the lane r; the column reads it from place ``q'·(A/d)⁻¹ mod P/d`` on, ``q' = q + (s + j) div d``.
    """

    def __init__(self, table: Integers, sources: int, columns: int) -> None:
        self.period, self.columns = len(table), columns
        self.lanes = gcd(columns, self.period)
        self.length = self.period // self.lanes
        self.step = pow(columns // self.lanes, -1, self.length)
        lane = np.arange(self.lanes, dtype=np.int64)[:, None]
        place = np.arange(2 * self.length, dtype=np.int64)
        # before[k, r, i]: visits to source k in the first i places of lane r, gone through twice
        self.before = _counts(table[(place * columns + lane) % self.period], sources)
        # lanes_before[k, r]: visits in whole lanes 0 … r − 1, gone through twice
        whole = np.tile(self.before[:, :, self.length], 2)
        self.lanes_before: Integers = np.concatenate(
            [np.zeros((sources, 1), np.int64), np.cumsum(whole, 1, dtype=np.int64)], 1
        )

    def entry(self, column: Integers, row: Integers) -> Integers:
        """Numbers in the table."""
        return (row * self.columns + column + row // self.length % self.lanes) % self.period

    def count(self, source: Integers, column: Integers, rows: Integers) -> Integers:
        """Visits of columns to sources in the first ``rows`` rows."""
        periods, rest = np.divmod(rows, self.period)
        block, place = np.divmod(rest, self.length)
        quotient, first = np.divmod(column, self.lanes)
        turn, lane = np.divmod(first + block, self.lanes)
        start = (quotient + turn) * self.step % self.length
        whole = self.lanes_before[source, first + block] - self.lanes_before[source, first]
        part = self.before[source, lane, start + place] - self.before[source, lane, start]
        visits: Integers = periods * self.lanes_before[source, self.lanes] + whole + part
        return visits


def _counts(rows: Integers, sources: int) -> Integers:
    """``[k, r, i]``: how often k is among the first i of row r."""
    visits = rows[None] == np.arange(sources)[:, None, None]
    counts: Integers = np.concatenate(
        [np.zeros((*visits.shape[:2], 1), np.int64), np.cumsum(visits, 2, dtype=np.int64)], 2
    )
    return counts


def reduced_weights(weights: Sequence[int]) -> tuple[int, ...]:
    """70 and 30 are 7 and 3."""
    divisor = max(reduce(gcd, weights, 0), 1)
    return tuple(weight // divisor for weight in weights)


def spread_evenly(weights: Sequence[int]) -> Integers:
    """Each source k in ``weights[k]`` of ``sum(weights)`` rows, as evenly spaced as can be: int64 ``(P,)``."""
    share = np.array(weights, np.int64)
    credit, table = np.zeros_like(share), []
    for _ in range(int(share.sum())):
        credit += share
        source = int(np.argmax(credit))
        credit[source] -= share.sum()
        table.append(source)
    return np.array(table, np.int64)


def stream_sharing(streams: int, workers: int) -> int:
    """How many of all ``workers`` (of all ranks) read each stream; 1 where their number divides ``streams``."""
    return workers // gcd(streams, workers)


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
