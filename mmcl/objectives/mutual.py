"""Mutual contrastive learning: a cohort of towers, each learning from the others' contrasts (MCL)."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import permutations
from typing import Annotated, Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from mmcl.config import Options, unknown_name
from mmcl.distributed import Comm
from mmcl.objectives.base import Objective, Term
from mmcl.objectives.ranks import all_rows
from mmcl.objectives.weights import Weight
from mmcl.types import ConfigError, Embeddings, Need, TowerInfo, View


class MutualOptions(Options):
    """Yang et al. 2022 (arXiv 2104.12565), self-supervised; towers of one modality or, our addition, of several."""

    name: Literal["mutual"] = "mutual"
    weight: Weight = 1.0
    towers: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    """the cohort; null: all towers. A sample counts where all of them have it; one tower alone: plain MoCo"""
    keys: Literal["momentum", "online"] = "momentum"
    """what makes keys: the momentum copies, or the towers themselves, which then learn through them as well"""
    queue: Annotated[int, Field(ge=0)] = 65_536
    """older keys of each tower that are the negatives; 0: the other samples of the batch, of all ranks"""
    key_clip: Annotated[int, Field(ge=0)] = 1
    """the clip that keys see; queries see clip 0. 0: the same time window"""
    augmentation: str = "none"
    """of both views, drawn for each of them"""
    vcl: Annotated[float, Field(ge=0)] = 1.0
    """weight of Σ_a CE(ℓ_aa): each tower's own contrast"""
    icl: Annotated[float, Field(ge=0)] = 1.0
    """weight of Σ_(a≠b) CE(ℓ_ab): one tower's queries against another's keys"""
    soft_vcl: Annotated[float, Field(ge=0)] = 1.0
    """weight of Σ_(a≠b) T² KL(ℓ_bb ‖ ℓ_aa), ℓ_bb detached"""
    soft_icl: Annotated[float, Field(ge=0)] = 1.0
    """weight of Σ_(a≠b) T² KL(ℓ_ba ‖ ℓ_ab), ℓ_ba detached"""
    temperature: Annotated[float, Field(gt=0)] = 0.07
    soft_temperature: Annotated[float, Field(gt=0)] = 3.0
    """T; it divides what ``temperature`` has divided already"""


class _Member(NamedTuple):
    """One tower's rows."""

    queries: Tensor
    """``(n, D)``, of this rank"""
    keys: Tensor
    every_key: Tensor
    """``(N, D)``, of all ranks"""
    queue: Tensor
    """``(F, D)``"""


