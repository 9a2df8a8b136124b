"""A launcher that contradicts the configuration is refused with both values; launch files and Slurm script agree."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
import yaml
from support.recipes import ROOT, tiny_config

from mmcl.training.processes import check_launch, is_sharded, zero_stage
from mmcl.training.zero import ZeroOptimizer
from mmcl.types import ConfigError

ACCELERATE = ROOT / "configs/accelerate"
SLURM = ACCELERATE / "slurm.sh"
STAGE = "ACCELERATE_DEEPSPEED_ZERO_STAGE"
ZERO = {"ACCELERATE_USE_DEEPSPEED": "true", STAGE: "2", "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "none"}


@pytest.mark.parametrize(
    ("override", "environment", "said"),
    [
        ("train.processes=4", {"WORLD_SIZE": "2"}, r"train\.processes: 4 asked for, but 2 started"),
        ("train.processes=2", {}, r"train\.processes: 2 asked for, but 1 started"),
        (
            "train.precision=fp32",
            {"ACCELERATE_MIXED_PRECISION": "bf16"},
            r"train\.precision: fp32, but the launcher says mixed_precision=bf16",
        ),
        (
            "train.accumulate=2",
            {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"},
            r"train\.accumulate: 2, but the launcher says gradient_accumulation_steps=4",
        ),
        ("train.steps=2", {"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "dynamo_backend=inductor"),
        ("train.sharding=fsdp2", ZERO, r"train\.sharding: fsdp2, .* DeepSpeed"),
        ("train.steps=2", {**ZERO, STAGE: "3"}, "zero_stage=3 .* knows 1 and 2; configs/accelerate/fsdp2_8.yaml"),
        ("train.steps=2", {**ZERO, STAGE: "0"}, "zero_stage=0 .* knows 1 and 2; configs/accelerate/gpu_8.yaml"),
        (
            "train.steps=2",
            {**ZERO, "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu"},
            "offload_optimizer_device=cpu, but a run knows none",
        ),
        ("train.steps=2", {**ZERO, "ACCELERATE_DEEPSPEED_CONFIG_FILE": "ds.json"}, "deepspeed_config_file=ds.json"),
        (
            "train.optimizer.clip_norm=2",
            {**ZERO, "ACCELERATE_GRADIENT_CLIPPING": "1.0"},
            r"train\.optimizer\.clip_norm: 2\.0, but the launcher says gradient_clipping=1\.0",
        ),
        ("train.precision=fp16", ZERO, r"train\.precision: fp16 scales losses.* DeepSpeed"),
        ("train.micro_batch=2", ZERO, r"train\.micro_batch: 2 .* DeepSpeed"),
        ("train.channels_last=true", ZERO, r"train\.channels_last: true .* DeepSpeed"),
        ("train.optimizer={name: lars}", ZERO, r"train\.optimizer: lars .* DeepSpeed"),
        (
            "train.sharding=none",
            {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"},
            r"train\.sharding: none, but the launcher says FSDP version 2",
        ),
        ("train.sharding=fsdp2", {"ACCELERATE_USE_FSDP": "true"}, "fsdp2, but the launcher says FSDP version 1"),
    ],
)
def test_a_contradiction_names_both_values(override: str, environment: Mapping[str, str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        check_launch(tiny_config(override), environment)


def test_what_agrees_or_says_nothing_passes() -> None:
    said = {"ACCELERATE_MIXED_PRECISION": "bf16", "WORLD_SIZE": "2", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "2"}
    check_launch(tiny_config("train.precision=bf16", "train.processes=2", "train.accumulate=2"), said)
    silent = {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "NO", "WORLD_SIZE": "2"}
    check_launch(tiny_config("train.precision=bf16", "train.accumulate=2"), silent)


def test_the_launcher_decides_on_sharding_where_the_configuration_is_silent() -> None:
    fsdp = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    check_launch(tiny_config(), fsdp)
    assert is_sharded(tiny_config(), fsdp)
    assert not is_sharded(tiny_config(), {})
    assert is_sharded(tiny_config("train.sharding=fsdp2"), {})


@pytest.mark.parametrize("stage", [1, 2])
def test_the_launcher_decides_on_deepspeed(stage: int) -> None:
    said = {**ZERO, STAGE: str(stage)}
    check_launch(tiny_config("train.precision=bf16", "train.accumulate=2"), said)
    assert zero_stage(said) == stage
    assert not is_sharded(tiny_config(), said)
    assert zero_stage({}) is None
    assert zero_stage({"ACCELERATE_USE_DEEPSPEED": "false", STAGE: "2"}) is None


def test_deepspeed_that_is_missing_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    optimizer = torch.optim.SGD([torch.zeros(2, requires_grad=True)])
    with pytest.raises(ConfigError, match=re.escape("pip install 'mmcl[deepspeed]'")):
        ZeroOptimizer(torch.nn.Linear(1, 1), optimizer, 2, tiny_config().train)


def launch_file(name: str) -> dict[str, object]:
    return yaml.safe_load((ACCELERATE / name).read_text())


def test_launch_files_say_what_their_names_say() -> None:
    counts = {
        "cpu_2": (1, 2),
        "gpu_1": (1, 1),
        "gpu_8": (1, 8),
        "nodes_2x8": (2, 16),
        "fsdp2_8": (1, 8),
        "deepspeed_8": (1, 8),
        "single": (1, 1),
    }
    assert counts.keys() == {path.stem for path in ACCELERATE.glob("*.yaml")}
    for name, (machines, processes) in counts.items():
        said = launch_file(f"{name}.yaml")
        assert (said["num_machines"], said["num_processes"]) == (machines, processes), name
        assert said["mixed_precision"] == "no" and said["use_cpu"] is False, name
    assert launch_file("fsdp2_8.yaml")["fsdp_config"] == {"fsdp_version": 2}
    assert launch_file("deepspeed_8.yaml")["deepspeed_config"] == {"zero_stage": 2}


def directives() -> dict[str, str]:
    found = re.findall(r"^#SBATCH --([a-z-]+)(?:=(.*))?$", SLURM.read_text(), re.MULTILINE)
    return dict(found)


def test_the_slurm_script_asks_for_what_its_launch_file_starts() -> None:
    subprocess.run(["bash", "-n", str(SLURM)], check=True)
    lines = SLURM.read_text().splitlines()
    assert lines[0].startswith("#!")
    last = max(n for n, line in enumerate(lines) if line.startswith("#SBATCH"))
    assert all(line.startswith("#") for line in lines[:last]), "sbatch reads no directive after a command"
    asked = directives()
    (file,) = re.findall(r"\$\{MMCL_LAUNCH:-(\S+?)\}", SLURM.read_text())
    said = yaml.safe_load((ROOT / file).read_text())
    assert int(asked["nodes"]) == said["num_machines"]
    assert int(asked["nodes"]) * int(asked["gpus-per-node"]) == said["num_processes"]
    assert asked["ntasks-per-node"] == "1", "a launcher per node starts the ranks"
    assert asked["signal"] == "B:USR1@300"
    assert "requeue" in asked
    command = SLURM.read_text().partition("exec accelerate launch")[2].partition("'")[0].replace("\\\n", " ")
    words = shlex.split(command)
    assert {"--machine_rank", "--main_process_ip", "--main_process_port", "--resume"} <= set(words)
    assert (ROOT / "pipelines/pretrain.py").exists() and "pipelines/pretrain.py" in words


def test_the_slurm_script_wants_a_run_folder(tmp_path: Path) -> None:
    done = subprocess.run(["bash", str(SLURM), "x.yaml"], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 2
    assert "train.out=FOLDER" in done.stderr
