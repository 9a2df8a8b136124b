"""A student copies a frozen teacher's predictions, features, maps or relations: the collection of RepDistiller.

All in one stage: where the papers first train the student on the teacher alone (activation boundaries, flow, factors),
this term simply runs beside the others. The objective ``contrastive_distillation`` is the collection's own method.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from mmcl import losses
from mmcl.config import Options
from mmcl.distributed import Comm
from mmcl.objectives.base import Objective, Term
from mmcl.objectives.compositional_distillation import check_student_and_teachers
from mmcl.objectives.ranks import all_rows, classification, mean_over_ranks
from mmcl.objectives.weights import Weight
from mmcl.types import TIMED, ConfigError, Embeddings, Level, Need, TowerInfo, VectorSpec, View

MethodName: TypeAlias = Literal[
    "knowledge_distillation",
    "hint",
    "variational_information",
    "activation_boundary",
    "similarity_preserving",
    "relational",
    "probabilistic_transfer",
    "correlation_congruence",
    "attention_transfer",
    "factor_transfer",
    "neuron_selectivity",
    "flow",
    "kdsvd",
]


class _Method(NamedTuple):
    reads: Literal["logits", "features", "relations", "maps", "flow"]
    strength: float
    """the authors' weight, or that of the collection's scripts (arXiv 1910.10699)"""


METHODS: Mapping[str, _Method] = {
    "knowledge_distillation": _Method("logits", 0.9),
    "hint": _Method("features", 100.0),
    "variational_information": _Method("features", 1.0),
    "activation_boundary": _Method("features", 0.003),
    "similarity_preserving": _Method("relations", 3000.0),
    "relational": _Method("relations", 1.0),
    "probabilistic_transfer": _Method("relations", 30_000.0),
    "correlation_congruence": _Method("relations", 0.02),
    "attention_transfer": _Method("maps", 1000.0),
    "factor_transfer": _Method("maps", 200.0),
    "neuron_selectivity": _Method("maps", 50.0),
    "flow": _Method("flow", 50.0),
    "kdsvd": _Method("flow", 1.0),
}


class DistillationOptions(Options):
    """One teacher, one of 13 methods, as collected by Tian et al. 2020 (arXiv 1910.10699).

    Further teachers and methods are further objectives in the list. All run in one stage, beside the others: the papers
    of activation_boundary, flow and factor_transfer first train the student on the teacher alone.

    Needs: a student that learns and one frozen teacher (a tower, or for methods without maps embeddings stored in the
    shards); with ``classes`` labels.
    """

    name: Literal["distillation"] = "distillation"
    weight: Weight = 1.0
    method: MethodName
    student: str = "video"
    teacher: str
    """a frozen tower (``lock: with_head``); it sees the student's time window"""
    levels: tuple[tuple[Level, Level], ...] = ()
    """pairs (student's, teacher's) of ``pooled``, ``joint``, ``tokens``, ``stage:NAME``, whose losses are added up;
    flow and kdsvd take exactly two, one after the other. Empty: pooled, or tokens for methods that compare maps"""
    strength: Annotated[float, Field(ge=0)] | None = None
    """weight of the method beside the cross-entropy; null: the authors'"""
    classes: Annotated[int, Field(ge=2)] | None = None
    """how many labels there are: adds the cross-entropy of a linear classifier on the student's ``pooled``;
    knowledge_distillation needs it"""
    classification_weight: Annotated[float, Field(ge=0)] | None = None
    """of the cross-entropy; null: 0.1 for knowledge_distillation, else 1"""
    temperature: Annotated[float, Field(gt=0)] = 4.0
    """of knowledge_distillation"""
    margin: Annotated[float, Field(gt=0)] = 1.0
    """of activation_boundary"""


class Regressor(nn.Module):
    """The student's features in the teacher's width: three linear maps and the log-variance of what they miss (VID)."""

    def __init__(self, width: int, teacher_width: int) -> None:
        super().__init__()
        widths = (width, teacher_width, teacher_width)
        self.linears = nn.ModuleList(nn.Linear(w, teacher_width, bias=False) for w in widths)
        self.scale = nn.Parameter(torch.full((teacher_width,), math.log(math.expm1(5.0))))

    def forward(self, x: Tensor) -> Tensor:
        first, second, third = self.linears
        out: Tensor = third(F.relu(second(F.relu(first(x)))))
        return out


