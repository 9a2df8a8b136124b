"""CLIP made stronger: weak and strong views with projectors of their own, and what may be added to that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Annotated, Literal, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from mmcl.distributed import Comm, Form, contrastive
from mmcl.layers import MLPHead
from mmcl.losses import barlip, sinkhorn
from mmcl.losses._math import unit
from mmcl.losses.byol import cosine_rows
from mmcl.losses.swav import swapped_rows
from mmcl.objectives.base import Objective, Term
from mmcl.objectives.pairs import checked_pairs
from mmcl.objectives.ranks import all_rows
from mmcl.objectives.views import (
    Count,
    MethodOptions,
    Norm,
    NotNegative,
    PositiveFloat,
    PositiveInt,
    frozen_copy,
    log_sum_over_ranks,
    unit_rows,
)
from mmcl.objectives.weights import Weight
from mmcl.types import ConfigError, Embeddings, Kind, Need, TowerInfo, View

Method = Literal["rocket", "siamlip", "byolip", "barlip", "swalip"]

OWN_OPTIONS: Mapping[str, tuple[str, ...]] = {
    "predictor_hidden": ("siamlip", "byolip"),
    "redundancy": ("barlip",),
    "barlow_hidden": ("barlip",),
    "barlow_out": ("barlip",),
    "prototypes": ("swalip",),
    "epsilon": ("swalip",),
    "iterations": ("swalip",),
    "swap_temperature": ("swalip",),
}
"""option: the methods that have it"""

EXTRA = {"siamlip": 1.0, "byolip": 1.0, "barlip": 0.025, "swalip": 0.2}
"""what a method adds counts so much in the paper"""


class ImprovedOptions(MethodOptions):
    """CLIP-rocket and its baselines SiamLIP, BYOLIP, BarLIP and SwALIP, of any two towers (arXiv 2305.08675).

    A weak view of each side meets the other's in the model's joint space; ``strong`` further views of each side meet in
    a space of their own, each with each, by projectors, a temperature and smoothed targets of their own. The loss is
    (global + K · mean of the local ones) ÷ (1 + K), the mean of both directions. The other methods add to it:
    ``siamlip`` predicts the other side's rows, ``byolip`` those of momentum copies, ``barlip`` makes their columns
    agree one by one, ``swalip`` assigns the first side's views to the second's rows, evenly, and predicts that from the
    other views. Rows of all ranks learn: the authors' code gathers without a gradient, so that candidates get none.
    Retrieval and zero-shot use the global space.

    Needs: two towers, of which one learns, and in ``data.augmentations`` what makes views weak and strong; byolip
    momentum copies, of rate 0.99 in the paper (``train.momentum``).
    """

    name: Literal["improved"] = "improved"
    weight: Weight = 1.0
    pair: tuple[str, str]
    """the tower in the picture's place and the one in the text's"""
    method: Method = "rocket"
    strong: Annotated[int, Field(ge=0, le=8)] = 2
    """K, strong views of each side; 0: CLIP, and what the method adds"""
    weak_augmentation: dict[str, str] = Field(default_factory=dict)
    """tower: a name in ``data.augmentations``; none: as it is, the authors' texts"""
    strong_augmentation: dict[str, str] = Field(default_factory=dict)
    """tower: a name in ``data.augmentations``; each view is a draw of its own"""
    hidden: PositiveInt = 4096
    out: PositiveInt = 256
    norm: Norm = "batch"
    local_temperature: Annotated[float, Field(gt=0.01, le=10)] = 0.1
    """where the learned temperature of the strong views starts; that of the weak ones is the model's"""
    smoothing: Annotated[float, Field(ge=0, lt=1)] | None = None
    """share of the strong views' targets that is spread over all candidates; null: 0.1, for swalip 0"""
    extra: NotNegative | None = None
    """weight of what the method adds; null: 1, barlip 0.025, swalip 0.2"""
    predictor_hidden: PositiveInt = 4096
    """siamlip, byolip: inside predictors of two layers"""
    redundancy: NotNegative = 5e-3
    """barlip: weight of the correlations of different columns"""
    barlow_hidden: PositiveInt = 3000
    """barlip: inside its own projectors of ``layers`` layers"""
    barlow_out: PositiveInt = 8192
    prototypes: Count = 0
    """swalip: vectors that the strong views of both sides are assigned to, the other side predicts it (V1, 3000 in the
    paper); 0: the second side's rows of all ranks take their place, the first side's other views predict it"""
    epsilon: PositiveFloat = 0.05
    """swalip: strength of the entropy term of the assignment; smaller is sharper"""
    iterations: PositiveInt = 3
    """swalip: rounds of Sinkhorn's algorithm"""
    swap_temperature: PositiveFloat | None = None
    """swalip: of the predictions; null: the learned one of the strong views"""
    mask_false_negatives: bool = True
    """samples of equal key, caption or group are never each other's negatives"""

    @model_validator(mode="after")
    def _belongs(self) -> ImprovedOptions:
        for option, methods in OWN_OPTIONS.items():
            if getattr(self, option) != type(self).model_fields[option].default and self.method not in methods:
                raise ValueError(f"{option} belongs to method {' or '.join(methods)}, this one is {self.method}")
        if self.extra is not None and self.method == "rocket":
            raise ValueError("extra is the weight of what a method adds, and rocket adds nothing")
        return self