class Mutual(Objective):
    """The four sums of the paper over joint embeddings, each the mean over rows of all ranks.

    ℓ_ab of row i holds the cosines, over the temperature, of query a with key b of the same sample and of its
    negatives. Queues hold the rows that all towers have, in draw order, so that their columns mean the same samples;
    they start empty. Samples of equal key, caption or group are no negatives in a batch, those of equal key in a queue.
    """

    queue_ids: Tensor
    pointer: Tensor
    filled: Tensor

    def __init__(
        self, options: MutualOptions, queries: Mapping[str, Need], keys: Mapping[str, Need], width: int
    ) -> None:
        super().__init__()
        self.options = options
        self.queries, self.keys = dict(queries), dict(keys)
        self.needs = (*queries.values(), *keys.values())
        for name in queries:
            self.register_buffer(f"queue_{name}", torch.zeros(options.queue, width))
        self.register_buffer("queue_ids", torch.full((options.queue,), -1, dtype=torch.int64))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.int64))
        self.register_buffer("filled", torch.zeros((), dtype=torch.int64))

    def forward(self, embeddings: Embeddings, comm: Comm) -> Term:
        present = embeddings.present(*(need.view for need in self.needs))
        groups = embeddings.batch.groups
        filled = int(self.filled)
        cohort = {}
        for name, query in self.queries.items():
            keys = embeddings.get(self.keys[name])
            every = all_rows(keys, present, comm)
            queue = getattr(self, f"queue_{name}")[:filled].to(keys.dtype)
            cohort[name] = _Member(embeddings.get(query)[present], keys[present], every, queue)
        every_group = all_rows(groups, present, comm)
        own, masked = self._targets(present, groups, every_group, filled, comm)
        logits = {(a, b): self._logits(cohort[a], cohort[b], masked) for a in cohort for b in cohort}
        losses = self._sums(logits, own, masked, comm)
        weights = self.options.model_dump(include=set(losses))
        metrics = {f"loss/{name}": value.detach() for name, value in losses.items()}
        metrics["rows"] = comm.sum(present.sum())
        pending: dict[str, Any] = {name: member.every_key.detach() for name, member in cohort.items()}
        total = torch.stack([weights[name] * value for name, value in losses.items()]).sum()
        return Term(total, metrics, {"keys": pending, "ids": every_group[:, 0]} if self.options.queue else {})

    def _targets(
        self, present: Tensor, groups: Tensor, every_group: Tensor, filled: int, comm: Comm
    ) -> tuple[Tensor, Tensor]:
        """The column of each row's positive, ``(n,)``, and bool ``(n, columns)``: columns that are left out."""
        own = groups[present]
        if self.options.queue:
            same = (own[:, :1] == self.queue_ids[:filled]) & (own[:, :1] >= 0)
            return torch.zeros(len(own), dtype=torch.int64, device=own.device), F.pad(same, (1, 0))
        number = comm.index(len(present), device=present.device)
        itself = number[present][:, None] == all_rows(number, present, comm)
        # argmax takes no bool on some devices, and no row without columns
        column = itself.int().argmax(1) if itself.numel() else number[:0]
        same = ((own[:, None] == every_group) & (every_group >= 0)).any(2)
        return column, same & ~itself

    def _logits(self, a: _Member, b: _Member, masked: Tensor) -> Tensor:
        """ℓ_ab, ``(n, columns)``, the left out at −inf."""
        with torch.autocast(a.queries.device.type, enabled=False):
            if self.options.queue:
                positives = (a.queries * b.keys).sum(1, keepdim=True)
                cosines = torch.cat([positives, a.queries @ b.queue.T], 1)
            else:
                cosines = a.queries @ b.every_key.T
            return (cosines / self.options.temperature).masked_fill(masked, -torch.inf)

    def _sums(
        self, logits: Mapping[tuple[str, str], Tensor], own: Tensor, masked: Tensor, comm: Comm
    ) -> dict[str, Tensor]:
        def mean(values: Tensor) -> Tensor:
            return comm.mean(values, torch.ones_like(values, dtype=torch.bool))

        def contrast(a: str, b: str) -> Tensor:
            return mean(-logits[a, b].log_softmax(1).gather(1, own[:, None])[:, 0])

        def imitate(student: tuple[str, str], teacher: tuple[str, str]) -> Tensor:
            t = self.options.soft_temperature
            q, p = (logits[student] / t).log_softmax(1), (logits[teacher].detach() / t).log_softmax(1)
            return t**2 * mean((p.exp() * (p - q).masked_fill(masked, 0)).sum(1))

        ordered = list(permutations(self.queries, 2))
        nothing = next(iter(logits.values())).new_zeros(())
        return {
            "vcl": sum((contrast(a, a) for a in self.queries), nothing),
            "icl": sum((contrast(a, b) for a, b in ordered), nothing),
            "soft_vcl": sum((imitate((a, a), (b, b)) for a, b in ordered), nothing),
            "soft_icl": sum((imitate((a, b), (b, a)) for a, b in ordered), nothing),
        }

    @torch.no_grad()
    def commit(self, pending: Mapping[str, Any]) -> None:
        """Enqueues this step's keys, the newest over the oldest."""
        if not pending or len(pending["ids"]) == 0:
            return
        size = self.options.queue
        ids = pending["ids"][-size:]
        places = (self.pointer + torch.arange(len(ids), device=ids.device)) % size
        self.queue_ids[places] = ids
        for name, keys in pending["keys"].items():
            queue = getattr(self, f"queue_{name}")
            queue[places] = keys[-size:].to(queue.dtype)
        self.pointer.copy_((self.pointer + len(ids)) % size)
        self.filled.copy_((self.filled + len(ids)).clamp_max(size))


def build(options: MutualOptions, towers: Mapping[str, TowerInfo], path: str = "objectives.0") -> Mutual:
    """The objective for these towers.

    Raises:
        ConfigError: a tower is unknown, named twice or frozen, a queue of keys that still learn, or a contrast of a
            view with itself.
    """
    names = tuple(towers) if options.towers is None else options.towers
    for number, name in enumerate(names):
        where = f"{path}.towers.{number}"
        if name not in towers:
            raise unknown_name(where, name, towers)
        if name in names[:number]:
            raise ConfigError(f"{where}: {name!r} is already in the cohort")
        if not towers[name].trainable:
            raise ConfigError(f"{where}: {name!r} is frozen; a cohort learns together, name only trained towers")
    if options.keys == "online":
        if options.queue:
            raise ConfigError(f"{path}.queue: needs keys: momentum, keys of online towers grow stale; or set it to 0")
        if options.vcl and options.key_clip == 0 and options.augmentation == "none":
            raise ConfigError(f"{path}.vcl: query and key are one view; set key_clip or augmentation, or vcl to 0")
    copy = int(options.key_clip == 0 and options.augmentation != "none")
    queries, keys = {}, {}
    for name in names:
        spec = towers[name].spec
        queries[name] = Need(name, View(spec, 0, options.augmentation), ("joint",))
        keys[name] = Need(name, View(spec, options.key_clip, options.augmentation, copy), ("joint",), options.keys)
    return Mutual(options, queries, keys, towers[names[0]].joint_width)
