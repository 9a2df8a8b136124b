"""The one table of objectives. A new one is a file with its options and ``build``, a line in the table, and a test."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, NamedTuple, TypeAlias

from pydantic import Field

from mmcl.config import Options
from mmcl.objectives import (
    classification,
    compositional_distillation,
    contrastive_distillation,
    cross_modal,
    distillation,
    generative,
    improved,
    intra_modal,
    m3col,
    motion_decoupling,
    multi_view,
    mutual,
    persistency,
    stor,
    tcl,
    video_qa,
)
from mmcl.objectives.base import Objective
from mmcl.objectives.classification import ClassificationOptions
from mmcl.objectives.compositional_distillation import CompositionalDistillationOptions
from mmcl.objectives.contrastive_distillation import ContrastiveDistillationOptions
from mmcl.objectives.cross_modal import CrossModalOptions
from mmcl.objectives.distillation import DistillationOptions
from mmcl.objectives.generative import CMIMOptions, GenerativeContrastiveOptions
from mmcl.objectives.improved import ImprovedOptions
from mmcl.objectives.intra_modal import IntraModalOptions
from mmcl.objectives.m3col import M3CoLOptions
from mmcl.objectives.motion_decoupling import MotionDecouplingOptions
from mmcl.objectives.multi_view import MultiViewOptions
from mmcl.objectives.mutual import MutualOptions
from mmcl.objectives.persistency import PersistencyOptions
from mmcl.objectives.stor import STOROptions
from mmcl.objectives.tcl import TCLOptions
from mmcl.objectives.video_qa import VideoQAOptions


class ObjectiveEntry(NamedTuple):
    options: type[Options]
    build: Callable[..., Objective]
    """``(options, towers, path=…) -> Objective``; raises ConfigError naming ``path``"""


OBJECTIVES: dict[str, ObjectiveEntry] = {
    "classification": ObjectiveEntry(ClassificationOptions, classification.build),
    "cmim": ObjectiveEntry(CMIMOptions, generative.build_cmim),
    "compositional_distillation": ObjectiveEntry(CompositionalDistillationOptions, compositional_distillation.build),
    "contrastive_distillation": ObjectiveEntry(ContrastiveDistillationOptions, contrastive_distillation.build),
    "cross_modal": ObjectiveEntry(CrossModalOptions, cross_modal.build),
    "distillation": ObjectiveEntry(DistillationOptions, distillation.build),
    "generative_contrastive": ObjectiveEntry(GenerativeContrastiveOptions, generative.build_generative_contrastive),
    "improved": ObjectiveEntry(ImprovedOptions, improved.build),
    "intra_modal": ObjectiveEntry(IntraModalOptions, intra_modal.build),
    "m3col": ObjectiveEntry(M3CoLOptions, m3col.build),
    "motion_decoupling": ObjectiveEntry(MotionDecouplingOptions, motion_decoupling.build),
    "multi_view": ObjectiveEntry(MultiViewOptions, multi_view.build),
    "mutual": ObjectiveEntry(MutualOptions, mutual.build),
    "persistency": ObjectiveEntry(PersistencyOptions, persistency.build),
    "stor": ObjectiveEntry(STOROptions, stor.build),
    "tcl": ObjectiveEntry(TCLOptions, tcl.build),
    "video_qa": ObjectiveEntry(VideoQAOptions, video_qa.build),
}

ObjectiveOptions: TypeAlias = Annotated[
    ClassificationOptions
    | CMIMOptions
    | CompositionalDistillationOptions
    | ContrastiveDistillationOptions
    | CrossModalOptions
    | DistillationOptions
    | GenerativeContrastiveOptions
    | ImprovedOptions
    | IntraModalOptions
    | M3CoLOptions
    | MotionDecouplingOptions
    | MultiViewOptions
    | MutualOptions
    | PersistencyOptions
    | STOROptions
    | TCLOptions
    | VideoQAOptions,
    Field(discriminator="name"),
]

__all__ = ["OBJECTIVES", "ObjectiveEntry", "ObjectiveOptions"]
