"""A launched run on two ranks, one of which loses a decoding worker: it ends well, and one sample is missing for it."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path

import pytest
from support.recipes import tiny_config, tiny_overrides
from support.watched_run import launch_watched

from mmcl.data import ClipStream
from mmcl.media.text import ByteTokenizer
from mmcl.shards import load_manifest
from mmcl.types import TextSpec, View

pytestmark = pytest.mark.slow

SAMPLES, BATCH, EPOCHS = 16, 4, 3
TIMEOUT_SECONDS = 4.0


def order_of(folder: Path, seed: int) -> list[str]:
    """Keys by draw, of all epochs."""
    views = (View(TextSpec(ByteTokenizer(32))),)
    source = ClipStream(load_manifest(folder), views, global_batch=BATCH, seed=seed, in_process=True)
    return [key for batch in itertools.islice(iter(source), EPOCHS * SAMPLES // BATCH) for key in batch.keys]


@pytest.mark.parametrize(("fate", "reason"), [("SIGKILL", "worker_died"), ("SIGSTOP", "worker_hung")])
def test_a_run_on_two_ranks_loses_one_sample(shards_folder: Path, tmp_path: Path, fate: str, reason: str) -> None:
    folder = shards_folder / "train"
    order = order_of(folder, tiny_config().train.seed)
    epochs = [order[start : start + SAMPLES] for start in range(0, len(order), SAMPLES)]
    # of the second batch, and in the next epoch another rank's: it has to know as well
    draw = next(d for d in range(BATCH, 2 * BATCH) if (epochs[1].index(order[d]) - d) % 2)
    victim = order[draw]

    overrides = tiny_overrides(shards=folder, out=tmp_path / "run")
    overrides += ["data.in_process=false", "data.workers=1", f"data.timeout_seconds={TIMEOUT_SECONDS}"]
    overrides += [f"train.global_batch={BATCH}", f"train.steps={len(order) // BATCH}"]
    overrides += ["train.log_every=1", "train.checkpoint_every=2"]
    ranks = launch_watched(tmp_path / "given", *overrides, fates={victim: fate})

    (record,) = map(json.loads, (tmp_path / "run/quarantine.jsonl").read_text().splitlines())
    assert (record["key"], record["draw"], record["rank"], record["reason"]) == (victim, draw, draw % 2, reason)
    given: list[str | None] = [None] * len(order)
    for rank, batches in enumerate(ranks):
        for step, batch in enumerate(batches):
            assert batch["draws"] == list(range(step * BATCH + rank, (step + 1) * BATCH, 2))
            named = {draw: key for draw, key, reason, _ in batch["skipped"] if reason == "quarantined"}
            for position, key in zip(batch["draws"], batch["keys"], strict=True):
                given[position] = key or f"skipped {named[position]}"
            if step > 1:
                assert batch["quarantine"] == [victim], f"rank {rank}, step {step}"
    assert given == [f"skipped {key}" if key == victim else key for key in order]
    checkpoints = sorted((tmp_path / "run/checkpoints").glob("step_*"))
    assert checkpoints[-1].name == f"step_{len(order) // BATCH:08d}"
    for checkpoint in checkpoints:
        assert json.loads((checkpoint / "state.json").read_text())["stream"]["quarantine"] == [victim]
    skipped = [json.loads(line) for line in (tmp_path / "run/skipped.jsonl").read_text().splitlines()]
    assert Counter((entry["key"], entry["reason"]) for entry in skipped) == {(victim, "quarantined"): EPOCHS}