class _Side(NamedTuple):
    """What one tower is asked for."""

    weak: Need
    strong: tuple[Need, ...]
    momentum: tuple[Need, ...] = ()
    """of the weak view, then of the strong ones"""

    @property
    def views(self) -> tuple[Need, ...]:
        return (self.weak, *self.strong)


class _Heads(nn.Module):
    """One head per side and branch: for weak views and, where there are any, for strong ones."""

    def __init__(self, heads: Sequence[tuple[MLPHead, MLPHead | None]]) -> None:
        super().__init__()
        self.weak = nn.ModuleList(weak for weak, _ in heads)
        self.strong = nn.ModuleList(strong for _, strong in heads if strong is not None)

    def forward(self, rows: Sequence[Sequence[Tensor]], present: Tensor) -> list[list[Tensor]]:
        """Rows of each side, the weak view's first."""
        return [
            [self.weak[side](own[0], present), *(self.strong[side](x, present) for x in own[1:])]
            for side, own in enumerate(rows)
        ]


class Improved(Objective):
    """Global and local contrast; subclasses add to it. A sample counts where it has both sides."""

    def __init__(
        self, options: ImprovedOptions, sides: tuple[_Side, _Side], towers: tuple[TowerInfo, TowerInfo]
    ) -> None:
        super().__init__()
        self.options, self.sides = options, sides
        self.needs = tuple(dict.fromkeys(need for side in sides for need in (*side.views, *side.momentum)))
        name = "-".join(options.pair)
        self.global_scale, self.local_scale = name, f"{name}-local"
        self.scales = (name, self.local_scale) if options.strong else (name,)
        self.start_temperatures = {self.local_scale: options.local_temperature} if options.strong else {}
        projected = towers if options.strong else ()
        self.projectors = nn.ModuleList(options.projector(tower.width) for tower in projected)
        smoothing = (0.0 if options.method == "swalip" else 0.1) if options.smoothing is None else options.smoothing
        self.form = Form("clip_label_smoothing", smoothing=smoothing) if smoothing else Form()
        self.extra_weight = EXTRA.get(options.method, 0.0) if options.extra is None else options.extra

    def forward(self, embeddings: Embeddings, comm: Comm) -> Term:
        present = embeddings.present(*(need.view for side in self.sides for need in side.views))
        rows = [[embeddings.get(side.weak, "joint")] for side in self.sides]
        for own, side, projector in zip(rows, self.sides, self.projectors, strict=False):
            own += [projector(embeddings.get(need, "pooled"), present) for need in side.strong]
        weak = self._contrast(rows[0][0], rows[1][0], self.global_scale, Form(), embeddings, comm)
        metrics = {"loss/global": weak.detach(), "rows": comm.sum(present.sum())}
        loss, k = weak, self.options.strong
        if k:
            each = [
                self._contrast(a, b, self.local_scale, self.form, embeddings, comm)
                for a, b in product(rows[0][1:], rows[1][1:])
            ]
            strong = torch.stack(each).mean()
            metrics["loss/local"] = strong.detach()
            loss = (weak + k * strong) / (1 + k)
        extra = self.extra(rows, present, embeddings, comm)
        if extra is not None:
            metrics["loss/extra"] = extra.detach()
            loss = loss + self.extra_weight * extra
        return Term(loss, metrics)

    def extra(
        self, rows: Sequence[Sequence[Tensor]], present: Tensor, embeddings: Embeddings, comm: Comm
    ) -> Tensor | None:
        """What is added: 0-d, from the rows of each side, the weak view's first; rocket adds nothing."""
        return None

    def _contrast(self, a: Tensor, b: Tensor, scale: str, form: Form, embeddings: Embeddings, comm: Comm) -> Tensor:
        first, second = (embeddings.present(*(need.view for need in side.views)) for side in self.sides)
        return contrastive(
            a,
            b,
            scale=embeddings.scales[scale],
            comm=comm,
            present_a=first,
            present_b=second,
            groups=embeddings.batch.groups if self.options.mask_false_negatives else None,
            form=form,
        )

    def pairs(self, sides: Sequence[Sequence[Tensor]]) -> list[tuple[Tensor, Tensor]]:
        """Values of the weak views of both sides, then of each strong one with each."""
        return [(sides[0][0], sides[1][0]), *product(sides[0][1:], sides[1][1:])]


