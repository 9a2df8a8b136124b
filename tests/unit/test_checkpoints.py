"""Checkpoints are written while the run goes on; the best stays, a full disk costs one, changed recipes are seen."""

from __future__ import annotations

import errno
import json
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.recipes import tiny_config

from mmcl.config import to_yaml
from mmcl.distributed import Comm
from mmcl.hub import ModelFiles
from mmcl.recipe import BestOptions, RunConfig
from mmcl.training import snapshot as snapshots
from mmcl.training.changes import check_unchanged
from mmcl.training.checkpoint import best_checkpoint, complete_checkpoints, find_checkpoint, write_checkpoint
from mmcl.training.launch import pretrain
from mmcl.training.run_folder import RunFolder
from mmcl.training.saving import Saver
from mmcl.training.snapshot import Snapshot, git_commit, host_copy
from mmcl.training.trainer import Trainer
from mmcl.types import ConfigError, RunError


def config(shards: Path, out: Path, *overrides: str) -> RunConfig:
    few = ("train.steps=8", "train.log_every=1", "train.checkpoint_every=2", "train.global_batch=8")
    return tiny_config(*few, *overrides, shards=shards / "train", out=out)


def small(step: int, loss: float = 1.0) -> Snapshot:
    state = {"metrics": {"loss": loss}}
    return Snapshot(step, "a: 1\n", state, ModelFiles({}, {}, {}), {"model": {"w": torch.full((3,), float(step))}}, {})


def test_a_snapshot_is_written_while_the_run_goes_on_one_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on, written = threading.Event(), []
    write = Snapshot.write

    def slow(self: Snapshot, folder: Path) -> None:
        assert go_on.wait(20)
        write(self, folder)
        written.append(self.step)

    monkeypatch.setattr(Snapshot, "write", slow)
    options = tiny_config("train.keep_checkpoints=3").train
    with RunFolder(tmp_path) as folder, Saver(folder, options, Comm(), sharded=False) as saver:
        saver.save(small(1), last=False)
        assert not written and find_checkpoint(tmp_path) is None, "the caller does not wait"
        assert not (tmp_path / "checkpoints/latest").exists(), "nothing is the latest before it is whole"
        threading.Timer(0.2, go_on.set).start()
        saver.save(small(2), last=False)
        assert written[0] == 1, "the second waits for the first"
        saver.save(small(3), last=True)
        assert written == [1, 2, 3]
    assert (tmp_path / "checkpoints/latest").read_text().strip() == "step_00000003"


def test_a_snapshot_shares_no_memory_with_the_run() -> None:
    tensor = torch.ones(3)
    copied = host_copy({"a": [tensor, 1], "b": (tensor,)})
    tensor.zero_()
    assert copied["a"][0].tolist() == copied["b"][0].tolist() == [1, 1, 1]


def test_the_best_one_stays(tmp_path: Path) -> None:
    for step, loss in enumerate((3.0, 1.0, float("nan"), 2.0, 1.5), 1):
        write_checkpoint(tmp_path, step, small(step, loss).write, keep=2, best=BestOptions())
    assert [folder.name[-1] for folder in complete_checkpoints(tmp_path)] == ["2", "4", "5"]
    assert best_checkpoint(tmp_path) == tmp_path / "step_00000002"
    write_checkpoint(tmp_path, 6, small(6, 0.5).write, keep=2, best=BestOptions())
    assert [folder.name[-1] for folder in complete_checkpoints(tmp_path)] == ["5", "6"]
    write_checkpoint(tmp_path, 7, small(7, 9.0).write, keep=1, best=BestOptions(mode="max"))
    assert best_checkpoint(tmp_path) == tmp_path / "step_00000007"


