"""Whether shards hold labels, before a run that learns from them begins."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from mmcl.shards.manifest import Manifest
from mmcl.shards.members import parse_sample
from mmcl.shards.reader import ShardReader
from mmcl.types import SampleError

LOOKS = 64
"""samples of each source that are looked at, evenly spread over its shards"""


@dataclass(frozen=True, slots=True)
class LabelsFound:
    """What some samples hold."""

    samples: int
    """looked at, those that could be read"""
    highest: int
    """label; −1: none has one"""
    extensions: tuple[str, ...]
    """of their files"""


def look_for_labels(manifests: Sequence[Manifest], looks: int = LOOKS) -> LabelsFound:
    """Reads some samples of each manifest, all of a small one, without decoding anything."""
    samples, highest = 0, -1
    extensions: set[str] = set()
    for manifest in manifests:
        reader, ends = ShardReader(manifest), np.cumsum(manifest.sizes)
        for number in np.unique(np.linspace(0, max(manifest.num_samples - 1, 0), looks).astype(np.int64)).tolist():
            if number >= manifest.num_samples:
                continue
            shard = int(np.searchsorted(ends, number, side="right"))
            with suppress(SampleError):  # a hole of the run, which counts it
                raw = reader.read(shard, number - int(ends[shard] - manifest.sizes[shard]))
                extensions |= raw.members.keys()
                label = parse_sample(raw).label
                samples, highest = samples + 1, max(highest, -1 if label is None else label)
    return LabelsFound(samples, highest, tuple(sorted(extensions)))
