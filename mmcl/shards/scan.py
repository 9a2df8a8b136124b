"""A function over samples of a manifest, each call in a child process that may crash or hang."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from mmcl.shards.manifest import Manifest
from mmcl.shards.pool import Lost, run_jobs
from mmcl.shards.reader import ShardReader
from mmcl.types import ConfigError

Place: TypeAlias = tuple[int, int]
"""(shard, index in the shard)"""


@dataclass(frozen=True, slots=True)
class _Task:
    function: Callable[[ShardReader, int, int], Any]
    reader: ShardReader

    def __call__(self, place: Place) -> Any:
        return self.function(self.reader, *place)


def scan(
    manifest: Manifest,
    function: Callable[[ShardReader, int, int], Any],
    places: Sequence[Place],
    *,
    workers: int | None = None,
    timeout_seconds: float = 120.0,
) -> Iterator[tuple[Place, Any | Lost]]:
    """``function(reader, shard, index)`` for each place, in order; ``Lost`` where its process died or took too long.

    ``function`` is importable (a ``functools.partial`` of such a one is) and returns something small.
    """
    check_positive(workers=workers, timeout_seconds=timeout_seconds)
    results = run_jobs(
        _Task(function, ShardReader(manifest)),
        places,
        workers=workers or cores(),
        timeout_seconds=timeout_seconds,
        preload="mmcl.shards.check",
    )
    with contextlib.closing(results):
        yield from zip(places, results, strict=True)


def choose_places(manifest: Manifest, count: int | None = None, seed: int = 0) -> list[Place]:
    """All samples, or ``count`` different ones drawn at random, in the order of the manifest."""
    total = manifest.num_samples
    if count is None or count >= total:
        return [(shard, index) for shard, size in enumerate(manifest.sizes.tolist()) for index in range(size)]
    check_positive(sample=count)
    drawn = np.sort(np.random.default_rng(seed).choice(total, count, replace=False))
    ends = np.cumsum(manifest.sizes)
    shards = np.searchsorted(ends, drawn, side="right")
    indices = drawn - (ends[shards] - manifest.sizes[shards])
    return list(zip(shards.tolist(), indices.tolist(), strict=True))


def check_positive(**values: float | None) -> None:
    """Raises ``ConfigError`` on a number that is not above 0; None is no number."""
    for name, value in values.items():
        if value is not None and not value > 0:
            raise ConfigError(f"{name}={value}: more than 0")


def cores() -> int:
    """Those this process may use, where the system tells."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
