"""Whether a run can teach anything: labels that are not there, numbers that are not finite, losses that stay at 0."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from mmcl.data.labels import look_for_labels
from mmcl.encoders.prepare import DropPath
from mmcl.model import MultimodalModel
from mmcl.objectives.base import ObjectiveMix, Term
from mmcl.recipe import RunConfig
from mmcl.shards import load_manifest
from mmcl.shards.sequential import is_tar_list
from mmcl.types import TIMED, ConfigError, View

SILENT_STEPS = 3
"""steps of loss 0 that are too many; a queue is empty in the first"""
SILENT_LOSS = 1e-4
"""what rounding makes of a loss of 0, at most"""


def check_labels(config: RunConfig, mix: ObjectiveMix) -> None:
    """Refuses objectives that learn from labels where the shards have none, or higher ones than there are classes.

    Raises:
        ConfigError: names the option, the shards and what they hold.
    """
    wanted = [
        (n, objective.labels_option) for n, objective in enumerate(mix.each().values()) if objective.labels_option
    ]
    if not wanted:
        return
    # tars without an index can only be read from their start on: they are taken at their word
    places = [shards for shards, _ in config.data.weighted if isinstance(shards, str) and not is_tar_list(shards)]
    if not places:
        return
    found = look_for_labels([load_manifest(shards) for shards in places])
    for number, option in wanted:
        options = config.objectives[number]
        classes = getattr(options, option)
        where = f"objectives.{number}.{option}: {classes}"
        if found.highest < 0:
            raise ConfigError(
                f"{where}: {options.name} learns from labels, but none of {found.samples} samples looked at in "
                f"{', '.join(places)} has one; their files: {', '.join(found.extensions) or 'none'}. A label is a "
                f"number in the JSON (column `label` of `mmcl shards make`) or in KEY.cls; without, leave {option} out"
            )
        if found.highest >= classes:
            raise ConfigError(f"{where}, but a sample in {', '.join(places)} has label {found.highest}")


def check_pools(config: RunConfig, mix: ObjectiveMix) -> None:
    """ConfigError where negatives are to keep to their pseudo-label and an objective does not see to it."""
    deaf = [n for n, objective in enumerate(mix.each().values()) if not objective.pools]
    if config.data.cluster_batches == "mixed" and config.data.clusters is None:
        raise ConfigError("data.cluster_batches: mixed needs data.clusters")
    if config.data.cluster_batches == "mixed" and deaf:
        names = ", ".join(f"objectives.{n} ({config.objectives[n].name})" for n in deaf)
        raise ConfigError(f"data.cluster_batches: mixed, but {names} does not keep negatives to their label; take pure")


def remarks(config: RunConfig, model: MultimodalModel, mix: ObjectiveMix) -> list[str]:
    """What may be meant, and most often is not: lines for the start of a run."""
    lines: list[str] = []
    one_time = config.data.sampling.span_seconds == 0
    for number, objective in enumerate(mix.each().values()):
        lines += objective.remarks
        seen: dict[object, View] = {}
        for need in objective.needs:
            view = need.view
            chosen = config.data.augmentations.get(view.augmentation)
            changes = getattr(chosen, view.modality, None)
            if (changes is not None and changes != type(changes)()) or _has_dropout(model.tower(need.tower)):
                continue
            clip = 0 if one_time and isinstance(view.spec, TIMED) and view.overlap is None else view.clip
            drawn = view.copy if view.place in ("elsewhere", "near") else 0  # each at a time of its own
            first = seen.setdefault((need.tower, view.spec, clip, view.place, drawn, view.erase), view)
            if first != view:
                lines.append(
                    f"objectives.{number}: two views of tower {need.tower!r} are equal, to agree teaches nothing: "
                    f"augmentation {view.augmentation!r} changes no {view.modality}"
                )
                break
    return lines


def _has_dropout(encoder: nn.Module) -> bool:
    """Whether two passes over one input differ, which makes two views of it (SimCSE)."""
    return any(
        isinstance(hook, DropPath) for part in encoder.modules() for hook in part._forward_hooks.values()
    ) or any(
        "drop" in type(part).__name__.lower()
        and any(float(getattr(part, name, None) or 0) > 0 for name in ("p", "drop_prob"))
        for part in encoder.modules()
    )


def not_finite(
    terms: Sequence[Term], grad_norm: Tensor, objectives: Iterable[str], parameters: Iterable[tuple[str, nn.Parameter]]
) -> str:
    """What is not finite in a step, for people; "" where all is.

    First the objectives whose term it is, with their own figures in brackets; where all terms are finite, the parts of
    the model whose gradients are not.
    """
    told = [pair for term in terms for pair in (*term.metrics.items(), ("loss", term.loss.detach()))]
    told.append(("grad_norm", grad_norm))
    finite = torch.stack([value.float() for _, value in told]).isfinite().tolist()
    wrong = list(dict.fromkeys(name for (name, _), ok in zip(told, finite, strict=True) if not ok))
    if not wrong:
        return ""
    said, named = [], set()
    for objective in objectives:
        parts = [name for name in wrong if name.startswith(f"{objective}/")]
        if objective in wrong or parts:
            named |= {objective, *parts}
            inner = ", ".join(name.removeprefix(f"{objective}/") for name in parts)
            said.append(f"objective {objective}" + (f" ({inner})" if inner else ""))
    if not said:
        bad = (name for name, p in parameters if p.grad is not None and not bool(p.grad.isfinite().all()))
        said = [f"gradient of {part}" for part in dict.fromkeys(".".join(name.split(".")[:3]) for name in bad)]
    return ", ".join([*said, *(name for name in wrong if name not in named)])


class SilenceWatch:
    """Sees objectives and parts of them whose loss was 0 since the start: they teach nothing, and would say nothing."""

    def __init__(self, objectives: Mapping[str, Sequence[str]]) -> None:
        """``objectives``: the parts of each (:attr:`~mmcl.objectives.base.Objective.watched`)."""
        self._names = [name for one, parts in objectives.items() for name in (one, *(f"{one}/{x}" for x in parts))]
        self._largest: Tensor | None = None
        self._negatives = 0.0
        self._steps = 0
        self._said: set[str] = set()

    def watch(self, term: Term) -> None:
        """Takes in one step; stays on its device."""
        seen = torch.stack([term.metrics[name].float().abs() for name in self._names])
        self._largest = seen if self._largest is None else torch.maximum(self._largest, seen)
        self._steps += 1
        if "negatives" in term.metrics:  # of the steps that are logged
            self._negatives = max(self._negatives, float(term.metrics["negatives"]))

    def complaints(self, *, last: bool = False) -> list[str]:
        """A line for each objective that is silent, once, or each of its parts where others are not; ``last``: there
        will be no further step.
        """
        if self._largest is None or (self._steps < SILENT_STEPS and not last):
            return []
        losses = self._largest.tolist()
        if self._negatives == 0:
            why = "no row had a negative: a batch of one, or rows that are all equal in key, caption or group"
        else:
            why = "no row had all that it compares, or none had a negative; its figures in metrics.jsonl tell which"
        silent = [name for name, loss in zip(self._names, losses, strict=True) if loss < SILENT_LOSS]
        silent = [name for name in silent if "/" not in name or name.split("/")[0] not in silent]
        new = [name for name in silent if name not in self._said]
        self._said.update(new)
        steps = f"all {self._steps} steps" if self._steps > 1 else "the only step"
        return [f"objective {name} teaches nothing: its loss was 0 in {steps} so far: {why}" for name in new]
