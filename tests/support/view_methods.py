"""Small configurations of every method on views of one tower."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmcl.config import build as build_options
from mmcl.objectives import OBJECTIVES
from mmcl.objectives.base import Objective, ObjectiveMix
from mmcl.types import TowerInfo
from support.exactness import TOWERS, Subject

SMALL = {"hidden": 6, "out": 5}
EXTRAS: dict[str, dict[str, Any]] = {
    "moco": {"queue": 17},
    "byol": {"predictor_hidden": 4},
    "simsiam": {"predictor_hidden": 4},
    "swav": {"prototypes": 4, "frozen_batches": 1},
}
INTRA_MODAL = ("simclr", "dcl", "dclw", "moco", "byol", "simsiam", "barlow", "vicreg", "triplet", "mse", "swav")
PERSISTENCY = ("simclr", "moco", "byol", "swav")


def make(
    name: str, method: str, how: Mapping[str, Any] | None = None, towers: Mapping[str, TowerInfo] = TOWERS, **more: Any
) -> Objective:
    """An objective of the table; ``how`` goes to the method, ``more`` to the objective."""
    chosen = {"name": method, **SMALL, **EXTRAS.get(method, {}), **(how or {})}
    options = {"name": name, "tower": "video", "method": chosen, **more}
    entry = OBJECTIVES[name]
    return entry.build(build_options(entry.options, options), towers)


def subject(**objectives: Objective) -> Subject:
    return Subject(ObjectiveMix(objectives, {name: 0.5 + 0.25 * i for i, name in enumerate(objectives)}))
