"""Real launches: many processes equal one, and a run that was killed goes on bit for bit."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.launched import ACCELERATE, CPU_2, PRETRAIN, finish, started, steps_logged
from support.recipes import ROOT, TINY, tiny_overrides

from mmcl import load_config
from mmcl.model import MultimodalModel
from mmcl.training.launch import pretrain

STEPS = 20


def command(processes: int, *overrides: str) -> list[str]:
    """The run on so many processes, as a user launches it."""
    launcher = [*CPU_2, "--num_processes", str(processes)] if processes > 1 else [sys.executable]
    return [*launcher, PRETRAIN, str(TINY), *overrides]


def overrides(shards: Path, out: Path, *more: str) -> list[str]:
    common = (f"train.steps={STEPS}", "train.global_batch=12", "train.log_every=1", "train.checkpoint_every=5")
    return tiny_overrides(*common, *more, shards=shards / "train", out=out)


def launch(processes: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    return finish(command(processes, *arguments))


def losses(out: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "checkpoints" / f"step_{STEPS:08d}" / "model.safetensors")


def assert_same_weights(left: Path, right: Path) -> None:
    a, b = weights(left), weights(right)
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.fixture(scope="module")
def alone(shards_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In this process, which spares a start."""
    out = tmp_path_factory.mktemp("alone") / "run"
    pretrain(load_config(TINY, overrides(shards_folder, out)))
    return out


@pytest.fixture(scope="module")
def two(shards_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("two") / "run"
    done = launch(2, *overrides(shards_folder, out, "train.processes=2"))
    assert "on 2 process(es) (cpu)" in done.stdout
    return out


def test_two_processes_equal_one(alone: Path, two: Path) -> None:
    """The same losses to 1e-4, temperature and all; the holes of silent clips fall unevenly on the ranks."""
    one, both = losses(alone), losses(two)
    assert len(one) == len(both) == STEPS
    for step, (a, b) in enumerate(zip(one, both, strict=True), 1):
        assert abs(a - b) <= 1e-4 * abs(a), f"step {step}: {a} and {b}"


def kill_when(shards: Path, out: Path, processes: int, moment: str) -> None:
    """Starts a run and kills all its processes without warning before, in, or after a save."""
    checkpoints, deadline = out / "checkpoints", time.monotonic() + 120
    with started(command(processes, *overrides(shards, out)), out.parent / "log") as process:
        while time.monotonic() < deadline and process.poll() is None:
            names = {path.name for path in checkpoints.iterdir()} if checkpoints.exists() else set()
            logged = steps_logged(out)
            if moment == "before a save" and logged >= 3:
                break
            if moment == "in a save" and any(name.endswith(".partial") for name in names) and logged >= 5:
                break
            if moment == "after a save" and "step_00000010" in names:
                break
            time.sleep(0.0005)
        assert process.poll() is None, "the run ended before it could be killed"


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["before a save", "in a save", "after a save"])
def test_a_killed_run_goes_on_bit_for_bit(shards_folder: Path, alone: Path, tmp_path: Path, moment: str) -> None:
    out = tmp_path / "run"
    kill_when(shards_folder, out, 1, moment)
    launch(1, *overrides(shards_folder, out), "--resume")
    assert_same_weights(out, alone)
    assert losses(out) == losses(alone)


@pytest.mark.slow
def test_two_killed_processes_go_on_bit_for_bit(shards_folder: Path, two: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    kill_when(shards_folder, out, 2, "after a save")
    launch(2, *overrides(shards_folder, out), "--resume")
    assert_same_weights(out, two)


@pytest.mark.slow
def test_three_processes_resume_bit_for_bit_and_a_stop_file_ends_them_cleanly(
    shards_folder: Path, alone: Path, tmp_path: Path
) -> None:
    """On three ranks DDP would sum in another order after a restart, were its reducer not settled at the start."""
    whole, out = tmp_path / "whole", tmp_path / "run"
    launch(3, *overrides(shards_folder, whole))
    for a, b in zip(losses(alone), losses(whole), strict=True):
        assert abs(a - b) <= 1e-4 * abs(a)
    process = subprocess.Popen(command(3, *overrides(shards_folder, out)), cwd=ROOT, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (out / "metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    (out / "stop").touch()
    assert process.wait(timeout=120) == 0
    taken = len(losses(out))
    assert taken < STEPS
    assert (out / f"checkpoints/step_{taken:08d}").exists()
    launch(3, *overrides(shards_folder, out), "--resume")
    assert_same_weights(out, whole)


@pytest.mark.slow
def test_a_run_split_over_two_processes_equals_one_which_goes_on_with_it(
    shards_folder: Path, alone: Path, tmp_path: Path
) -> None:
    """FSDP2, as the launch file asks for; its checkpoint is a model, and that of a run on one process."""
    out = tmp_path / "run"
    launcher = [*ACCELERATE, str(ROOT / "configs/accelerate/fsdp2_8.yaml"), "--num_processes", "2"]
    finish([*launcher, PRETRAIN, str(TINY), *overrides(shards_folder, out, "train.keep_checkpoints=4")])
    for step, (a, b) in enumerate(zip(losses(alone), losses(out), strict=True), 1):
        assert abs(a - b) <= 1e-4 * abs(a), f"step {step}: {a} and {b}"
    last = out / "checkpoints" / f"step_{STEPS:08d}"
    assert not (last / "model.safetensors").exists()
    assert len(list((last / "sharded").iterdir())) == 2
    exported = MultimodalModel.from_pretrained(last).export(tmp_path / "model")
    found, wanted = load_file(exported / "model.safetensors"), weights(alone)
    for name, value in found.items():
        assert torch.allclose(value, wanted[name], rtol=1e-2, atol=1e-4), name
    resumed = tmp_path / "resumed"
    pretrain(load_config(TINY, overrides(shards_folder, resumed)), resume=str(out / "checkpoints/step_00000010"))
    for a, b in zip(losses(alone)[10:], losses(resumed), strict=True):
        assert abs(a - b) <= 1e-4 * abs(a)


def test_a_wrong_config_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    done = subprocess.run(
        command(1, "train.stpes=3"), capture_output=True, text=True, timeout=120, check=False, cwd=tmp_path
    )
    assert done.returncode == 2
    assert done.stderr.strip().splitlines() == [done.stderr.strip()]
    assert "did you mean 'steps'?" in done.stderr
