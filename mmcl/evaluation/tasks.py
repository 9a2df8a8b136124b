"""Classification and probes of embedded samples: from rows and classes to figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mmcl.evaluation.class_labels import Labelled, check_classes
from mmcl.evaluation.classification import ClassificationResult, average_precision, classify
from mmcl.evaluation.probes import choose_probe, few_shot, neighbour_votes
from mmcl.evaluation.probes.linear import PENALTIES, Kind
from mmcl.evaluation.zero_shot import Average, Prompts, zero_shot_scores
from mmcl.shards.members import read_group
from mmcl.types import ConfigError, Modality


@dataclass(frozen=True, eq=False)
class TaskResult:
    """What one task found on one modality."""

    task: str
    """``zero-shot``, ``k-nn``, ``linear`` or ``few-shot``"""
    modality: Modality
    metrics: Mapping[str, float]
    ci95: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    """how it was done, as JSON values"""
    class_names: tuple[str, ...] = ()
    confusion: Tensor | None = None
    """int64 ``(C, C)``, see ``ClassificationResult``"""
    per_class: tuple[float, ...] = ()
    """percent right, or average precision, of each class; NaN where it has no sample"""

    @property
    def name(self) -> str:
        return f"{self.task}:{self.modality}"

    def as_json(self) -> dict[str, Any]:
        """What ``report.json`` holds of it."""
        return {
            "task": self.task,
            "modality": self.modality,
            **self.metrics,
            "ci95": {name: list(bounds) for name, bounds in self.ci95.items()},
            "settings": dict(self.settings),
            "classes": list(self.class_names),
            "per_class": [None if value != value else round(value, 6) for value in self.per_class],
            "confusion": None if self.confusion is None else self.confusion.tolist(),
        }


def _judged(
    task: str,
    modality: Modality,
    found: ClassificationResult,
    names: Sequence[str],
    settings: Mapping[str, Any],
    further: Mapping[str, float] | None = None,
) -> TaskResult:
    return TaskResult(
        task,
        modality,
        {**found.metrics(), **(further or {})},
        found.ci95(),
        settings,
        tuple(names),
        found.confusion,
        tuple(found.per_class()),
    )


def zero_shot_task(
    modality: Modality,
    tests: Labelled,
    names: Sequence[str],
    spoken: Sequence[str],
    sentences: Tensor,
    *,
    prompts: Prompts = "mean",
    average: Average = "embeddings",
    scale: float = 100.0,
    settings: Mapping[str, Any] | None = None,
) -> TaskResult:
    """Top-1 and top-5, or, where samples have several classes, the mean of the classes' average precision.

    Args:
        names: all classes as the samples name them.
        spoken: the same, for people.
        sentences: unit rows ``(C, P, D)`` of the prompts about each class.
    """
    scores = zero_shot_scores(tests.rows, sentences, prompts=prompts, views=average, scale=scale)
    if not tests.several:
        return _judged("zero-shot", modality, classify(scores, tests.labels(names)), spoken, settings or {})
    precision = average_precision(scores, tests.relevant(names))
    counted = precision[~precision.isnan()]
    metrics = {
        "mAP": float(counted.mean()),
        "samples": float(len(scores)),
        "classes": float(len(names)),
        "classes-with-samples": float(len(counted)),
    }
    return TaskResult(
        "zero-shot", modality, metrics, {}, settings or {}, tuple(spoken), None, tuple(precision.tolist())
    )


def neighbours_task(
    modality: Modality, bank: Labelled, tests: Labelled, *, neighbours: int = 200, temperature: float = 0.1
) -> TaskResult:
    """Weighted k-NN (200 neighbours, τ = 0.1: Feichtenhofer et al. 2021, arXiv 2104.14558)."""
    names = _joint_names(bank, tests)
    votes = neighbour_votes(
        _flat(tests.rows),
        _flat(bank.rows),
        bank.labels(names),
        classes=len(names),
        neighbours=neighbours,
        temperature=temperature,
    )
    settings = {"neighbours": min(neighbours, len(bank.items)), "temperature": temperature}
    return _judged("k-nn", modality, classify(votes, tests.labels(names)), names, settings, _bank(bank, tests))


def linear_task(
    modality: Modality,
    bank: Labelled,
    tests: Labelled,
    *,
    kind: Kind = "logistic",
    penalties: Sequence[float] = PENALTIES,
    seed: int = 0,
    quiet: bool = True,
) -> TaskResult:
    """A linear classifier of frozen features; of several views of a training sample each is a row."""
    names = _joint_names(bank, tests)
    rows, labels = bank.rows, bank.labels(names)
    groups = _groups(bank)
    if rows.ndim == 3:
        views = rows.shape[1]
        rows, labels = rows.flatten(0, 1), labels.repeat_interleave(views)
        groups = [group for group in groups for _ in range(views)]
    probe = choose_probe(
        kind, rows, labels, classes=len(names), penalties=penalties, groups=groups, seed=seed, quiet=quiet
    )
    settings = {
        "kind": kind,
        "penalty": probe.penalty,
        "held_out_top-1": {f"{penalty:g}": value for penalty, value in sorted(probe.held_out.items())},
        "seed": seed,
    }
    found = classify(probe.scores(tests.rows), tests.labels(names))
    return _judged("linear", modality, found, names, settings, _bank(bank, tests))


def few_shot_task(
    modality: Modality, tests: Labelled, *, ways: int = 5, shots: int = 1, episodes: int = 600, seed: int = 0
) -> TaskResult:
    """Few-shot episodes among the samples themselves."""
    _one_each(tests)
    try:
        found = few_shot(
            _flat(tests.rows),
            tests.labels(tests.names()),
            ways=ways,
            shots=shots,
            episodes=episodes,
            seed=seed,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from None
    metrics = {
        "top-1": found.mean,
        "samples": float(len(tests.items)),
        "classes": float(found.usable_classes),
        "episodes": float(found.episodes),
    }
    bounds = {"top-1": (found.mean - found.half_width, found.mean + found.half_width)}
    settings = {"ways": ways, "shots": shots, "queries": found.queries, "seed": seed}
    return TaskResult("few-shot", modality, metrics, bounds, settings)


def _joint_names(bank: Labelled, tests: Labelled) -> list[str]:
    """Classes of both; those of the bank alone can be answered too."""
    for each, what in ((bank, "training"), (tests, "test")):
        _one_each(each)
        check_classes(each, f"{what} samples")
    if not set(bank.names()) & set(tests.names()):
        raise ConfigError(
            f"training samples have none of the classes of the test samples, such as {tests.names()[0]!r}"
        )
    return Labelled(bank.rows, (), bank.classes + tests.classes).names()


def _one_each(found: Labelled) -> None:
    if found.several:
        raise ConfigError("samples have several classes each: probes tell one class from others")


def _bank(bank: Labelled, tests: Labelled) -> dict[str, float]:
    unknown = set(tests.names()) - set(bank.names())
    known = {item.key for item in bank.items}
    twice = sum(item.key in known for item in tests.items)
    return {
        **({"also in training": float(twice)} if twice else {}),
        "training samples": float(len(bank.items)),
        **({"classes without training samples": float(len(unknown))} if unknown else {}),
    }


def _groups(bank: Labelled) -> list[int]:
    """A number for each sample, equal for those of one group (the same source video)."""
    seen: dict[str, int] = {}
    return [seen.setdefault(read_group(item.metadata) or f"\0{item.draw}", len(seen)) for item in bank.items]


def _flat(rows: Tensor) -> Tensor:
    """``(n, D)``: the mean of the views."""
    return rows if rows.ndim == 2 else torch.nn.functional.normalize(rows, dim=-1).mean(1)
