"""A decoding worker that dies or stands still costs one sample, which is named; nothing else is lost or repeated."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from support.recipes import tiny_config

from mmcl.data import ClipStream
from mmcl.data.collate import Value, pack, unpack
from mmcl.data.health import append_quarantine, read_quarantine
from mmcl.data.journal import NAME_BYTES, Journal, Note
from mmcl.data.views import ViewMaker
from mmcl.media.text import ByteTokenizer
from mmcl.shards import load_manifest
from mmcl.shards.index import index_shards
from mmcl.shards.members import Sample
from mmcl.types import AudioSpec, Batch, RunError, TextSpec, VideoSpec, View

VIEWS = (
    View(VideoSpec(frames=2, size=32, fps=4.0)),
    View(AudioSpec(sample_rate_hz=16_000, seconds=0.25)),
    View(TextSpec(ByteTokenizer(32))),
)
EPOCH = 4
"""batches of 4 in 16 samples"""


@dataclass(frozen=True)
class Deadly(ViewMaker):
    """Decodes as ever, but on some keys its process is killed, stopped for ever, or meets a mistake of ours."""

    fates: Mapping[str, str] = field(default_factory=dict)

    def __call__(self, sample: Sample, *, epoch: int) -> tuple[dict[View, Value], str]:
        fate = self.fates.get(sample.key)
        if fate in ("SIGKILL", "SIGSEGV", "SIGSTOP"):
            os.kill(os.getpid(), getattr(signal, fate))
        if fate == "mistake":
            raise RuntimeError("a mistake in our own code")
        return super().__call__(sample, epoch=epoch)


def stream(folder: Path, fates: Mapping[str, str] | None = None, **options: object) -> ClipStream:
    options = {"global_batch": 4, "seed": 3, "workers": 1, "decoder": "pyav", "timeout_seconds": 60.0, **options}
    source = ClipStream(load_manifest(str(folder)), VIEWS, **options)  # type: ignore[arg-type]
    source.plan = replace(source.plan, maker=Deadly(VIEWS, seed=3, decoder="pyav", fates=fates or {}))
    return source


def take(source: ClipStream, count: int) -> list[Batch]:
    return list(itertools.islice(iter(source), count))


def keys_of(batches: list[Batch]) -> list[str]:
    return [key for batch in batches for key in batch.keys]


@pytest.fixture(scope="module")
def train(shards_folder: Path) -> Path:
    return shards_folder / "train"


@pytest.fixture(scope="module")
def clean(train: Path) -> list[Batch]:
    """Two epochs without trouble."""
    return take(stream(train, in_process=True), 2 * EPOCH)


def assert_only_missing(batches: list[Batch], clean: list[Batch], missing: set[str], rank: int, world: int) -> None:
    """Row for row what an untroubled stream gives, but for holes where ``missing`` would be."""
    for batch, whole in zip(batches, clean, strict=True):
        wanted = whole.keys[rank::world]
        assert batch.keys == tuple("" if key in missing else key for key in wanted)
        named = {(key, reason) for _, key, reason, _ in batch.skipped}
        assert named == {(key, "quarantined") for key in wanted if key in missing}
        for view in VIEWS[:2]:
            good = torch.tensor([key not in missing for key in wanted])
            assert torch.equal(batch.views[view].data[good], whole.views[view].data[rank::world][good])
            assert not batch.views[view].data[~good].any()


@pytest.mark.parametrize(
    ("world", "workers", "fate"), [(1, 1, "SIGKILL"), (1, 2, "SIGSEGV"), (2, 1, "SIGSTOP"), (2, 2, "SIGKILL")]
)
def test_a_lost_worker_costs_its_sample_alone(
    train: Path, clean: list[Batch], tmp_path: Path, world: int, workers: int, fate: str
) -> None:
    """Two samples in the middle of an epoch end their worker; two epochs are read over it."""
    order = keys_of(clean)
    fates = {order[6]: fate, order[11]: "SIGKILL"}
    quarantined: set[str] = set()
    for rank in range(world):
        file = tmp_path / "run" / "quarantine.jsonl"
        source = stream(
            train,
            fates,
            rank=rank,
            world_size=world,
            workers=workers,
            quarantine_file=file,
            timeout_seconds=1.5 if fate == "SIGSTOP" else 60.0,
        )
        source.add_quarantine(quarantined)
        batches = take(source, 2 * EPOCH)
        quarantined |= source.quarantine
        mine = {key for batch in clean[:EPOCH] for key in batch.keys[rank::world]} & fates.keys()
        assert mine <= source.quarantine
        assert_only_missing(batches, clean, set(fates) & quarantined, rank, world)
        assert source.draws == 2 * EPOCH * 4
        assert source.state_dict()["quarantine"] == sorted(quarantined)
    records = {record["key"]: record for record in map(json.loads, file.read_text().splitlines())}
    assert records.keys() == fates.keys() == read_quarantine(file)
    first = records[order[6]]
    assert first["draw"] == 6
    assert first["reason"] == ("worker_hung" if fate == "SIGSTOP" else "worker_died")
    assert ("1.5 s (data.timeout_seconds)" if fate == "SIGSTOP" else fate) in first["detail"]
