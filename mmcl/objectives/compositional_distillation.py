"""Compositional contrastive learning: a video student learns from frozen teachers of sound and pictures (CCL)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from mmcl.config import Options, unknown_name
from mmcl.distributed import Comm
from mmcl.losses import jeffreys, jensen_shannon
from mmcl.losses.class_nce import class_nce_rows
from mmcl.objectives.base import Objective, Term
from mmcl.objectives.ranks import all_rows, classification, mean_over_ranks
from mmcl.objectives.weights import Weight
from mmcl.types import ConfigError, Embeddings, Need, TowerInfo, VectorSpec, View


class CompositionalDistillationOptions(Options):
    """Compositional contrastive distillation, with class labels or, our addition, without (CCL; Chen et al. 2021, arXiv
    2104.10955).

    Needs: a student that learns, one or more frozen teachers (towers, or embeddings stored in the shards); with
    ``classes`` labels.
    """

    name: Literal["compositional_distillation"] = "compositional_distillation"
    weight: Weight = 1.0
    student: str = "video"
    """the tower that learns"""
    teachers: Annotated[tuple[str, ...], Field(min_length=1)]
    """frozen towers (``lock: with_head``); they see the student's time window. A tower ``precomputed`` gives embeddings
    that are stored in the shards; a sample without one is a row without that teacher"""
    level: Literal["pooled", "joint"] = "pooled"
    """what student and teachers are compared by"""
    classes: Annotated[int, Field(ge=2)] | None = None
    """how many labels there are; rows without one take no part. null: every sample is its own class"""
    temperatures: dict[str, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)
    """of the contrast with each teacher; default 0.5 for a teacher of audio, 0.1 for others"""
    alignment: Literal["jeffreys", "jensen_shannon"] = "jeffreys"
    """how predictions are compared: ½ of Jeffreys' divergence as the authors' code has it, or true Jensen-Shannon"""
    teacher_weight: Annotated[float, Field(ge=0)] | None = None
    """λ on all that teachers say to the student; null: 1 with one teacher, 0.5 with several"""


class Composition(nn.Module):
    """u = t + W [t/|t| ; v/|v|]: a teacher's rows, moved by what the student adds; with a class prediction of u."""

    def __init__(self, teacher_width: int, width: int, classes: int | None) -> None:
        super().__init__()
        same = teacher_width == width
        self.project = nn.Identity() if same else nn.Linear(teacher_width, width)
        self.mix = nn.Linear(2 * width, width)
        self.classify = None if classes is None else nn.Linear(width, classes)

    def forward(self, teacher: Tensor, student: Tensor) -> tuple[Tensor, Tensor]:
        """``(B, D')`` and ``(B, D)`` to the teacher's rows in the student's width and the composed rows, ``(B, D)``."""
        t = self.project(teacher)
        return t, t + self.mix(torch.cat([F.normalize(t, dim=1), F.normalize(student, dim=1)], 1))


class _Rows(NamedTuple):
    """Which rows contrast with one teacher, on this rank and on all."""

    present: Tensor
    """bool ``(B,)``"""
    same: Tensor
    """bool ``(rows of this rank, rows of all ranks)``: of one class"""
    different: Tensor
    labels: Tensor
    """int64 ``(B,)``"""


