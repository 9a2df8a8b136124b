"""Small configurations of triple contrastive learning."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmcl.config import build as build_options
from mmcl.objectives import OBJECTIVES
from mmcl.types import TowerInfo
from support.exactness import TOWERS

FUSION = {"width": 8, "layers": 1, "heads": 2, "hidden": 12, "chunk": 20}
SMALL = {
    "queue": 7,
    "ramp_batches": 2,
    "text_augmentation": "worn",
    "lmi": {"pool": 3},
    "mlm": {"augmentation": "masked"},
    "fusion": FUSION,
}


def make(towers: Mapping[str, TowerInfo] = TOWERS, **options: Any) -> Any:
    """A tcl of the table."""
    entry = OBJECTIVES["tcl"]
    return entry.build(build_options(entry.options, {"name": "tcl", **SMALL, **options}), towers)
