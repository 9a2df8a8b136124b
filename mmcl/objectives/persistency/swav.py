"""ρSwAV: each clip predicts the prototypes that the other clips are assigned to."""

from __future__ import annotations

from typing import Literal

from mmcl.objectives.base import Objective
from mmcl.objectives.view_methods import AssignmentMethod, AssignmentOptions
from mmcl.objectives.views import Norm, PositiveInt, ViewSet


class PersistencySwAVOptions(AssignmentOptions):
    """Swapped prediction over all clips; assignments are balanced over all ranks, on one node too."""

    name: Literal["swav"] = "swav"
    norm: Norm = "batch"
    prototypes: PositiveInt = 1000


def build(views: ViewSet, options: PersistencySwAVOptions) -> Objective:
    """Every clip gives codes, every other clip predicts them."""
    return AssignmentMethod(views, options, coding=range(len(views.views)))
