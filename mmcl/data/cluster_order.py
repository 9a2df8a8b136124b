"""The order of samples where every batch holds samples of one pseudo-label: arithmetic, as in ``order``.

One epoch: a label of ``n`` samples has ``m = ⌈n / B⌉`` batches; batch j holds its in-label draws ``⌊jn/m⌋`` up to
``⌊(j+1)n/m⌋`` and then holes: what does not fill a batch is spread over all batches of the label, none of which is less
than half full where ``n > B``. The S batches of all labels come in an order of hashed keys. So an epoch is ``S·B``
draws, draw g is row ``g mod B`` of batch ``(g div B) mod S`` of epoch ``g div S·B``, and every labelled sample comes
once. In-label draws of an epoch follow :class:`~mmcl.data.order.EpochOrder` over the label's samples of each shard.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np

from mmcl.data.clusters import Clusters
from mmcl.data.order import EpochOrder, Integers
from mmcl.hashing import hash64
from mmcl.types import ConfigError

_BATCH_ORDER, _LABEL_SEED = 16, 17
"""what a hashed number is for; those of ``order`` are smaller"""

_KEPT = 256
"""orders of labels that are remembered"""

_LabelOrder: TypeAlias = tuple[Integers, Integers, Integers, EpochOrder]
"""a label's samples, the shards that hold any, where each of these begins among the samples, and their order"""


class ClusterOrder:
    """Draw number → (source 0, epoch, shard, index) over any number of epochs; index −1 is a hole.

    Raises:
        ConfigError: labels of other shards, or no sample that has one.
    """

    def __init__(
        self,
        sizes: Integers,
        clusters: Clusters,
        *,
        batch: int,
        seed: int = 0,
        streams: int = 64,
        block: int = 256,
    ) -> None:
        self.batch, self.seed, self.streams, self.block = batch, seed, streams, block
        self.starts = np.cumsum([0, *np.asarray(sizes, np.int64).tolist()])
        if len(clusters.labels) != self.starts[-1]:
            raise ConfigError(
                f"data.clusters: labels of {len(clusters.labels):,} samples, the shards hold {self.starts[-1]:,}"
            )
        by_label = np.argsort(clusters.labels, kind="stable").astype(np.int64)
        self.members: Integers = by_label[int((clusters.labels < 0).sum()) :]
        """sample numbers, label by label"""
        if not len(self.members):
            raise ConfigError("data.clusters: no sample has a label")
        self.labels, first = np.unique(clusters.labels[self.members], return_index=True)
        self.bounds: Integers = np.append(first, len(self.members)).astype(np.int64)
        """where each label's members begin"""
        counts = np.diff(self.bounds)
        self.parts: Integers = -(-counts // batch)
        """batches of each label"""
        self.steps = int(self.parts.sum())
        """batches of an epoch"""
        self._label_of: Integers = np.repeat(np.arange(len(counts)), self.parts)
        self._part_of: Integers = np.arange(self.steps) - np.repeat(np.cumsum(self.parts) - self.parts, self.parts)
        self._batches: dict[int, Integers] = {}
        self._orders: dict[tuple[int, int], _LabelOrder] = {}

    def locate(self, draws: Integers) -> tuple[Integers, Integers, Integers, Integers]:
        """Sources, epochs, shards and indices of draws, each int64 with the shape of ``draws``."""
        draws = np.asarray(draws, np.int64)
        number, row = np.divmod(draws, self.batch)
        epoch = number // self.steps
        shard, index = np.zeros_like(draws), np.full_like(draws, -1)
        for each in np.unique(number).tolist():
            label, first, end = self.place(each)
            here = (number == each) & (row < end - first)
            members, shards, begins, order = self._order(each // self.steps, label)
            which, inside = order.locate(first + row[here])
            shard[here] = shards[which]
            index[here] = members[begins[which] + inside] - self.starts[shards[which]]
        return np.zeros_like(draws), epoch, shard, index

    def place(self, batch: int) -> tuple[int, int, int]:
        """(place of the label, first and end of its in-label draws) of a batch, numbered over all epochs."""
        epoch, step = divmod(batch, self.steps)
        which = int(self._order_of_batches(epoch)[step])
        label, part = int(self._label_of[which]), int(self._part_of[which])
        count, parts = int(self.bounds[label + 1] - self.bounds[label]), int(self.parts[label])
        return label, part * count // parts, (part + 1) * count // parts

    def epochs(self, draws: int) -> list[float]:
        """Epochs in the first ``draws`` draws, holes not counted."""
        epoch, batches = divmod(draws // self.batch, self.steps)
        which = self._order_of_batches(epoch)[:batches]
        label, part = self._label_of[which], self._part_of[which]
        count, parts = np.diff(self.bounds)[label], self.parts[label]
        drawn = int(((part + 1) * count // parts - part * count // parts).sum())
        return [epoch + drawn / len(self.members)]

    def _order_of_batches(self, epoch: int) -> Integers:
        if epoch not in self._batches:
            self._batches = {n: order for n, order in self._batches.items() if n >= epoch - 1}
            keys = hash64(self.seed, epoch, _BATCH_ORDER, np.arange(self.steps, dtype=np.uint64))
            self._batches[epoch] = np.argsort(keys, kind="stable").astype(np.int64)
        return self._batches[epoch]

    def _order(self, epoch: int, label: int) -> _LabelOrder:
        if (epoch, label) not in self._orders:
            if len(self._orders) >= _KEPT:
                self._orders.clear()
            members = self.members[self.bounds[label] : self.bounds[label + 1]]
            counts = np.diff(np.searchsorted(members, self.starts))
            shards = np.flatnonzero(counts)
            sizes = counts[shards]
            seed = int(hash64(self.seed, _LABEL_SEED, self.labels[label]) >> np.uint64(1))
            order = EpochOrder(sizes, seed=seed, epoch=epoch, streams=self.streams, block=self.block)
            self._orders[epoch, label] = (members, shards, np.cumsum(sizes) - sizes, order)
        return self._orders[epoch, label]
