"""The one table of objectives. A new one is a file with its options and ``build``, a line in the table, and a test."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, NamedTuple, TypeAlias

from pydantic import Field

from mmcl.config import Options
from mmcl.objectives import (
    compositional_distillation,
    contrastive_distillation,
    cross_modal,
    distillation,
    intra_modal,
    motion_decoupling,
    multi_view,
    mutual,
    persistency,
    tcl,
)
from mmcl.objectives.base import Objective
from mmcl.objectives.compositional_distillation import CompositionalDistillationOptions
from mmcl.objectives.contrastive_distillation import ContrastiveDistillationOptions
from mmcl.objectives.cross_modal import CrossModalOptions
from mmcl.objectives.distillation import DistillationOptions
from mmcl.objectives.intra_modal import IntraModalOptions
from mmcl.objectives.motion_decoupling import MotionDecouplingOptions
from mmcl.objectives.multi_view import MultiViewOptions
from mmcl.objectives.mutual import MutualOptions
from mmcl.objectives.persistency import PersistencyOptions
from mmcl.objectives.tcl import TCLOptions


class ObjectiveEntry(NamedTuple):
    options: type[Options]
    build: Callable[..., Objective]
    """``(options, towers, path=…) -> Objective``; raises ConfigError naming ``path``"""


OBJECTIVES: dict[str, ObjectiveEntry] = {
    "compositional_distillation": ObjectiveEntry(CompositionalDistillationOptions, compositional_distillation.build),
    "contrastive_distillation": ObjectiveEntry(ContrastiveDistillationOptions, contrastive_distillation.build),
    "cross_modal": ObjectiveEntry(CrossModalOptions, cross_modal.build),
    "distillation": ObjectiveEntry(DistillationOptions, distillation.build),
    "intra_modal": ObjectiveEntry(IntraModalOptions, intra_modal.build),
    "motion_decoupling": ObjectiveEntry(MotionDecouplingOptions, motion_decoupling.build),
    "multi_view": ObjectiveEntry(MultiViewOptions, multi_view.build),
    "mutual": ObjectiveEntry(MutualOptions, mutual.build),
    "persistency": ObjectiveEntry(PersistencyOptions, persistency.build),
    "tcl": ObjectiveEntry(TCLOptions, tcl.build),
}

ObjectiveOptions: TypeAlias = Annotated[
    CompositionalDistillationOptions
    | ContrastiveDistillationOptions
    | CrossModalOptions
    | DistillationOptions
    | IntraModalOptions
    | MotionDecouplingOptions
    | MultiViewOptions
    | MutualOptions
    | PersistencyOptions
    | TCLOptions,
    Field(discriminator="name"),
]

__all__ = ["OBJECTIVES", "ObjectiveEntry", "ObjectiveOptions"]
