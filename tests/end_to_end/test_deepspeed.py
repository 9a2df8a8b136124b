"""DeepSpeed's ZeRO on two processes is the run without it: losses, weights, optimizer states, kill and resume."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.launched import ACCELERATE, CPU_2, PRETRAIN, arguments, finish, started, wait_until
from support.recipes import ROOT

from mmcl.model import MultimodalModel
from mmcl.training.checkpoint import load_optimizer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="pip install 'mmcl[deepspeed]'"),
]

STEPS = 10
RUN = (f"train.steps={STEPS}", "train.keep_checkpoints=4", "train.accumulate=2", "train.ema={}")
CLIPPED = ("train.optimizer.clip_norm=0.5", "train.optimizer.learning_rate=1e-3")


def zero(stage: int) -> list[str]:
    """The launch file, on two processes."""
    file = str(ROOT / "configs/accelerate/deepspeed_8.yaml")
    return [*ACCELERATE, file, "--num_processes", "2", "--main_process_port", "0", "--zero_stage", str(stage)]


def command(launcher: list[str], shards: Path, out: Path, *more: str) -> list[str]:
    return [*launcher, PRETRAIN, *arguments(shards, out, *RUN, *CLIPPED, *more)]


def logged(out: Path, name: str) -> list[float]:
    return [json.loads(line)[name] for line in (out / "metrics.jsonl").read_text().splitlines()]


def last(out: Path) -> Path:
    return out / f"checkpoints/step_{STEPS:08d}"


def optimizer_states(out: Path) -> dict[tuple[int, str], torch.Tensor]:
    states = load_optimizer(last(out) / "optimizer.pt")["state"]
    return {(index, key): value for index, state in states.items() for key, value in state.items()}


def assert_same(out: Path, wanted: Path) -> None:
    """Bit for bit."""
    for name in ("model", "ema/model", "objectives"):
        a, b = (load_file(last(run) / f"{name}.safetensors") for run in (out, wanted))
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a), name
    a, b = optimizer_states(out), optimizer_states(wanted)
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.fixture(scope="module")
def plain(shards_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """DDP."""
    out = tmp_path_factory.mktemp("plain") / "run"
    finish(command(CPU_2, shards_folder, out))
    return out


@pytest.fixture(scope="module")
def split(shards_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("split") / "run"
    done = finish(command(zero(2), shards_folder, out))
    assert "on 2 process(es) (cpu)" in done.stdout
    assert "[INFO]" not in done.stdout + done.stderr
    return out


def assert_equals_plain(out: Path, plain: Path) -> None:
    for name in ("loss", "grad_norm", "grad_norm/video"):
        assert len(logged(out, name)) == STEPS
        assert logged(out, name) == pytest.approx(logged(plain, name), rel=1e-5)
    weights, wanted = load_file(last(out) / "model.safetensors"), load_file(last(plain) / "model.safetensors")
    assert weights.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.allclose(weights[name], value, rtol=1e-3, atol=1e-5), name
    states, others = optimizer_states(out), optimizer_states(plain)
    assert states.keys() == others.keys()
    for key, value in others.items():
        assert states[key].shape == value.shape, key
        assert torch.allclose(states[key], value, rtol=1e-2, atol=1e-5), key


def test_splitting_gradients_and_states_changes_nothing(split: Path, plain: Path, tmp_path: Path) -> None:
    assert min(logged(plain, "grad_norm")) > 0.5, "gradients are clipped"
    assert_equals_plain(split, plain)
    exported = MultimodalModel.from_pretrained(last(split)).export(tmp_path / "model")
    weights = load_file(last(split) / "model.safetensors")
    assert all(torch.equal(value, weights[name]) for name, value in load_file(exported / "model.safetensors").items())


POISONED = """
import dataclasses, os, sys, torch
from mmcl import load_config
from mmcl.training.launch import pretrain
from mmcl.training.step import TrainStep
from mmcl.types import RunError

forward = TrainStep.forward

def poison(self, batch, cache=None, optimizer_step=None):
    term, number = forward(self, batch, cache, optimizer_step), 1 + (-1 if optimizer_step is None else optimizer_step)
    if os.environ["RANK"] == "1" and number == 3:
        return dataclasses.replace(term, loss=term.loss + torch.nan)
    return dataclasses.replace(term, loss=term.loss * torch.nan) if number in (5, 6) else term

TrainStep.forward = poison
try:
    pretrain(load_config(sys.argv[1], sys.argv[2:]))
except RunError as error:
    sys.exit(str(error))
"""
"""a run that ends at step 6: in step 3 the loss of one rank is not finite, in 5 and 6 gradients are not"""


def test_a_step_that_is_not_finite_changes_nothing(shards_folder: Path, tmp_path: Path) -> None:
    """Stage 1, in bf16."""
    (tmp_path / "poisoned.py").write_text(POISONED)
    more = ("train.precision=bf16", "train.nonfinite=skip", "train.nonfinite_limit=1", "train.checkpoint_every=1")
    for name, launcher in {"plain": CPU_2, "split": zero(1)}.items():
        run = arguments(shards_folder, tmp_path / name, *RUN, *CLIPPED, *more)
        done = finish([*launcher, str(tmp_path / "poisoned.py"), *run], code=1)
        assert "step 6: not finite: " in done.stderr and "2 steps in a row" in done.stderr
    found, wanted = ([float(x) for x in logged(tmp_path / name, "loss")] for name in ("split", "plain"))
    assert found == pytest.approx(wanted, rel=1e-3, nan_ok=True)
    norms = [logged(tmp_path / name, "grad_norm")[:4] for name in ("split", "plain")]
    assert norms[0] == pytest.approx(norms[1], rel=1e-2), "nothing is left of the gradients of step 3"
    folders = [tmp_path / f"split/checkpoints/step_{number:08d}" for number in (2, 3, 4, 5)]
    two, three, four, five = (load_file(folder / "model.safetensors") for folder in folders)
    assert all(torch.equal(two[name], three[name]) and torch.equal(four[name], five[name]) for name in two)
    assert not all(torch.equal(two[name], four[name]) for name in two)
    records = [json.loads((tmp_path / f"{run}/nonfinite/step_00000006.json").read_text()) for run in ("split", "plain")]
    named = [[name.removeprefix("module.") for name in record["gradients"]] for record in records]
    assert named[0] == named[1] != []
    assert records[0]["keys"] == records[1]["keys"]


def test_a_killed_run_goes_on_bit_for_bit(shards_folder: Path, split: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with started(command(zero(2), shards_folder, out), tmp_path / "log"):
        wait_until((out / "checkpoints/step_00000005/files.json").exists, "a checkpoint")
    assert not last(out).exists(), "the run ended before it could be killed"
    finish([*command(zero(2), shards_folder, out), "--resume"])
    assert_same(out, split)
    assert logged(out, "loss") == logged(split, "loss")


def test_a_run_goes_on_with_and_without(shards_folder: Path, split: Path, plain: Path, tmp_path: Path) -> None:
    for name, start, launcher in (("without", split, CPU_2), ("with", plain, zero(2))):
        out = tmp_path / name
        checkpoint = str(start / "checkpoints/step_00000005")
        finish([*command(launcher, shards_folder, out), "--resume", checkpoint])
        assert logged(out, "loss") == pytest.approx(logged(plain, "loss")[5:], rel=1e-5)
