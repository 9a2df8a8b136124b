"""ρSimCLR: neighbours in time attract."""

from __future__ import annotations

from typing import Literal

from mmcl.objectives.base import Objective
from mmcl.objectives.view_methods import ContrastMethod, ContrastOptions
from mmcl.objectives.views import ViewSet


class PersistencySimCLROptions(ContrastOptions):
    """NT-Xent between clips that follow each other in time, without batch norm in the head."""

    name: Literal["simclr"] = "simclr"


def build(views: ViewSet, options: PersistencySimCLROptions) -> Objective:
    """ρ − 1 pairs of neighbours; with a second tower also those between the towers."""
    return ContrastMethod(views, options, views.neighbours())
