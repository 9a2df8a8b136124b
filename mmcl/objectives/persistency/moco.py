"""ρMoCo: each clip finds the momentum keys of the other clips among a queue."""

from __future__ import annotations

from typing import Literal

from mmcl.objectives.base import Objective
from mmcl.objectives.view_methods import QueueMethod, QueueOptions
from mmcl.objectives.views import ViewSet


class PersistencyMoCoOptions(QueueOptions):
    """MoCo over clips; keys of all ranks enter the queue (the authors' code enqueues those of one rank).

    The moving average starts at 0.994 in the paper: ``train.momentum.start``.
    """

    name: Literal["moco"] = "moco"


def build(views: ViewSet, options: PersistencyMoCoOptions) -> Objective:
    """Every clip asks, every clip gives keys."""
    clips = range(len(views.views))
    return QueueMethod(views, options, queries=clips, keys=clips)
