"""Shards made from the generated media."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shards_folder(media_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``train/`` (16 samples) and ``test/`` (8) made from ``media_folder``, 5 samples per shard."""
    from mmcl.shards import MakeOptions, make_shards

    out = tmp_path_factory.mktemp("shards")
    make_shards(media_folder / "clips.csv", out, MakeOptions(max_count=5, workers=2))
    return out