class Factors(nn.Module):
    """Factor transfer's paraphraser, trained to give the teacher's map back, and the student's translator."""

    def __init__(self, width: int, teacher_width: int) -> None:
        super().__init__()
        factors = max(teacher_width // 2, 1)
        self.translate = self._layers(width, factors)
        self.paraphrase = self._layers(teacher_width, factors)
        self.restore = nn.Linear(factors, teacher_width)

    @staticmethod
    def _layers(width: int, factors: int) -> nn.Sequential:
        return nn.Sequential(nn.Linear(width, factors), nn.LeakyReLU(0.1), nn.Linear(factors, factors))

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        factors = self.paraphrase(teacher)
        transfer = losses.factor_transfer(self.translate(student), factors)
        return transfer + losses.hint(self.restore(factors), teacher)


class Distillation(Objective):
    """Teacher rows are detached. Rows count where both towers have them; the cross-entropy, where there is a label."""

    def __init__(
        self,
        options: DistillationOptions,
        student: Need,
        teacher: Need,
        levels: tuple[tuple[Level, Level], ...],
        widths: tuple[tuple[int, int], ...],
        pooled_widths: tuple[int, int],
    ) -> None:
        super().__init__()
        self.options, self.student, self.teacher, self.levels = options, student, teacher, levels
        self.needs = (student, teacher)
        self.method = METHODS[options.method]
        self.parts = nn.ModuleList(self._part(options.method, *pair) for pair in widths)
        classes = options.classes
        self.labels_option = None if classes is None else "classes"
        self.classify = None if classes is None else nn.Linear(pooled_widths[0], classes)
        # a frozen tower predicts no classes: a linear probe on it, trained beside the student, does
        probed = self.method.reads == "logits" and classes is not None
        self.probe = nn.Linear(pooled_widths[1], classes or 0) if probed else None

    @staticmethod
    def _part(method: str, width: int, teacher_width: int) -> nn.Module:
        """What one pair of levels needs of its own."""
        if method == "variational_information":
            return Regressor(width, teacher_width)
        if method == "factor_transfer":
            return Factors(width, teacher_width)
        if method in ("hint", "activation_boundary", "correlation_congruence"):
            return nn.Linear(width, teacher_width)
        return nn.Identity()

    def forward(self, embeddings: Embeddings, comm: Comm) -> Term:
        both = embeddings.present(self.student.view, self.teacher.view)
        strength = self.method.strength if self.options.strength is None else self.options.strength
        parts: dict[str, Tensor] = {}
        logits = []
        if self.classify is not None:
            weight = self.options.classification_weight
            weight = (1.0 if self.probe is None else 0.1) if weight is None else weight
            logits.append(self.classify(embeddings.get(self.student, "pooled")))
            rows = embeddings.present(self.student.view)
            parts["classification"] = weight * classification(logits[0], embeddings.batch.labels, rows, comm)
        if self.probe is not None:
            logits.append(self.probe(embeddings.get(self.teacher, "pooled").detach()))
            rows = embeddings.present(self.teacher.view)
            parts["probe"] = classification(logits[1], embeddings.batch.labels, rows, comm)
            student, teacher = logits
            own = losses.knowledge_distillation(student[both], teacher[both], temperature=self.options.temperature)
            parts[self.options.method] = strength * mean_over_ranks(own, len(student[both]), comm)
        else:
            pairs = [
                (embeddings.get(self.student, s), embeddings.get(self.teacher, t).detach()) for s, t in self.levels
            ]
            parts[self.options.method] = strength * self._copy(pairs, both, comm)
        metrics = {f"loss/{name}": value.detach() for name, value in parts.items()}
        metrics["pairs"] = comm.sum(both.sum())
        return Term(torch.stack(list(parts.values())).sum(), metrics)

    def _copy(self, pairs: list[tuple[Tensor, Tensor]], both: Tensor, comm: Comm) -> Tensor:
        """The method's loss over rows of all ranks, without its strength."""
        if self.method.reads == "relations":
            each = zip(self.parts, pairs, strict=True)
            values = [self._relate(part, all_rows(s, both, comm), all_rows(t, both, comm)) for part, (s, t) in each]
            return torch.stack(values).sum()
        own = [(s[both], t[both]) for s, t in pairs]
        if self.method.reads == "flow":
            (s, t), (u, w) = own
            loss = {"flow": losses.flow, "kdsvd": losses.kdsvd}[self.options.method]
            value = loss(*_as_maps(*_one_grid(s, u)), *_as_maps(*_one_grid(t, w)))
        else:
            each = zip(self.parts, own, strict=True)
            value = torch.stack([self._compare(part, *_one_grid(s, t)) for part, (s, t) in each]).sum()
        return mean_over_ranks(value, len(own[0][0]), comm)

    def _relate(self, part: nn.Module, student: Tensor, teacher: Tensor) -> Tensor:
        if self.options.method == "relational":
            distance, angle = losses.relational_distance(student, teacher), losses.relational_angle(student, teacher)
            return 25 * distance + 50 * angle
        loss: Callable[[Tensor, Tensor], Tensor] = getattr(losses, self.options.method)
        return loss(part(student), teacher)

    def _compare(self, part: nn.Module, student: Tensor, teacher: Tensor) -> Tensor:
        """Of own rows; ``(B, D)`` or ``(B, …grid…, D)``."""
        if student.shape[1:-1] != teacher.shape[1:-1]:
            raise ConfigError(
                f"distillation: {self.student.tower!r} and {self.teacher.tower!r} have maps of different grids, "
                f"{tuple(student.shape[1:-1])} and {tuple(teacher.shape[1:-1])}"
            )
        student, teacher = _as_maps(student, teacher)
        if isinstance(part, Regressor):
            return losses.variational_information(part(student), part.scale, teacher)
        if isinstance(part, Factors):
            value: Tensor = part(student, teacher)
            return value
        if self.options.method == "activation_boundary":
            return losses.activation_boundary(part(student), teacher, margin=self.options.margin)
        loss: Callable[[Tensor, Tensor], Tensor] = getattr(losses, self.options.method)
        return loss(part(student), teacher)


def _one_grid(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Maps ``(B, …grid…, D)`` of equally many axes, averaged down to the smaller grid axis by axis; others as given.

    Tokens have one axis whose meaning is not known, so they are left alone.
    """
    if a.ndim != b.ndim or a.ndim < 4 or a.shape[1:-1] == b.shape[1:-1]:
        return a, b
    smaller: Any = [min(pair) for pair in zip(a.shape[1:-1], b.shape[1:-1], strict=True)]
    pool: Any = F.adaptive_avg_pool2d if a.ndim == 4 else F.adaptive_avg_pool3d
    return pool(a.movedim(-1, 1), smaller).movedim(1, -1), pool(b.movedim(-1, 1), smaller).movedim(1, -1)


def _as_maps(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """``(B, …grid…, D)`` to ``(B, L, D)``; ``(B, D)`` stays."""
    return (a, b) if a.ndim == 2 else (a.flatten(1, -2), b.flatten(1, -2))


def build(options: DistillationOptions, towers: Mapping[str, TowerInfo], path: str = "objectives.0") -> Distillation:
    """The objective for these towers.

    Raises:
        ConfigError: an unknown tower or level, a frozen student, a teacher that is not, levels the method cannot take.
    """
    check_student_and_teachers(options.student, (options.teacher,), towers, path)
    student, teacher = towers[options.student], towers[options.teacher]
    reads = METHODS[options.method].reads
    if reads == "logits" and options.classes is None:
        raise ConfigError(f"{path}.classes: {options.method} compares class predictions; say how many labels there are")
    default = {"maps": (("tokens", "tokens"),), "flow": (), "logits": ()}.get(reads, (("pooled", "pooled"),))
    levels = options.levels or default
    if reads == "flow" and len(levels) != 2:
        raise ConfigError(f"{path}.levels: {options.method} takes two pairs, one after the other, got {len(levels)}")
    widths = []
    for number, pair in enumerate(levels):
        where = f"{path}.levels.{number}"
        for side, level, tower in zip(("student", "teacher"), pair, (student, teacher), strict=True):
            _check_level(level, tower, options.method, where, side)
        if (pair[0] in FLAT) != (pair[1] in FLAT):
            raise ConfigError(f"{where}: {pair[0]!r} and {pair[1]!r}: only one of them has positions")
        widths.append((width_of(student, pair[0]), width_of(teacher, pair[1])))
        if reads == "flow" and widths[-1][0] != widths[-1][1]:
            raise ConfigError(
                f"{where}: {options.method} needs equal channels, got {widths[-1][0]} and {widths[-1][1]}"
            )
    if reads == "flow" and any(len({level == "tokens" for level in side}) > 1 for side in zip(*levels, strict=True)):
        raise ConfigError(f"{path}.levels: {options.method} compares stages of one kind, not tokens with a stage")
    wanted = [[pair[side] for pair in levels] for side in (0, 1)]
    if options.classes is not None:
        wanted[0].append("pooled")
        wanted[1] += ["pooled"] if reads == "logits" else []
    needs = [
        Need(tower.name, View(tower.spec), tuple(dict.fromkeys(names)))
        for tower, names in zip((student, teacher), wanted, strict=True)
    ]
    pooled_widths = (student.width, teacher.width)
    return Distillation(options, needs[0], needs[1], tuple(levels), tuple(widths), pooled_widths)


FLAT = ("joint", "pooled")


def width_of(tower: TowerInfo, level: Level) -> int:
    """``D`` of a level."""
    if level.startswith("stage:"):
        return dict(tower.stages)[level.removeprefix("stage:")]
    return tower.joint_width if level == "joint" else tower.width


def _check_level(level: Level, tower: TowerInfo, method: str, path: str, side: str) -> None:
    reads = METHODS[method].reads
    flat = ("pooled",) if isinstance(tower.spec, VectorSpec) else FLAT
    maps = [] if not isinstance(tower.spec, TIMED) else ["tokens", *(f"stage:{name}" for name, _ in tower.stages)]
    allowed = {"features": [*flat, *maps], "maps": maps, "flow": maps, "logits": []}.get(reads, list(flat))
    if level not in allowed:
        raise ConfigError(
            f"{path}: the {side} {tower.name!r} offers {method} no level {level!r}; "
            f"allowed: {', '.join(allowed) or 'none'}"
        )