class Predicting(Improved):
    """Each side's rows predict the other's: those of its own network (SiamLIP) or of momentum copies (BYOLIP)."""

    def __init__(
        self, options: ImprovedOptions, sides: tuple[_Side, _Side], towers: tuple[TowerInfo, TowerInfo]
    ) -> None:
        super().__init__(options, sides, towers)

        def predictor(width: int) -> MLPHead:
            return MLPHead(width, options.predictor_hidden, width, layers=2, norm=options.norm)

        each = [(predictor(t.joint_width), predictor(options.out) if options.strong else None) for t in towers]
        self.predictors = _Heads(each)
        copied = self.projectors if options.method == "byolip" else ()
        self.momentum_projectors = nn.ModuleList(frozen_copy(x) for x in copied if isinstance(x, MLPHead))

    def extra(self, rows: Sequence[Sequence[Tensor]], present: Tensor, embeddings: Embeddings, comm: Comm) -> Tensor:
        predictions = self.pairs(self.predictors(rows, present))
        targets = self.pairs(self._targets(rows, present, embeddings))
        values = [
            2 - cosine_rows(p, target_b) - cosine_rows(q, target_a)
            for (p, q), (target_a, target_b) in zip(predictions, targets, strict=True)
        ]
        return comm.mean(torch.stack(values).mean(0), present)

    @torch.no_grad()
    def _targets(
        self, rows: Sequence[Sequence[Tensor]], present: Tensor, embeddings: Embeddings
    ) -> Sequence[Sequence[Tensor]]:
        if self.options.method == "siamlip":
            return rows
        found = [[embeddings.get(side.momentum[0], "joint")] for side in self.sides]
        for own, side, projector in zip(found, self.sides, self.momentum_projectors, strict=False):
            own += [projector(embeddings.get(need, "pooled"), present) for need in side.momentum[1:]]
        return found

    def ema_pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        return list(zip(self.projectors, self.momentum_projectors, strict=False))


class Correlating(Improved):
    """The columns of wide projections of both sides agree, and no others do (BarLIP)."""

    def __init__(
        self, options: ImprovedOptions, sides: tuple[_Side, _Side], towers: tuple[TowerInfo, TowerInfo]
    ) -> None:
        super().__init__(options, sides, towers)

        def projector(width: int) -> MLPHead:
            return MLPHead(width, options.barlow_hidden, options.barlow_out, layers=options.layers, norm=options.norm)

        each = [(projector(t.width), projector(t.width) if options.strong else None) for t in towers]
        self.wide = _Heads(each)

    def extra(self, rows: Sequence[Sequence[Tensor]], present: Tensor, embeddings: Embeddings, comm: Comm) -> Tensor:
        pooled = [[embeddings.get(need, "pooled") for need in side.views] for side in self.sides]
        values = [
            barlip(a[present], b[present], weight=1.0, redundancy=self.options.redundancy, over_ranks=comm.sum)
            for a, b in self.pairs(self.wide(pooled, present))
        ]
        return torch.stack(values).mean()


