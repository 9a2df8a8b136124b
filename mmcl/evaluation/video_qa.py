"""Scores of a run on multiple-choice questions: accuracy, also by type of question."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from mmcl.data import ClipStream
from mmcl.folders import model_folder
from mmcl.model import MultimodalModel
from mmcl.objectives.video_qa import VideoQA
from mmcl.recipe import RunConfig, build_model, load_config
from mmcl.shards import ShardReader, load_manifest
from mmcl.shards.members import QUESTIONS, parse_sample
from mmcl.types import Batch, ConfigError, Embeddings, RunError, SampleError, View


@dataclass(frozen=True)
class QAScores:
    """How many questions were answered rightly."""

    right: dict[str, int]
    """by type"""
    asked: dict[str, int]
    skipped: int = 0
    """samples that could not be read"""

    @property
    def accuracy(self) -> float:
        """Share of all questions, 0 to 1."""
        return sum(self.right.values()) / max(sum(self.asked.values()), 1)

    def as_json(self) -> dict[str, Any]:
        types = {
            name: {"accuracy": self.right[name] / self.asked[name], "asked": self.asked[name]} for name in self.asked
        }
        return {
            "accuracy": self.accuracy,
            "asked": sum(self.asked.values()),
            "types": types,
            "skipped": self.skipped,
        }

    def lines(self) -> list[str]:
        """What to tell the user."""
        rows = [("all", self.accuracy, sum(self.asked.values()))]
        rows += [(name, self.right[name] / count, count) for name, count in sorted(self.asked.items())]
        return [f"{name}: {100 * share:.1f} % of {count} questions" for name, share, count in rows]


def load_run(run: str | Path) -> tuple[RunConfig, MultimodalModel, VideoQA]:
    """The configuration, model and first objective ``video_qa`` of a run folder or checkpoint.

    Raises:
        ConfigError: there is none, or it answers no questions.
    """
    folder = model_folder(Path(run))
    file = folder / "config.yaml"
    if not file.exists():
        raise ConfigError(f"{folder}: no checkpoint of a run: it has no config.yaml")
    config = load_config(file)
    model, mix = build_model(config, fresh=False)
    found = [each for each in mix.each().values() if isinstance(each, VideoQA) and each.options.answer is not None]
    if not found:
        raise ConfigError(f"{folder}: no objective video_qa with answers among {', '.join(mix.each())}")
    model.load_state_dict(load_file(folder / "model.safetensors"))
    mix.load_state_dict(load_file(folder / "objectives.safetensors"))
    return config, model.eval(), found[0].eval()


@torch.no_grad()
def score_questions(
    run: str | Path,
    shards: str,
    *,
    batch: int = 32,
    workers: int = 2,
    in_process: bool = False,
    blank_video: bool = False,
    device: torch.device | str | None = None,
) -> QAScores:
    """Answers every question of ``shards``, on one process; each clip is decoded once.

    Args:
        run: a run folder or checkpoint.
        shards: indexed shards with ``KEY.qa.json``.
        blank_video: show black frames instead, to see what texts give away.
        device: None takes a GPU where there is one.

    Raises:
        ConfigError: the run has no objective ``video_qa``, or the shards no questions.
        RunError: no question could be read.
    """
    config, model, objective = load_run(run)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    model, objective = model.to(device), objective.to(device)
    asked = objective.answers.view
    numbers = [replace(asked, clip=number) for number in range(_most_questions(shards))]
    if not numbers:
        raise ConfigError(f"{shards}: no sample has {QUESTIONS}; `mmcl shards reshard --questions FILE` attaches them")
    watched = [] if objective.video is None else [objective.video.view]
    stream = ClipStream(
        load_manifest(shards),
        [*watched, *numbers],
        global_batch=batch,
        workers=workers,
        shuffle=False,
        rule="even",
        decoder=config.data.decoder,
        short=config.data.short,
        in_process=in_process,
    )
    right: dict[str, int] = {}
    total: dict[str, int] = {}
    skipped = 0
    for rows in stream:
        skipped += len(rows.skipped)
        for kind, correct in _answered(model, objective, _shown(rows.to(device), watched, blank_video), numbers):
            right[kind] = right.get(kind, 0) + correct
            total[kind] = total.get(kind, 0) + 1
    if not total:
        raise RunError(f"{shards}: none of its questions could be read")
    return QAScores(right, total, skipped)


def _shown(batch: Batch, watched: list[View], blank: bool) -> Batch:
    """The batch, or the same with black frames."""
    if not blank:
        return batch
    black = {view: replace(batch.views[view], data=torch.zeros_like(batch.views[view].data)) for view in watched}
    return replace(batch, views={**batch.views, **black})


def _answered(
    model: MultimodalModel, objective: VideoQA, batch: Batch, numbers: list[View]
) -> Iterator[tuple[str, bool]]:
    """(type, answered rightly) of each question about the clips of a batch; each clip goes through its tower once."""
    watching = [] if objective.video is None else [objective.video]
    frames = model.encode(batch, watching)
    for view in numbers:
        values = batch.views[view]
        if not values.present.any():
            continue
        one = replace(batch, views={**batch.views, objective.answers.view: values})
        texts = model.encode(one, [objective.answers])
        best = objective.scores(Embeddings({**frames, **texts}, one)).argmax(1)
        correct: Tensor = best == values.params["target"]
        for row in values.present.nonzero()[:, 0].tolist():
            name = bytes(values.params["type"][row].tolist()).rstrip(b"\0").decode("utf-8", errors="replace")
            yield name, bool(correct[row])


def _most_questions(shards: str) -> int:
    """Of one sample; nothing is decoded."""
    reader, most = ShardReader(load_manifest(shards)), 0
    for shard, size in enumerate(reader.manifest.sizes.tolist()):
        for index in range(size):
            with suppress(SampleError):  # a hole of the pass, which counts it
                most = max(most, len(parse_sample(reader.read(shard, index)).questions))
    return most
