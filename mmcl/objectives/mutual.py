"""Mutual contrastive learning: a cohort of towers, each learning from the others' contrasts (MCL)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import permutations
from typing import Annotated, Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from mmcl.config import Options, unknown_name
from mmcl.distributed import Comm
from mmcl.losses import knowledge_distillation
from mmcl.objectives.base import Objective, Term
from mmcl.objectives.ranks import all_rows, classification, mean_over_ranks
from mmcl.objectives.weights import Weight
from mmcl.types import ConfigError, Embeddings, Need, TextSpec, TowerInfo, View


class MutualOptions(Options):
    """Mutual contrastive learning, without labels or with (MCL; Yang et al. 2022, arXiv 2104.12565).

    The towers are of one modality or, our addition, of several. With labels a sample's own key of another tower is a
    positive too; the authors' code for CIFAR leaves it out.

    Needs: towers that learn together, and momentum copies of them; with ``classes`` labels.
    """

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
    classes: Annotated[int, Field(ge=2)] | None = None
    """how many labels there are; rows without one take no part. In the batch all keys of a sample's class are its
    positives, from a queue they are left out. null: without labels"""
    classification: Annotated[float, Field(ge=0)] = 1.0
    """weight, with classes, of Σ_a CE of a linear classifier on the tower's ``pooled``"""
    vcl: Annotated[float, Field(ge=0)] | None = None
    """weight of Σ_a CE(ℓ_aa): each tower's own contrast; null: 1, with classes 0.1"""
    icl: Annotated[float, Field(ge=0)] | None = None
    """weight of Σ_(a≠b) CE(ℓ_ab): one tower's queries against another's keys; null: 1, with classes 0.1"""
    soft_vcl: Annotated[float, Field(ge=0)] = 1.0
    """weight of Σ_(a≠b) T² KL(ℓ_bb ‖ ℓ_aa), ℓ_bb detached"""
    soft_icl: Annotated[float, Field(ge=0)] = 1.0
    """weight of Σ_(a≠b) T² KL(ℓ_ba ‖ ℓ_ab), ℓ_ba detached"""
    ensemble: Annotated[float, Field(ge=0)] = 0.0
    """weight, with classes and two towers or more, of Σ_a T² KL(ȳ ‖ y_a): the logits of a classifier
    and, detached, the mean of all of them"""
    temperature: Annotated[float, Field(gt=0)] = 0.07
    """of the contrasts; the authors take 0.1 for labels in the batch"""
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


class _Columns(NamedTuple):
    """What the columns of ℓ_ab are to the rows of this rank."""

    own: Tensor
    """int64 ``(n,)``: each row's own key"""
    positives: Tensor | None
    """bool ``(n, columns)``, with own; None: own alone"""
    masked: Tensor
    """bool ``(n, columns)``: left out"""


