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


_SLOW = ["model.towers.video.depth=[1, 1, 1, 1]", "model.towers.video.channels=8", "model.towers.video.size=64"]
_CLIP_TEXT = "model.towers.text.config={layers: 1}"
_CLIP = ["model.towers.video.config={layers: 1}", _CLIP_TEXT]
PAPERS = {
    "image_text": (["model.towers.image.config={layers: 1}", _CLIP_TEXT], "pictures", "1 × 3 × 224 × 224"),
    "clip_video": (_CLIP, "films", "12 × 3 × 224 × 224"),
    "tri_modal": ([*_CLIP, "model.towers.audio.depths=[1, 1]", "model.towers.audio.seconds=1"], "films", "16000"),
    "tcl_video": (
        [
            "model.towers.video.depth=[1, 1, 1, 1]",
            "model.towers.text.config.num_hidden_layers=1",
            "objectives.0.fusion.layers=1",
            "objectives.0.queue=64",
        ],
        "films",
        "16 × 3 × 224 × 224",
    ),
    "ccl_ucf101": (["model.towers.image.size=64"], "taught", "16 × 3 × 112 × 112"),
    **{
        f"rho_{method}_slow_r50": ([*_SLOW, *more], "films", "8 × 3 × 64 × 64")
        for method, more in {
            "moco": ["objectives.0.method.queue=64"],
            "byol": [],
            "simclr": [],
            "swav": [],
        }.items()
    },
}
"""recipe of a paper: what makes it small enough to be built, which shards it reads, what its first batch is"""
