"""A run small enough for a test: three towers, seconds on one core."""

from __future__ import annotations

from pathlib import Path

import mmcl
from mmcl.recipe import RunConfig

ROOT = Path(__file__).parents[2]
TINY = ROOT / "configs/pretrain/tiny_cpu.yaml"

SMALL = [
    "model.towers.video.frames=2",
    "model.towers.video.width=32",
    "model.towers.audio.width=32",
    "model.towers.audio.seconds=0.5",
    "model.towers.text.width=32",
    "objectives.0.pairs=[[video, text], [audio, text], [video, audio]]",
    "data.decoder=pyav",
    "data.in_process=true",
    "train.threads=1",
]


def tiny_overrides(*overrides: str, shards: Path | None = None, out: Path | None = None) -> list[str]:
    """What turns ``configs/pretrain/tiny_cpu.yaml`` into a run of a test."""
    places = ([f"data.shards={shards}"] if shards else []) + ([f"train.out={out}"] if out else [])
    return [*SMALL, *places, *overrides]


def tiny_config(*overrides: str, shards: Path | None = None, out: Path | None = None) -> RunConfig:
    return mmcl.load_config(TINY, tiny_overrides(*overrides, shards=shards, out=out))
