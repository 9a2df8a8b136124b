"""The one table of objectives. A new one is a file with its options and ``build``, a line in the table, and a test."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, NamedTuple, TypeAlias

from pydantic import Field

from mmcl.config import Options
from mmcl.objectives import cross_modal, intra_modal, persistency
from mmcl.objectives.base import Objective
from mmcl.objectives.cross_modal import CrossModalOptions
from mmcl.objectives.intra_modal import IntraModalOptions
from mmcl.objectives.persistency import PersistencyOptions


class ObjectiveEntry(NamedTuple):
    options: type[Options]
    build: Callable[..., Objective]
    """``(options, towers, path=…) -> Objective``; raises ConfigError naming ``path``"""


OBJECTIVES: dict[str, ObjectiveEntry] = {
    "cross_modal": ObjectiveEntry(CrossModalOptions, cross_modal.build),
    "intra_modal": ObjectiveEntry(IntraModalOptions, intra_modal.build),
    "persistency": ObjectiveEntry(PersistencyOptions, persistency.build),
}

ObjectiveOptions: TypeAlias = Annotated[
    CrossModalOptions | IntraModalOptions | PersistencyOptions, Field(discriminator="name")
]

__all__ = ["OBJECTIVES", "ObjectiveEntry", "ObjectiveOptions"]
