"""What a run logs of embeddings, gradients, memory and skips, and the alarm for a collapse; on any number of ranks."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from support.recipes import tiny_config
from support.shards import read_shards, write_shards

from mmcl.distributed import Comm
from mmcl.evaluation.diagnostics import effective_rank
from mmcl.losses import alignment, uniformity
from mmcl.recipe import CollapseOptions
from mmcl.training.launch import pretrain
from mmcl.training.processes import build_accelerator
from mmcl.training.trainer import Trainer
from mmcl.training.watching import CollapseAlarm, embedding_figures, gradient_norms
from mmcl.types import AudioSpec, Batch, Embeddings, TextSpec, View, ViewBatch


def seen(rows: torch.Tensor, others: torch.Tensor, present: torch.Tensor) -> Embeddings:
    """A tower with joint rows, and one that has nothing before the joint space but what is pooled."""
    count = len(rows)
    first, second = View(AudioSpec()), View(TextSpec("bytes"))
    views = {
        first: ViewBatch(torch.zeros(count, 1), torch.ones(count, dtype=torch.bool)),
        second: ViewBatch(torch.zeros(count, 1), present),
    }
    numbers = torch.arange(count)
    batch = Batch(views, ("key",) * count, numbers, numbers[:, None], numbers)
    values = {
        ("audio", first, "pooled", "online"): 7 * rows,
        ("audio", first, "joint", "online"): rows,
        ("audio", first, "joint", "momentum"): -rows,
        ("text", second, "pooled", "online"): 3 * others,
    }
    return Embeddings(values, batch)


def test_figures_are_those_of_present_unit_rows() -> None:
    torch.manual_seed(0)
    rows, others = F.normalize(torch.randn(40, 8), dim=1), torch.randn(40, 8)
    present = torch.arange(40) < 30
    found = embedding_figures(seen(rows, others, present), Comm())
    texts = F.normalize(others, dim=1)[present]
    wanted = {
        "std/audio": float(rows.std(0).mean()) * 8**0.5,
        "std/text": float(texts.std(0).mean()) * 8**0.5,
        "effective_rank/audio": effective_rank(rows),
        "effective_rank/text": effective_rank(texts),
        "uniformity/audio": float(uniformity(rows)),
        "uniformity/text": float(uniformity(texts)),
        "alignment/audio-text": float(alignment(rows[present], texts)),
    }
    assert found == pytest.approx(wanted)
    assert found["std/audio"] == pytest.approx(1, abs=0.1) and found["effective_rank/audio"] > 7


def test_rows_that_are_not_finite_have_no_figures() -> None:
    """A step that is skipped may be one that is logged."""
    rows, present = F.normalize(torch.randn(12, 8), dim=1), torch.ones(12, dtype=torch.bool)
    rows[3, 5] = math.nan
    found = embedding_figures(seen(rows, rows, present), Comm())
    assert len(found) == 7 and all(math.isnan(value) for value in found.values())


def test_fewer_rows_than_numbers_have_the_same_rank() -> None:
    rows = F.normalize(torch.randn(5, 64, generator=torch.Generator().manual_seed(1)), dim=1)
    found = embedding_figures(seen(rows, rows, torch.ones(5, dtype=torch.bool)), Comm())
    assert found["effective_rank/audio"] == pytest.approx(effective_rank(rows), rel=1e-6)


def test_a_collapse_is_said_once_after_some_logs_in_a_row() -> None:
    alarm = CollapseAlarm(CollapseOptions(std=0.1, effective_rank=2.0, logs=3))
    low, good = {"std/video": 0.05, "std/audio": 1.0, "loss": 0.0}, {"std/video": 0.5}
    said = [alarm.lines(step, low) for step in range(1, 6)]
    assert [len(lines) for lines in said] == [0, 0, 1, 0, 0]
    assert said[2][0] == (
        "step 3: the embeddings of tower 'video' collapse: std/video is 0.05, below 0.1 (train.collapse.std) "
        "in 3 logged steps in a row"
    )
    assert not alarm.lines(6, good)
    assert [len(alarm.lines(step, {"effective_rank/video": 1.0, **low})) for step in (7, 8, 9)] == [0, 0, 2]
    assert not CollapseAlarm(CollapseOptions(std=0.0, logs=1)).lines(1, low)  # 0 is never


@pytest.fixture(scope="module")
def torn_shards(shards_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One of sixteen samples has a video that is none."""
    samples = read_shards(shards_folder / "train")
    members = samples[sorted(samples)[3]]
    members[next(name for name in members if name.endswith("mp4"))] = b"nothing to see"
    folder = tmp_path_factory.mktemp("torn")
    write_shards(folder, samples, max_count=5)
    return folder


def test_a_run_logs_them_on_logged_steps_alone(
    torn_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = []
    norms = gradient_norms
    monkeypatch.setattr("mmcl.training.trainer.gradient_norms", lambda model: calls.append(1) or norms(model))
    config = tiny_config(
        "train.steps=5",
        "train.log_every=2",
        "train.global_batch=8",
        "train.collapse={std: 5.0, logs: 2}",
        "data.max_skipped_rate=1.0",
        shards=torn_shards,
        out=tmp_path / "run",
    )
    pretrain(config)
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 5] and len(calls) == 3
    for name in ("std", "effective_rank", "uniformity", "grad_norm"):
        for tower in ("video", "audio", "text"):
            assert math.isfinite(lines[-1][f"{name}/{tower}"])
    assert {"alignment/video-text", "temperature/video-text", "memory_bytes"} <= lines[-1].keys()
    parts = [lines[0][f"grad_norm/{tower}"] for tower in ("video", "audio", "text")]
    assert 0.5 < math.hypot(*parts) / lines[0]["grad_norm"] <= 1.0001  # the rest are temperatures
    assert lines[0]["memory_bytes"] > 1e8
    assert [line["eta_seconds"] > 0 for line in lines] == [True, True, False]
    reasons = {name: value for name, value in lines[-1].items() if name.startswith("skipped/")}
    assert sum(reasons.values()) == lines[-1]["skipped"] >= 2 and len(reasons) == 1
    state = json.loads((tmp_path / "run/checkpoints/step_00000005/state.json").read_text())
    assert {f"skipped/{name}": count for name, count in state["progress"]["skipped_by"].items()} == reasons
    error = capsys.readouterr().err
    assert error.count("the embeddings of tower") == 3 and "step 4: the embeddings of tower 'video' collapse" in error


def test_looking_changes_no_loss(shards_folder: Path, tmp_path: Path) -> None:
    """Nor a gradient, with and without the gradient cache."""
    for more in ((), ("train.micro_batch=4",)):
        config = tiny_config("train.global_batch=8", *more, shards=shards_folder / "train", out=tmp_path / "run")
        found = []
        for watching in (False, True):
            trainer = Trainer(config, build_accelerator(config))
            trainer.step.watching = watching
            figures = trainer.optimizer_step([next(iter(trainer.stream))])
            found.append((figures["loss"], [p.detach().clone() for p in trainer.model.parameters()]))
            assert (trainer.step.seen is not None) == watching
        assert torch.equal(found[0][0], found[1][0])
        assert all(torch.equal(a, b) for a, b in zip(found[0][1], found[1][1], strict=True))