class Assigning(Improved):
    """Even assignments of strong views, predicted from others (SwALIP)."""

    def __init__(
        self, options: ImprovedOptions, sides: tuple[_Side, _Side], towers: tuple[TowerInfo, TowerInfo]
    ) -> None:
        super().__init__(options, sides, towers)
        self.prototypes = nn.Parameter(torch.randn(options.prototypes, options.out)) if options.prototypes else None

    def extra(self, rows: Sequence[Sequence[Tensor]], present: Tensor, embeddings: Embeddings, comm: Comm) -> Tensor:
        first, second = ([unit_rows(x) for x in own[1:]] for own in rows)
        temperature = self.options.swap_temperature
        scale = embeddings.scales[self.local_scale] if temperature is None else 1 / temperature
        with torch.autocast(present.device.type, enabled=False):
            if self.prototypes is not None:
                vectors = unit(self.prototypes).to(first[0].dtype)
                scores = [x[present] @ vectors.T for x in (*first, *second)]
                k = len(first)
                other = {view: range(k, 2 * k) if view < k else range(k) for view in range(2 * k)}
                values = self._swapped(scores, scale, other, comm)
            else:
                values = torch.stack(
                    [
                        self._swapped([x[present] @ texts.T for x in first], scale, None, comm)
                        for texts in (all_rows(x, present, comm) for x in second)
                    ]
                ).mean(0)
        return comm.mean(values, torch.ones_like(values, dtype=torch.bool))

    def _swapped(
        self, scores: Sequence[Tensor], scale: Tensor | float, by: Mapping[int, range] | None, comm: Comm
    ) -> Tensor:
        """``(B,)``: the codes of each view against what the views of ``by`` (None: all others) predict."""
        codes = {view: self._codes(each, comm) for view, each in enumerate(scores)}
        return swapped_rows(codes, [(scale * each).log_softmax(1) for each in scores], by)

    def _codes(self, scores: Tensor, comm: Comm) -> Tensor:
        over_ranks = log_sum_over_ranks(comm)
        return sinkhorn(scores, epsilon=self.options.epsilon, iterations=self.options.iterations, over_ranks=over_ranks)


KINDS: Mapping[str, type[Improved]] = {
    "rocket": Improved,
    "siamlip": Predicting,
    "byolip": Predicting,
    "barlip": Correlating,
    "swalip": Assigning,
}


def build(options: ImprovedOptions, towers: Mapping[str, TowerInfo], path: str = "objectives.0") -> Improved:
    """The objective for these towers.

    Raises:
        ConfigError: an unknown tower, the same twice, joint spaces of different width, augmentations of other towers,
            none that learns, or fewer strong views than the method compares; names ``path``.
    """
    checked_pairs((options.pair,), towers, path, options.name)
    for option in ("weak_augmentation", "strong_augmentation"):
        for name in getattr(options, option):
            if name not in options.pair:
                raise ConfigError(f"{path}.{option}: {name!r} is not in the pair {', '.join(options.pair)}")
    first, second = (towers[name] for name in options.pair)
    if not any(tower.trainable or tower.trainable_head for tower in (first, second)):
        raise ConfigError(f"{path}.pair: none of {', '.join(options.pair)} learns")
    fewest = 0 if options.method != "swalip" else 1 if options.prototypes else 2
    if options.strong < fewest:
        raise ConfigError(f"{path}.strong: {options.strong}, but swalip compares {fewest} at least; with prototypes 1")
    return KINDS[options.method](options, (_side(options, first), _side(options, second)), (first, second))


def _side(options: ImprovedOptions, tower: TowerInfo) -> _Side:
    weak_name, strong_name = (
        chosen.get(tower.name, "none") for chosen in (options.weak_augmentation, options.strong_augmentation)
    )
    weak_view = View(tower.spec, augmentation=weak_name)
    # numbered on, so that a strong view is a draw of its own also where both are of one augmentation
    strong_views = [View(tower.spec, augmentation=strong_name, copy=1 + i) for i in range(options.strong)]

    def needs(kind: Kind) -> tuple[Need, ...]:
        wide = options.method == "barlip"
        weak = Need(tower.name, weak_view, ("joint", "pooled") if wide else ("joint",), kind)
        return (weak, *(Need(tower.name, view, ("pooled",), kind) for view in strong_views))

    weak, *strong = needs("online")
    momentum = needs("momentum") if options.method == "byolip" else ()
    return _Side(weak, tuple(strong), momentum)
