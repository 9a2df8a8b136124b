"""Evaluation and figures of a run on two ranks are those of one."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from support.launched import CPU_2, PRETRAIN, arguments, finish


@pytest.mark.slow
def test_two_ranks_evaluate_as_one(shards_folder: Path, tmp_path: Path) -> None:
    places = (f"evaluate.shards={shards_folder / 'test'}", "evaluate.every_steps=2", "evaluate.max_share=1.0")
    more = (*places, "evaluate.workers=0", "train.steps=4", "train.ema={decay: 0.5}")
    records = []
    for name, start in (("one", [sys.executable]), ("two", CPU_2)):
        out = tmp_path / name
        finish([*start, PRETRAIN, *arguments(shards_folder, out, *more)])
        records.append([json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()])
    for one, two in zip(*records, strict=True):
        timed = ("seconds", "samples_per", "data_wait", "memory_")
        assert one.keys() == two.keys()
        for name in (name for name in one if not any(part in name for part in timed)):
            assert two[name] == pytest.approx(one[name], rel=2e-3, abs=2e-4), (one["step"], name)
    assert [("eval/mean_R@1" in record) for record in records[1]] == [False, True, False, True]
    left, right = (load_file(tmp_path / n / "checkpoints/step_00000004/ema/model.safetensors") for n in ("one", "two"))
    for name, value in left.items():
        assert (value - right[name]).abs().max() < 1e-3, name
