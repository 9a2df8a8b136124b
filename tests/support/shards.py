"""Shards made from the generated media."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest


def write_shards(folder: Path, samples: Mapping[str, Mapping[str, bytes]], *, max_count: int = 1_000):
    """Indexed shards of samples given as key -> extension -> content; returns the manifest."""
    from mmcl.shards import ShardWriter, write_manifest

    with ShardWriter(folder, max_count=max_count) as writer:
        for key, members in samples.items():
            writer.write(key, members)
    return write_manifest(folder, writer.entries)


def read_shards(folder: Path) -> dict[str, dict[str, bytes]]:
    """What ``write_shards`` wrote, in order."""
    from mmcl.shards import ShardReader, load_manifest

    reader = ShardReader(load_manifest(folder))
    raws = [reader.read(shard, index) for shard, size in enumerate(reader.manifest.sizes) for index in range(size)]
    return {raw.key: {name: bytes(data) for name, data in raw.members.items()} for raw in raws}


@pytest.fixture(scope="session")
def shards_folder(media_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``train/`` (16 samples) and ``test/`` (8) made from ``media_folder``, 5 samples per shard."""
    from mmcl.shards import MakeOptions, make_shards

    out = tmp_path_factory.mktemp("shards")
    make_shards(media_folder / "clips.csv", out, MakeOptions(max_count=5, workers=2))
    return out
