"""What every objective is, and the weighted mix that a run trains."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from mmcl.config import unknown_name
from mmcl.distributed import Comm
from mmcl.objectives.ranks import mean_negatives
from mmcl.objectives.weights import Ramp
from mmcl.types import ConfigError, Embeddings, Level, Need, TowerInfo, VectorSpec

LEVELS: tuple[Level, ...] = ("joint", "pooled", "tokens", "joint_tokens")
"""what every tower gives; ``stage:NAME`` comes on top"""


@dataclass(frozen=True, slots=True, eq=False)
class Term:
    """What one objective says of one batch."""

    loss: Tensor
    """0-d; its value is the global loss, its gradient is scaled so that averaging over ranks is exact"""
    metrics: Mapping[str, Tensor] = field(default_factory=dict)
    """detached 0-d tensors to log"""
    pending: Mapping[str, Any] = field(default_factory=dict)
    """what ``commit`` needs once the optimizer has stepped"""


def check_needs(needs: Iterable[Need], towers: Mapping[str, TowerInfo], path: str) -> None:
    """Refuses what no tower can give.

    Raises:
        ConfigError: an unknown tower or level, or a momentum copy of a tower that does not learn; names ``path``.
    """
    for need in needs:
        if need.tower not in towers:
            raise unknown_name(path, need.tower, towers)
        for level in need.levels:
            if level not in LEVELS and not level.startswith("stage:"):
                raise unknown_name(f"{path}: tower {need.tower!r}", level, (*LEVELS, "stage:NAME"))
            if level not in ("joint", "pooled") and isinstance(towers[need.tower].spec, VectorSpec):
                raise ConfigError(f"{path}: {need.tower!r} holds stored embeddings, which have no level {level!r}")
        if need.kind == "momentum" and not towers[need.tower].trainable:
            learning = ", ".join(name for name, tower in towers.items() if tower.trainable) or "none"
            raise ConfigError(
                f"{path}: a momentum copy of tower {need.tower!r} is needed, but that tower is frozen; "
                f"towers that learn: {learning}"
            )


class Objective(nn.Module):
    """A loss with what it owns: heads, queues, prototypes.

    ``forward`` changes no state; ``commit`` does, once, after the optimizer step: a skipped step changes nothing.
    Every rank makes the same collectives in the same order, whatever its rows.
    """

    needs: tuple[Need, ...] = ()
    scales: tuple[str, ...] = ()
    """names of the model's temperatures that this objective uses"""
    fusions: tuple[str, ...] = ()
    """names of the model's learned fusions that this objective uses, e.g. ``video+audio``, in the model's order"""
    labels_option: str | None = None
    """the option that makes this objective learn from labels, where it does"""
    watched: tuple[str, ...] = ()
    """metrics that are losses of their own, each of which should teach something"""
    pools: bool = False
    """whether its negatives keep to the pools of a batch"""
    masking: Mapping[str, str] = {}
    """option: the augmentation that it names, which has to mask tokens of texts"""
    mixing: Mapping[str, tuple[str, str]] = {}
    """option: a modality and the augmentation that the option names, which has to mix rows of that modality"""
    remarks: tuple[str, ...] = ()
    """what a run says of it at its start, with the path of the option"""
    start_temperatures: Mapping[str, float] = {}
    """where those of them start that do not start as the model says"""

    def forward(self, embeddings: Embeddings, comm: Comm) -> Term:
        raise NotImplementedError

    def commit(self, pending: Mapping[str, Any]) -> None:
        """Advances queues, pointers and prototypes. Most objectives have none."""

    def load_pretrained(self) -> None:
        """Takes up the first weights that its options name. Most objectives have none."""

    def ema_pairs(self) -> Iterable[tuple[nn.Module, nn.Module]]:
        """(online, momentum copy) of the heads that this objective owns."""
        return ()


class ObjectiveMix(nn.Module):
    """The weighted sum of named objectives, one logged line per term, and the weights that change.

    ``negatives`` in its metrics: how many others of the batch, in the mean, a row shares no key, caption or group with.
    """

    def __init__(
        self, objectives: Mapping[str, Objective], weights: Mapping[str, float | Ramp], *, steps: int | None = None
    ) -> None:
        super().__init__()
        if not objectives:
            raise ValueError("a mix needs at least one objective")
        if set(objectives) != set(weights):
            raise ValueError(f"weights {sorted(weights)} do not match objectives {sorted(objectives)}")
        self.objectives = nn.ModuleDict(objectives)
        self.weights = dict(weights)
        self.steps = steps
        """optimizer steps of the run, for objectives that change on the way"""

    @property
    def needs(self) -> tuple[Need, ...]:
        """The union of all needs, in the order of the objectives."""
        return tuple(dict.fromkeys(need for objective in self.each().values() for need in objective.needs))

    @property
    def scales(self) -> tuple[str, ...]:
        """The union of all temperatures, in the order of the objectives."""
        return tuple(dict.fromkeys(name for objective in self.each().values() for name in objective.scales))

    @property
    def fusions(self) -> tuple[str, ...]:
        """The union of all learned fusions, in the order of the objectives."""
        return tuple(dict.fromkeys(name for objective in self.each().values() for name in objective.fusions))

    @property
    def start_temperatures(self) -> dict[str, float]:
        """Where temperatures start that do not start as the model says; the first objective of a name has its say."""
        each = reversed(self.each().values())
        return {name: start for objective in each for name, start in objective.start_temperatures.items()}

    def each(self) -> dict[str, Objective]:
        """The objectives by name, in the order of the configuration."""
        return {name: module for name, module in self.objectives.items() if isinstance(module, Objective)}

    def weights_at(self, step: int | None) -> dict[str, float]:
        """The weights in force in optimizer step ``step``, counted from 0; None will do where none changes."""
        changing = [name for name, weight in self.weights.items() if isinstance(weight, Ramp)]
        if changing and step is None:
            raise ValueError(f"the weights of {', '.join(changing)} change: which optimizer step is it?")
        return {
            name: weight.at(step or 0) if isinstance(weight, Ramp) else weight for name, weight in self.weights.items()
        }

    def forward(self, embeddings: Embeddings, comm: Comm, *, step: int | None = None, counted: bool = True) -> Term:
        """The mix in optimizer step ``step``, counted from 0; ``counted``: with ``negatives``, an exchange of ranks."""
        if step is not None and self.steps is not None:
            embeddings = replace(embeddings, progress=min(step / self.steps, 1.0))
        terms = {name: objective(embeddings, comm) for name, objective in self.each().items()}
        weights = self.weights_at(step)
        loss = torch.stack([weights[name] * term.loss for name, term in terms.items()]).sum()
        metrics = {name: term.loss.detach() for name, term in terms.items()}
        if counted:
            batch = embeddings.batch
            anything = torch.stack([view.present for view in batch.views.values()]).any(0)
            metrics["negatives"] = mean_negatives(batch.groups, anything, comm, batch.pools)
        changing = (name for name, weight in self.weights.items() if isinstance(weight, Ramp))
        metrics.update({f"{name}/weight": loss.new_tensor(weights[name]).detach() for name in changing})
        for name, term in terms.items():
            metrics.update({f"{name}/{key}": value for key, value in term.metrics.items()})
        return Term(loss, metrics, {name: term.pending for name, term in terms.items()})

    def commit(self, pending: Mapping[str, Any]) -> None:
        for name, objective in self.each().items():
            objective.commit(pending[name])

    def ema_pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        return [pair for objective in self.each().values() for pair in objective.ema_pairs()]