def test_a_run_keeps_its_best_and_says_what_it_was_made_with(
    shards_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    best = "train.best={metric: learning_rate, mode: max}"
    pretrain(config(shards_folder, tmp_path / "run", best, "train.keep_checkpoints=1"))
    rates = [json.loads(line)["learning_rate"] for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    highest = max((2, 4, 6, 8), key=lambda step: rates[step - 1])
    assert 2 < highest < 8
    kept = [folder.name for folder in complete_checkpoints(tmp_path / "run/checkpoints")]
    assert kept == [f"step_{highest:08d}", "step_00000008"]
    state = json.loads((tmp_path / "run/checkpoints/step_00000008/state.json").read_text())
    assert {"mmcl", "torch", "accelerate", "python", "commit", "world_size", "progress", "stream"} <= state.keys()
    assert state["commit"] is None or len(state["commit"].split("-")[0]) == 40
    assert state["metrics"]["learning_rate"] == rates[-1]
    pretrain(config(shards_folder, tmp_path / "other", "train.best={metric: recall}", "train.steps=2"))
    assert "'recall' is not among what was logged so far" in capsys.readouterr().out


def test_a_run_needs_no_git(monkeypatch: pytest.MonkeyPatch) -> None:
    git_commit.cache_clear()
    monkeypatch.setenv("PATH", "/nowhere")
    assert git_commit() is None
    git_commit.cache_clear()


def test_minutes_count_too(shards_folder: Path, tmp_path: Path) -> None:
    """By the clock, whatever the steps."""
    pretrain(config(shards_folder, tmp_path / "run", "train.checkpoint_every=1000", "train.checkpoint_minutes=1e-6"))
    names = [folder.name for folder in complete_checkpoints(tmp_path / "run/checkpoints")]
    assert names == ["step_00000007", "step_00000008"]


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(place)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"no right to mount a small disk here: {done.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


def fill(path: Path) -> None:
    """Writes until the disk is full, to the last byte."""
    with path.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError as error:
            assert error.errno == errno.ENOSPC


def test_a_full_disk_costs_checkpoints_and_lines_not_the_run(
    shards_folder: Path, tiny_disk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Full in steps 4 to 6, to the last byte: what was there stays whole, what comes after is there again."""
    step, out = Trainer.optimizer_step, tiny_disk / "run"

    def disk_fills(self: Trainer, batches: list) -> object:
        if self.progress.step == 3:
            while find_checkpoint(out) is None:
                time.sleep(0.01)
            fill(tiny_disk / "filler")
        if self.progress.step == 6:
            while "checkpoint of step 6 not written" not in said():
                time.sleep(0.01)
            assert find_checkpoint(out) == out / "checkpoints/step_00000002"
            (tiny_disk / "filler").unlink()
        return step(self, batches)

    heard: list[str] = []

    def said() -> str:
        heard.append(capsys.readouterr().out)
        return "".join(heard)

    monkeypatch.setattr(Trainer, "optimizer_step", disk_fills)
    pretrain(config(shards_folder, out, "train.keep_checkpoints=1"))
    for taken in (4, 6):
        assert f"checkpoint of step {taken} not written: " in said()
    assert said().count("metrics.jsonl cannot be written: No space left on device; the run goes on without") == 1
    assert find_checkpoint(out) == out / "checkpoints/step_00000008"
    steps = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert steps[:3] == [1, 2, 3] and steps[-2:] == [7, 8]


def test_a_last_checkpoint_that_is_not_there_is_an_error(
    shards_folder: Path, tiny_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Trainer.optimizer_step

    def disk_fills(self: Trainer, batches: list) -> object:
        if self.progress.step == 7:
            fill(tiny_disk / "filler")
        return step(self, batches)

    monkeypatch.setattr(Trainer, "optimizer_step", disk_fills)
    with pytest.raises(RunError, match="step 8, the last one, was not written"):
        pretrain(config(shards_folder, tiny_disk / "run", "train.checkpoint_every=1000"))


def test_changes_are_shown_and_let_through_by_name(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(to_yaml(tiny_config()))
    check_unchanged(tmp_path, tiny_config("train.log_every=7", "train.out=elsewhere", "data.workers=3"))
    other = tiny_config("train.optimizer.learning_rate=1e-2", "model.towers.text.depth=3", "train.seed=4")
    with pytest.raises(
        ConfigError, match=r"learning_rate: 0\.003 → 0\.01.*--allow model\.towers\.text\.depth"
    ) as refused:
        check_unchanged(tmp_path, other, allow=["train.seed"])
    assert "train.seed" not in str(refused.value)
    lines = check_unchanged(tmp_path, other, allow=["train", "model.towers"])
    assert sorted(lines) == [
        "model.towers.text.depth: 1 → 3",
        "train.optimizer.learning_rate: 0.003 → 0.01",
        "train.seed: 0 → 4",
    ]
    with pytest.raises(ConfigError):
        check_unchanged(tmp_path, other, allow=["train", "model.towers.t"])


def test_random_states_of_other_ranks_serve_where_there_are_more(tmp_path: Path) -> None:
    states = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        states.append(snapshots.random_state()["cpu"])
    from safetensors.torch import save_file

    save_file({"cpu": torch.stack(states)}, tmp_path / "random.safetensors")
    snapshots.load_random_state(tmp_path, 3)
    assert torch.equal(torch.get_rng_state(), states[1])
    assert load_file(tmp_path / "random.safetensors")["cpu"].dtype == torch.uint8
