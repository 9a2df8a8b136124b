"""ρBYOL: each clip predicts the momentum targets of the other clips."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor

from mmcl.objectives.base import Objective
from mmcl.objectives.view_methods import PredictionMethod, PredictionOptions
from mmcl.objectives.views import Norm, PositiveFloat, PositiveInt, ViewSet


class PersistencyBYOLOptions(PredictionOptions):
    """−cos / temperature, which at 0.5 is BYOL's 2 − 2 cos less 2.

    The moving average starts at 0.996 in the paper: ``train.momentum.start``.
    """

    name: Literal["byol"] = "byol"
    layers: Annotated[int, Field(ge=1, le=4)] = 2
    hidden: PositiveInt = 4096
    out: PositiveInt = 256
    norm: Norm = "batch"
    temperature: PositiveFloat = 0.5


class PersistencyBYOL(PredictionMethod):
    """BYOL's prediction on the scale of the other methods."""

    def __init__(self, views: ViewSet, options: PersistencyBYOLOptions) -> None:
        super().__init__(views, options, momentum=True)
        self.temperature = options.temperature

    def distance(self, cosine: Tensor) -> Tensor:
        """−cos / temperature."""
        return -cosine / self.temperature


def build(views: ViewSet, options: PersistencyBYOLOptions) -> Objective:
    """Every clip predicts every other."""
    return PersistencyBYOL(views, options)