class Mutual(Objective):
    """The four sums of the paper over joint embeddings, each the mean over rows of all ranks.

    ℓ_ab of row i holds the cosines, over the temperature, of query a with key b of the same sample and of its
    negatives. Queues hold the rows that all towers have, in draw order, so that their columns mean the same samples;
    they start empty. Samples of equal key, caption or group are no negatives in a batch, those of equal key in a queue.
    """

    queue_ids: Tensor
    queue_labels: Tensor
    pointer: Tensor
    filled: Tensor

    def __init__(
        self, options: MutualOptions, queries: Mapping[str, Need], keys: Mapping[str, Need], towers: Sequence[TowerInfo]
    ) -> None:
        super().__init__()
        self.options = options
        self.queries, self.keys = dict(queries), dict(keys)
        self.needs = (*queries.values(), *keys.values())
        for name in queries:
            self.register_buffer(f"queue_{name}", torch.zeros(options.queue, towers[0].joint_width))
        self.register_buffer("queue_ids", torch.full((options.queue,), -1, dtype=torch.int64))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.int64))
        self.register_buffer("filled", torch.zeros((), dtype=torch.int64))
        hard = 1.0 if options.classes is None else 0.1
        self.weights = {
            "vcl": hard if options.vcl is None else options.vcl,
            "icl": hard if options.icl is None else options.icl,
            "soft_vcl": options.soft_vcl,
            "soft_icl": options.soft_icl,
            "classification": options.classification,
            "ensemble": options.ensemble,
        }
        self.classifiers = nn.ModuleDict()
        if options.classes is not None:
            self.labels_option = "classes"
            self.register_buffer("queue_labels", torch.full((options.queue,), -1, dtype=torch.int64))
            self.classifiers.update({tower.name: nn.Linear(tower.width, options.classes) for tower in towers})

    def forward(self, embeddings: Embeddings, comm: Comm) -> Term:
        present = embeddings.present(*(need.view for need in self.needs))
        groups, labels = embeddings.batch.groups, embeddings.batch.labels
        if self.classifiers:
            present = present & (labels >= 0)
        filled = int(self.filled)
        cohort = {}
        for name, query in self.queries.items():
            keys = embeddings.get(self.keys[name])
            every = all_rows(keys, present, comm)
            queue = getattr(self, f"queue_{name}")[:filled].to(keys.dtype)
            cohort[name] = _Member(embeddings.get(query)[present], keys[present], every, queue)
        every_group = all_rows(groups, present, comm)
        columns = self._columns(present, groups, every_group, labels, comm)
        logits = {(a, b): self._logits(cohort[a], cohort[b], columns.masked) for a in cohort for b in cohort}
        losses = self._sums(logits, columns, comm)
        if self.classifiers:
            rows = {name: self.classifiers[name](embeddings.get(need, "pooled")) for name, need in self.queries.items()}
            each = [classification(row, labels, present, comm) for row in rows.values()]
            losses["classification"] = torch.stack(each).sum()
            if self.options.ensemble:
                losses["ensemble"] = self._ensemble([row[present] for row in rows.values()], comm)
        metrics = {f"loss/{name}": value.detach() for name, value in losses.items()}
        metrics["rows"] = comm.sum(present.sum())
        pending: dict[str, Any] = {name: member.every_key.detach() for name, member in cohort.items()}
        total = torch.stack([self.weights[name] * value for name, value in losses.items()]).sum()
        if not self.options.queue:
            return Term(total, metrics)
        queued = {"keys": pending, "ids": every_group[:, 0]}
        if self.classifiers:
            queued["labels"] = all_rows(labels, present, comm)
        return Term(total, metrics, queued)

    def _ensemble(self, logits: Sequence[Tensor], comm: Comm) -> Tensor:
        """What the classifiers of own rows, ``(n, K)`` each, miss of their mean."""
        together, t = torch.stack(list(logits)).mean(0), self.options.soft_temperature
        each = [knowledge_distillation(own, together, temperature=t) for own in logits]
        return mean_over_ranks(torch.stack(each).sum(), len(together), comm)

    def _columns(self, present: Tensor, groups: Tensor, every_group: Tensor, labels: Tensor, comm: Comm) -> _Columns:
        own, classes = groups[present], labels[present]
        if self.options.queue:
            filled = int(self.filled)
            masked = (own[:, :1] == self.queue_ids[:filled]) & (own[:, :1] >= 0)
            if self.classifiers:
                masked = masked | (classes[:, None] == self.queue_labels[:filled])
            return _Columns(torch.zeros_like(own[:, 0]), None, F.pad(masked, (1, 0)))
        number = comm.index(len(present), device=present.device)
        itself = number[present][:, None] == all_rows(number, present, comm)
        # argmax takes no bool on some devices, and no row without columns
        column = itself.int().argmax(1) if itself.numel() else number[:0]
        same = ((own[:, None] == every_group) & (every_group >= 0)).any(2)
        if not self.classifiers:
            return _Columns(column, None, same & ~itself)
        positives = itself | (classes[:, None] == all_rows(labels, present, comm))
        return _Columns(column, positives, same & ~positives)

    def _logits(self, a: _Member, b: _Member, masked: Tensor) -> Tensor:
        """ℓ_ab, ``(n, columns)``, the left out at −inf."""
        with torch.autocast(a.queries.device.type, enabled=False):
            if self.options.queue:
                positives = (a.queries * b.keys).sum(1, keepdim=True)
                cosines = torch.cat([positives, a.queries @ b.queue.T], 1)
            else:
                cosines = a.queries @ b.every_key.T
            return (cosines / self.options.temperature).masked_fill(masked, -torch.inf)

    def _sums(self, logits: Mapping[tuple[str, str], Tensor], columns: _Columns, comm: Comm) -> dict[str, Tensor]:
        positives = columns.positives

        def mean(values: Tensor) -> Tensor:
            return comm.mean(values, torch.ones_like(values, dtype=torch.bool))

        def contrast(a: str, b: str) -> Tensor:
            log_shares = logits[a, b].log_softmax(1)
            if positives is None:
                return mean(-log_shares.gather(1, columns.own[:, None])[:, 0])
            return mean(-log_shares.masked_fill(~positives, 0).sum(1) / positives.sum(1))

        def imitate(student: tuple[str, str], teacher: tuple[str, str]) -> Tensor:
            t = self.options.soft_temperature
            q, p = (logits[student] / t).log_softmax(1), (logits[teacher].detach() / t).log_softmax(1)
            return t**2 * mean((p.exp() * (p - q).masked_fill(columns.masked, 0)).sum(1))

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
        if "labels" in pending:
            self.queue_labels[places] = pending["labels"][-size:]
        for name, keys in pending["keys"].items():
            queue = getattr(self, f"queue_{name}")
            queue[places] = keys[-size:].to(queue.dtype)
        self.pointer.copy_((self.pointer + len(ids)) % size)
        self.filled.copy_((self.filled + len(ids)).clamp_max(size))


def build(options: MutualOptions, towers: Mapping[str, TowerInfo], path: str = "objectives.0") -> Mutual:
    """The objective for these towers.

    Raises:
        ConfigError: a tower is unknown, named twice or frozen, a queue of keys that still learn, a contrast of a view
            with itself, or an ensemble without classes or of one tower.
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
    if options.ensemble and (options.classes is None or len(names) < 2):
        raise ConfigError(f"{path}.ensemble: {options.ensemble}, but it needs classes and two towers or more")
    if options.keys == "online":
        if options.queue:
            raise ConfigError(f"{path}.queue: needs keys: momentum, keys of online towers grow stale; or set it to 0")
        if options.vcl != 0 and options.key_clip == 0 and options.augmentation == "none":
            raise ConfigError(f"{path}.vcl: query and key are one view; set key_clip or augmentation, or vcl to 0")
    queries, keys = {}, {}
    levels = ("joint",) if options.classes is None else ("joint", "pooled")
    for name in names:
        spec = towers[name].spec
        clip = 0 if isinstance(spec, TextSpec) else options.key_clip  # text lies in no time
        copy = int(clip == 0 and options.augmentation != "none")
        queries[name] = Need(name, View(spec, 0, options.augmentation), levels)
        keys[name] = Need(name, View(spec, clip, options.augmentation, copy), ("joint",), options.keys)
    cohort = Mutual(options, queries, keys, [towers[name] for name in names])
    if len(names) == 1:
        cohort.remarks = (f"{path}.towers: {names[0]!r} alone is plain MoCo, nobody is there to learn from",)
    return cohort
