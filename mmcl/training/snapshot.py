"""What a checkpoint holds: a copy of it on the host, taken at once, written later; and how a run takes it up again."""

from __future__ import annotations

import dataclasses
import functools
import json
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import accelerate
import torch
from torch import Tensor

import mmcl
from mmcl.folders import AVERAGE
from mmcl.hub import ModelFiles, write_model
from mmcl.training import checkpoint as ckpt

OPTIMIZER = "optimizer.pt"


@dataclass(frozen=True)
class Snapshot:
    """The state of a run between two steps; nothing in it shares memory with the run."""

    step: int
    config: str
    """the resolved configuration, YAML"""
    state: Mapping[str, Any]
    """counters, versions, the stream's position: JSON"""
    files: ModelFiles
    """what the model's folder holds besides its tensors"""
    tensors: Mapping[str, Mapping[str, Tensor]]
    """file name without ``.safetensors``: its tensors"""
    optimizer: Mapping[str, Any] | None = None
    """None: among ``sharded``"""
    sharded: Mapping[str, Tensor] = field(default_factory=dict)
    """weights and optimizer states of a run that is split over ranks, by full name"""

    def write(self, folder: Path) -> None:
        """All but what is sharded.

        Raises:
            OSError, RuntimeError, SafetensorError, RunError: the disk is full or cannot be written.
        """
        (folder / "config.yaml").write_text(self.config, encoding="utf-8")
        (folder / ckpt.STATE).write_text(json.dumps(self.state, indent=1), encoding="utf-8")
        write_model(folder, self.files, self.tensors.get("model"))
        if AVERAGE in self.tensors:
            alone = dataclasses.replace(self.files, description={**self.files.description, "momentum": []})
            write_model(folder / AVERAGE, alone, self.tensors[AVERAGE])
        for name, tensors in self.tensors.items():
            if name not in ("model", AVERAGE):
                ckpt.save_tensors(folder / f"{name}.safetensors", tensors)
        if self.optimizer is not None:
            ckpt.save_optimizer(folder / OPTIMIZER, self.optimizer)


def host_copy(value: Any) -> Any:
    """The same tree with a copy of each tensor on the host; split tensors stay split."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {key: host_copy(node) for key, node in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(host_copy(node) for node in value)
    return value


def random_state() -> dict[str, Tensor]:
    """The state of torch's generators on this rank, uint8."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def load_random_state(checkpoint: Path, rank: int) -> None:
    """One's own random state, or, on more ranks than before, another's."""
    saved = ckpt.load_tensors(checkpoint / "random.safetensors")
    # copied: torch crashes on a state that does not start its own memory
    set_random_state({name: states[rank % len(states)].clone() for name, states in saved.items()})


def set_random_state(state: Mapping[str, Tensor]) -> None:
    """Takes up what :func:`random_state` gave."""
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


@dataclass
class Progress:
    """How far a run is; saved with every checkpoint."""

    step: int = 0
    """optimizer steps taken"""
    samples: int = 0
    """rows drawn, all ranks"""
    skipped: int = 0
    """bad samples among them, all ranks"""
    captions_cut: int = 0
    """captions that were longer than their tower takes, all ranks"""
    skipped_by: dict[str, int] = field(default_factory=dict)
    """reason: how many of them"""
    nonfinite: int = 0
    """steps whose loss or gradient was not finite and that changed nothing"""
    overflowed: int = 0
    """steps of fp16 whose loss was scaled too much and that changed nothing"""


def counters(
    progress: Progress,
    stream: Mapping[str, Any],
    metrics: Mapping[str, Any],
    world_size: int,
    loss_scale: Mapping[str, Any],
) -> dict[str, Any]:
    """``state.json``: where the run is, with what it was made, and what was logged last."""
    return {
        "mmcl": mmcl.__version__,
        "torch": torch.__version__,
        "accelerate": accelerate.__version__,
        "python": platform.python_version(),
        "commit": git_commit(),
        "world_size": world_size,
        "progress": dataclasses.asdict(progress),
        # batches may be fetched ahead of the step
        "stream": {**stream, "draws": progress.samples},
        "loss_scale": loss_scale,
        "metrics": metrics,
    }


@functools.cache
def git_commit() -> str | None:
    """The commit that this code is of, with ``-dirty`` where files differ from it; None where git does not tell, such
    as outside of a checkout. Asked once: the run goes on with the code that it started with."""
    root = Path(mmcl.__file__).parents[1]
    if not (root / ".git").exists():
        return None
    try:
        described = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"],
            capture_output=True,
            text=True,
            check=False,
            timeout=30,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return described.stdout.strip() or None
