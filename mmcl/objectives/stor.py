"""Two clips whose overlap in space and time is told by heads, and which predict each other (Zhang et al. 2022)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn

from mmcl.distributed import Comm
from mmcl.layers import MLPHead
from mmcl.objectives.base import Objective, Term
from mmcl.objectives.ranks import classification
from mmcl.objectives.view_methods import PredictionMethod, PredictionOptions
from mmcl.objectives.views import Norm, NotNegative, PositiveFloat, PositiveInt, ViewSet, learning_tower
from mmcl.objectives.weights import Weight
from mmcl.types import DEFAULT_OVERLAP, ConfigError, Embeddings, Overlap, TowerInfo, VideoSpec, View

Share = Annotated[float, Field(gt=0, le=1)]
QUARTERS = 4


class STOROptions(PredictionOptions):
    """CSTP: two clips of a video predict each other (BYOL), and heads tell how much the clips overlap in space and in
    time, how fast each plays and how it is turned (Zhang et al. 2022, arXiv 2112.08913).

    Needs: one video tower that learns, with at least two frames, and videos of several clips' length: where only the
    slowest clips fit in, only they are drawn. A video shorter than one clip has no time and no speed to tell; it is
    left out of these two losses and counts in the others. Keeps a momentum copy of the tower.

    Unlike the authors' code: pairs are placed as a whole, so that every rate is as frequent as any other and none shows
    in the speed or in the size of the crop; the second clip is read from where its label says (two of the three loaders
    read it from the start of the first); clips are mirrored, then turned, after they are cropped; videos that are too
    short have no label, instead of the label 0; heads have as many outputs as there are classes, a GELU, and batch norm
    over the rows of all ranks; the projector has no batch norm after its last layer. The moving average starts at 0.996
    and is constant in the paper: ``train.momentum``.
    """

    name: Literal["stor"] = "stor"
    weight: Weight = 1.0
    tower: str
    augmentation: str = "none"
    """a name in ``data.augmentations``; each clip is a draw of its own. It may not crop"""
    layers: Annotated[int, Field(ge=1, le=4)] = 2
    hidden: PositiveInt = 4096
    out: PositiveInt = 512
    norm: Norm = "batch"
    head_hidden: PositiveInt = 512
    """width inside the four heads"""
    byol: NotNegative = 0.1
    """weight of the prediction, the sum over both clips; of one head each:"""
    space: NotNegative = 1.0
    """weight of the overlap in space, told from both clips; 0: no such head"""
    time: NotNegative = 1.0
    """weight of the overlap in time, told from both clips; 0: no such head"""
    speed: NotNegative = 1.0
    """weight of the speed, the sum over both clips, which have the same; 0: no such head"""
    rotation: NotNegative = 1.0
    """weight of the quarter turns, the sum over both clips; 0: no such head, and clips are not turned"""
    rates: tuple[Annotated[float, Field(ge=0, le=1)], ...] = DEFAULT_OVERLAP.rates
    """shares of a clip's time, and of its crop's area, that the other clip shows too"""
    speeds: tuple[PositiveInt, ...] = DEFAULT_OVERLAP.speeds
    """a clip takes every such frame, at the tower's rate"""
    area: tuple[Share, Share] = DEFAULT_OVERLAP.area
    """share of the picture that a clip shows; much above 0.4 the smallest rates do not fit in, and crops that are drawn
    smaller for it tell them"""
    aspect: tuple[PositiveFloat, PositiveFloat] = DEFAULT_OVERLAP.aspect
    """width ÷ height of a crop"""
    oversample: Annotated[float, Field(ge=1, le=4)] = DEFAULT_OVERLAP.oversample
    """decode pictures this many times larger than the tower's, so that a small crop is not a blurred one"""

    @field_validator("rates", "speeds", "area", "aspect", mode="before")
    @classmethod
    def _tuple(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    @model_validator(mode="after")
    def _meaningful(self) -> STOROptions:
        for name in ("rates", "speeds"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{name} must be one or more different numbers, got {list(values)}")
        for name in ("area", "aspect"):
            low, high = getattr(self, name)
            if low > high:
                raise ValueError(f"{name} must be [smallest, largest], got {[low, high]}")
        return self

    def overlap(self) -> Overlap:
        """How pairs are drawn."""
        return Overlap(self.rates, self.speeds, self.rotation > 0, self.area, self.aspect, self.oversample)


class STOR(PredictionMethod):
    """The prediction of two clips by each other, and what heads tell of them."""

    def __init__(self, views: ViewSet, options: STOROptions) -> None:
        super().__init__(views, options, momentum=True)
        self.prediction_weight = options.byol
        width, pair, rates = views.tower.width, 2 * views.tower.width, len(options.rates)
        heads = {
            "overlap_space": (options.space, pair, rates),
            "overlap_time": (options.time, pair, rates),
            "speed": (options.speed, width, len(options.speeds)),
            "turns": (options.rotation, width, QUARTERS),
        }
        self.weights = {name: weight for name, (weight, _, _) in heads.items() if weight}
        self.heads = nn.ModuleDict(
            {
                name: MLPHead(wide, options.head_hidden, classes, norm="batch")
                for name, (weight, wide, classes) in heads.items()
                if weight
            }
        )
        self.watched = ("loss/byol", *(f"loss/{name}" for name in self.weights))

    def forward(self, embeddings: Embeddings, comm: Comm) -> Term:
        prediction = super().forward(embeddings, comm)
        metrics = {**prediction.metrics, "loss/byol": prediction.loss.detach()}
        loss = self.prediction_weight * prediction.loss
        features = [embeddings.get(need) for need in self.online.values()]
        params = [embeddings.batch.views[view].params for view in self.views]
        present = self.present(embeddings)
        for name, weight in self.weights.items():
            if name.startswith("overlap"):
                asked = [(torch.cat(features, dim=1), params[0][name])]
            else:
                asked = [(rows, labels[name]) for rows, labels in zip(features, params, strict=True)]
            told = [self._told(name, rows, labels, present, comm) for rows, labels in asked]
            term = torch.stack([value for value, _ in told]).sum()
            loss = loss + weight * term
            metrics[f"loss/{name}"] = term.detach()
            metrics[f"accuracy/{name}"] = torch.stack([right for _, right in told]).mean()
        return Term(loss, metrics, prediction.pending)

    def _told(self, name: str, rows: Tensor, labels: Tensor, present: Tensor, comm: Comm) -> tuple[Tensor, Tensor]:
        """Cross-entropy, and the share of right answers, of one head over the rows of all ranks that have a label."""
        known = present & (labels >= 0)
        logits = self.heads[name](rows, known)
        right = (logits.detach().argmax(1) == labels).to(rows.dtype)
        return classification(logits, labels, known, comm), comm.mean(right, known)


def build(options: STOROptions, towers: Mapping[str, TowerInfo], path: str = "objectives.0") -> Objective:
    """The objective for these towers.

    Raises:
        ConfigError: an unknown or frozen tower, or one that reads no clips of several frames; names ``path``.
    """
    tower = learning_tower(options.tower, towers, f"{path}.tower")
    if not isinstance(tower.spec, VideoSpec) or tower.spec.frames < 2:
        raise ConfigError(f"{path}.tower: {tower.name!r} does not read clips of two frames and more")
    views = tuple(
        View(tower.spec, clip, augmentation=options.augmentation, overlap=options.overlap()) for clip in (0, 1)
    )
    return STOR(ViewSet(tower, views, reduction="sum"), options)
