"""The one table of objectives. A new one is a file with its options and ``build``, a line in the table, and a test."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

from mmcl.config import Options
from mmcl.objectives import cross_modal
from mmcl.objectives.base import Objective
from mmcl.objectives.cross_modal import CrossModalOptions


class ObjectiveEntry(NamedTuple):
    options: type[Options]
    build: Callable[..., Objective]
    """``(options, towers, path=…) -> Objective``; raises ConfigError naming ``path``"""


OBJECTIVES: dict[str, ObjectiveEntry] = {
    "cross_modal": ObjectiveEntry(CrossModalOptions, cross_modal.build),
}

# With a second one: Annotated[CrossModalOptions | OtherOptions, Field(discriminator="name")]
ObjectiveOptions: TypeAlias = CrossModalOptions

__all__ = ["OBJECTIVES", "ObjectiveEntry", "ObjectiveOptions"]
