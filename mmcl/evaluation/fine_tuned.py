"""How good the classification heads of a fine-tuned run are: T windows × 3 crops of each test sample."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from safetensors.torch import load_file
from torch import Tensor

from mmcl.config import read_yaml
from mmcl.evaluation.run import Evaluation, evaluate_checkpoint
from mmcl.evaluation.run_tasks import TaskOptions, TaskRun, written
from mmcl.evaluation.task_report import TaskReport
from mmcl.evaluation.tasks import head_task
from mmcl.folders import check_writable, model_folder
from mmcl.types import ConfigError

OBJECTIVE = "classification"


@dataclass(frozen=True, eq=False)
class Head:
    """A linear classifier that was trained with its tower."""

    name: str
    """of its objective"""
    tower: str
    level: str
    weight: Tensor
    """``(C, D)``"""
    bias: Tensor
    """``(C,)``"""


def read_heads(checkpoint: Path) -> list[Head]:
    """The classification heads of a checkpoint, or of the newest one of a run; none where it has no such objective.

    Raises:
        ConfigError: no checkpoint, or one whose tensors are split over ranks.
    """
    folder = model_folder(checkpoint)
    if not (folder / "config.yaml").exists():
        return []
    heads, named = [], dict[str, int]()
    tensors: dict[str, Tensor] = {}
    for number, options in enumerate(_objectives(folder)):
        name = options["name"] if options["name"] not in named else f"{options['name']}_{number}"
        named[name] = number
        if options["name"] != OBJECTIVE:
            continue
        if not tensors:
            if not (folder / "objectives.safetensors").exists():
                raise ConfigError(f"{folder}: its heads are split over ranks; fine-tune with train.sharding=none")
            tensors = load_file(folder / "objectives.safetensors")
        weight, bias = (tensors[f"objectives.{name}.head.{part}"].float() for part in ("weight", "bias"))
        heads.append(Head(name, options.get("tower", "video"), options.get("level", "pooled"), weight, bias))
    return heads


def _objectives(folder: Path) -> list[dict[str, Any]]:
    # read as it is: a run of another version may hold keys that this one does not know
    return [dict(options) for options in read_yaml(folder / "config.yaml")["objectives"]]


def evaluate_fine_tuned(
    checkpoint: Path, shards: str, out: Path, *, clips: int | None = None, crops: int = 1, **reading: Any
) -> TaskReport | Evaluation:
    """Top-1 and top-5 of each classification head of a run on labelled shards; retrieval where it has none.

    Each window and crop of a sample gives a softmax, whose mean is what the sample is taken for.

    In a process group every process calls this; embedding is shared, and the first writes the report into ``out``.

    Args:
        clips: windows of a sample, evenly spaced; default: ``evaluate.clips`` of the run.
        crops: 1, or 3 along the long side of the picture.
        reading: ``workers``, ``decoder``, ``batch`` and ``cache`` of :class:`TaskRun`.

    Raises:
        ConfigError: no head and no pairs to retrieve, labels that the head does not have, a tower that is not the
            first of its modality, crops where there is nothing to cut.
        RunError: nothing could be read, or ``out`` cannot be written.
    """
    check_writable(out)
    heads = read_heads(checkpoint)
    if not heads:
        if crops != 1:
            raise ConfigError("crops: retrieval looks at the centre of pictures; take 1")
        return evaluate_checkpoint(checkpoint, shards, out, clips=clips, **reading)
    run = TaskRun(checkpoint, shards, TaskOptions(clips=clips, crops=crops), **reading)
    results = []
    for head in heads:
        modality = run.model.tower(head.tower).spec.modality
        if run.model.tower_of(modality) != head.tower:
            raise ConfigError(f"tower {head.tower!r}: only the first tower of a modality is embedded: name it first")
        level: Literal["joint", "pooled"] = "joint" if head.level == "joint" else "pooled"
        tests = run.tests(modality, level=level, each_view=True)
        found = head_task(modality, tests, head.weight.to(tests.rows.device), head.bias.to(tests.rows.device))
        views = {"windows": run.clips, "crops": crops, "views averaged by": "scores", "features": level}
        results.append(replace(found, settings={**found.settings, "objective": head.name, **views}))
    return written(run, run.report(results), out)