class CompositionalDistillation(Objective):
    """Student: L_v = CE(v) + λ Σ [S(v,u) + S(v,t) + J(v,u)]; composition: L_u = CE(u) + S(v,u) + S(u,t) + J(v,u).

    S is the class-aware NCE in both directions, J the alignment of class predictions. The student receives ∂L_v alone;
    a composition receives ∂(L_u + L_v): L_u is evaluated on the student's detached outputs.

    Without labels every sample is its own class, samples of equal key, caption or group stay out of each other's
    softmax, the cross-entropies fall away, and J compares the students' and the composed rows' softmaxes of cosines
    with all teacher rows.
    """

    def __init__(
        self,
        options: CompositionalDistillationOptions,
        student: Need,
        teachers: Mapping[str, Need],
        widths: Mapping[str, int],
        temperatures: Mapping[str, float],
    ) -> None:
        super().__init__()
        self.options = options
        self.student, self.teachers, self.temperatures = student, dict(teachers), dict(temperatures)
        self.needs = (student, *teachers.values())
        self.labels_option = None if options.classes is None else "classes"
        width = widths[student.tower]
        self.classify = None if options.classes is None else nn.Linear(width, options.classes)
        self.compositions = nn.ModuleDict(
            {name: Composition(widths[name], width, options.classes) for name in teachers}
        )

    def forward(self, embeddings: Embeddings, comm: Comm) -> Term:
        options = self.options
        rows = embeddings.present(self.student.view)
        if options.classes is not None:
            rows = rows & (embeddings.batch.labels >= 0)
        student = embeddings.get(self.student)
        predicted = None if self.classify is None else self.classify(student)
        losses = {"student": self._classification(predicted, embeddings.batch.labels, rows, comm)}
        weight = options.teacher_weight
        weight = (1.0 if len(self.teachers) == 1 else 0.5) if weight is None else weight
        metrics = {}
        for name, need in self.teachers.items():
            chosen = self._rows(embeddings, rows & embeddings.present(need.view), comm)
            teacher = embeddings.get(need).detach()
            to_student, to_composition = self._teach(name, student, predicted, teacher, chosen, comm)
            losses["student"] = losses["student"] + weight * to_student
            losses[f"composition/{name}"] = to_composition
            metrics[f"pairs/{name}"] = comm.sum(chosen.present.sum())
        metrics.update({f"loss/{name}": loss.detach() for name, loss in losses.items()})
        return Term(torch.stack(list(losses.values())).sum(), metrics)

    def _teach(
        self, name: str, v: Tensor, predicted: Tensor | None, teacher: Tensor, rows: _Rows, comm: Comm
    ) -> tuple[Tensor, Tensor]:
        """What one teacher adds to L_v, and its L_u."""
        composition = self.compositions[name]
        assert isinstance(composition, Composition)
        temperature = self.temperatures[name]

        def contrast(f: Tensor, g: Tensor) -> Tensor:
            pairs = ((f, g), (g, f))
            values = [
                class_nce_rows(a[rows.present], all_rows(b, rows.present, comm), rows.same, rows.different, temperature)
                for a, b in pairs
            ]
            return comm.mean(values[0] + values[1], torch.ones_like(values[0], dtype=torch.bool))

        def align(v: Tensor, u: Tensor, t: Tensor, v_classes: Tensor | None, u_classes: Tensor | None) -> Tensor:
            if v_classes is None or u_classes is None:
                anchors = F.normalize(all_rows(t.detach(), rows.present, comm), dim=1)
                with torch.autocast(v.device.type, enabled=False):  # no product of a temperature this low in bf16
                    wide = anchors if anchors.dtype == torch.float64 else anchors.float()
                    v_classes, u_classes = (F.normalize(x.to(wide), dim=1) @ wide.T / temperature for x in (v, u))
            divergence = {"jeffreys": jeffreys, "jensen_shannon": jensen_shannon}[self.options.alignment]
            value = divergence(v_classes[rows.present], u_classes[rows.present])
            return mean_over_ranks(value, len(rows.same), comm)

        def predict(u: Tensor) -> Tensor | None:
            return None if composition.classify is None else composition.classify(u)

        t, u = composition(teacher, v)
        to_student = contrast(v, u) + contrast(v, t) + align(v, u, t, predicted, predict(u))
        v, predicted = v.detach(), None if predicted is None else predicted.detach()
        t, u = composition(teacher, v)
        u_classes = predict(u)
        to_composition = contrast(v, u) + contrast(u, t) + align(v, u, t, predicted, u_classes)
        return to_student, to_composition + self._classification(u_classes, rows.labels, rows.present, comm)

    def _classification(self, logits: Tensor | None, labels: Tensor, rows: Tensor, comm: Comm) -> Tensor:
        return torch.zeros((), device=labels.device) if logits is None else classification(logits, labels, rows, comm)

    def _rows(self, embeddings: Embeddings, present: Tensor, comm: Comm) -> _Rows:
        batch = embeddings.batch
        if self.options.classes is not None:
            own, every = batch.labels[present], all_rows(batch.labels, present, comm)
            same = own[:, None] == every
            return _Rows(present, same, ~same, batch.labels)
        number = comm.index(len(batch), device=present.device)
        own, every = number[present], all_rows(number, present, comm)
        same = own[:, None] == every
        groups, others = batch.groups[present], all_rows(batch.groups, present, comm)
        shared = (groups[:, None] == others) & (others >= 0)
        return _Rows(present, same, ~same & ~shared.any(2), batch.labels)


def build(
    options: CompositionalDistillationOptions, towers: Mapping[str, TowerInfo], path: str = "objectives.0"
) -> CompositionalDistillation:
    """The objective for these towers.

    Raises:
        ConfigError: a tower is unknown or comes twice, the student is frozen, or a teacher is not.
    """
    check_student_and_teachers(options.student, options.teachers, towers, path, level=options.level)
    for name in options.temperatures:
        if name not in options.teachers:
            raise unknown_name(f"{path}.temperatures", name, options.teachers)
    used = {name: towers[name] for name in (options.student, *options.teachers)}
    needs = {name: Need(name, View(tower.spec), (options.level,)) for name, tower in used.items()}
    return CompositionalDistillation(
        options,
        needs[options.student],
        {name: needs[name] for name in options.teachers},
        {name: tower.width if options.level == "pooled" else tower.joint_width for name, tower in used.items()},
        {
            name: options.temperatures.get(name, 0.5 if towers[name].modality == "audio" else 0.1)
            for name in options.teachers
        },
    )


def check_student_and_teachers(
    student: str, teachers: tuple[str, ...], towers: Mapping[str, TowerInfo], path: str, *, level: str = "pooled"
) -> None:
    """ConfigError unless all are towers, each named once, the student trained, the teachers frozen, and stored
    embeddings compared as they are.
    """
    places = [(f"{path}.student", student), *((f"{path}.teachers.{i}", name) for i, name in enumerate(teachers))]
    for number, (where, name) in enumerate(places):
        if name not in towers:
            raise unknown_name(where, name, towers)
        if name in [other for _, other in places[:number]]:
            raise ConfigError(f"{where}: {name!r} is already named as student or teacher")
        if name == student and not towers[name].trainable:
            raise ConfigError(f"{where}: {name!r} is frozen and learns nothing; set model.towers.{name}.lock to none")
        if name != student and (towers[name].trainable or towers[name].trainable_head):
            raise ConfigError(f"{where}: the teacher {name!r} is not frozen; set model.towers.{name}.lock to with_head")
        if level == "joint" and isinstance(towers[name].spec, VectorSpec):
            raise ConfigError(f"{path}.level: joint, but {name!r} holds stored embeddings; take pooled")
