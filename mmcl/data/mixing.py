"""How well the order mixes: how often two samples that lie side by side in a shard meet in one batch.

Neighbours of a shard are often alike (clips of one film). A perfect shuffle of N samples puts two given ones into one
batch of B with probability (B − 1) / (N − 1); the order of the stream, which reads only near the heads of its streams,
puts neighbours together more often. That is harmless where neighbours are no more alike than any two samples.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from mmcl.data.order import EpochOrder, HasSizes

_BATCHES = 400
"""that are looked at, in groups of neighbours, evenly spaced over an epoch"""
_CALLS = 40
"""groups"""
_KEYS = 1 << 23
"""hashed and sorted in all groups together, at most (but in one)"""
_MOST_TIMES = 2.0
"""as often as in a perfect shuffle is taken for mixed"""
_LARGEST_BLOCK = 1 << 16
_FEW = 0.01
"""of neighbours may be of one group beyond that"""


@dataclass(frozen=True, slots=True)
class Mixing:
    """How often neighbours of a shard meet in one batch of an epoch."""

    batch: int
    streams: int
    block: int
    rate: float
    """of all pairs of neighbours, the share that meets"""
    perfect_rate: float
    """the same in a perfect shuffle"""

    @property
    def times(self) -> float:
        """``rate`` over ``perfect_rate``; 1 where there are no pairs."""
        return self.rate / self.perfect_rate if self.perfect_rate else 1.0

    @property
    def mixed(self) -> bool:
        return self.times <= _MOST_TIMES


def measure_mixing(manifest: HasSizes, *, batch: int, streams: int = 64, block: int = 256, seed: int = 0) -> Mixing:
    """Counts pairs of neighbours in batches of epoch 0; in large epochs of 400 batches. Only numbers are read."""
    sizes = np.asarray(manifest.sizes, np.int64)
    total = int(sizes.sum())
    pairs = int(np.maximum(sizes - 1, 0).sum())
    batch = max(1, min(batch, total))
    if not pairs:
        return Mixing(batch, streams, block, 0.0, 0.0)
    order = EpochOrder(sizes, seed=seed, epoch=0, streams=streams, block=block)
    whole = total // batch
    # batches that follow each other read the same blocks, which are permuted once for all of them
    calls = max(1, min(_CALLS, _KEYS // (order.streams * order.block))) if whole > _BATCHES else 1
    at_once = max(1, min(whole, _BATCHES) // calls)
    met = looked_at = 0
    for first in np.unique(np.linspace(0, whole - at_once, calls).astype(np.int64)).tolist():
        draws = np.arange(first * batch, (first + at_once) * batch, dtype=np.int64)
        shard, index = order.locate(draws)
        by_place = np.lexsort((index, shard, draws // batch))
        shard, index, number = shard[by_place], index[by_place], (draws // batch)[by_place]
        beside = (shard[1:] == shard[:-1]) & (index[1:] == index[:-1] + 1) & (number[1:] == number[:-1])
        met += int(beside.sum())
        looked_at += at_once * batch
    return Mixing(batch, streams, block, met * (total / looked_at) / pairs, (batch - 1) / max(total - 1, 1))


def enough_block(manifest: HasSizes, mixing: Mixing) -> int | None:
    """The smallest power of two for ``block`` that mixes these shards; None where none up to 65,536 does.

    A batch takes ``m = batch / streams`` samples of a block: neighbours meet with ``(m − 1) / (block − 1)``. An epoch
    of at most ``streams × block`` samples is one permutation.
    """
    total = int(np.asarray(manifest.sizes, np.int64).sum())
    allowed = _MOST_TIMES * mixing.perfect_rate
    block = 1 << mixing.block.bit_length()
    while block <= _LARGEST_BLOCK:
        meeting = max(mixing.batch / mixing.streams - 1, 0) / (block - 1)
        if meeting <= allowed or total <= mixing.streams * block:
            return block
        block *= 2
    return None


def describe_mixing(
    manifest: HasSizes,
    *,
    batch: int,
    streams: int = 64,
    block: int = 256,
    seed: int = 0,
    alike: tuple[float, float] | None = None,
) -> tuple[dict[str, Any], list[str]]:
    """(facts for JSON, lines for the user): how often neighbours meet, and what to do where that is too often.

    ``alike``: how often neighbours are of one group, and how often any two samples are; None: not known.
    """
    mixing = measure_mixing(manifest, batch=batch, streams=streams, block=block, seed=seed)
    lines = [
        f"mixing (batch {mixing.batch}, {streams} streams, block {block}): neighbours of a shard meet in one batch "
        f"{_percent(mixing.rate)} of the time, in a perfect shuffle {_percent(mixing.perfect_rate)}: "
        f"{mixing.times:.3g} times as often"
    ]
    if alike is not None:
        lines.append(
            f"neighbours are of one group {_percent(alike[0])} of the time, any two samples {_percent(alike[1])}"
        )
    facts = asdict(mixing) | {"times": mixing.times, "enough_block": None, "reshard": False}
    if mixing.mixed:
        return facts, lines
    if alike is not None and alike[0] <= _MOST_TIMES * alike[1] + _FEW:
        return facts, [*lines, "neighbours are no more alike than any two samples: nothing to do"]
    enough = enough_block(manifest, mixing)
    raising = f", or set data.block={enough}, which mixes them as they are" if enough is not None else ""
    doubt = "" if alike is not None else "if neighbours are alike (clips of one film), "
    advice = f"{doubt}write them anew in random order: mmcl shards reshard --shuffle 0 …{raising}"
    return {**facts, "enough_block": enough, "reshard": True}, [*lines, advice]


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"
