"""Small configurations of triple contrastive learning."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from mmcl.config import build as build_options
from mmcl.objectives import OBJECTIVES
from mmcl.types import Batch, TowerInfo
from support.exactness import TOWERS
from support.objectives import batch_for, build_objective

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


OFF: dict[str, Any] = dict.fromkeys(("cma", "imc", "lmi", "itm", "mlm"))
PAIR = {"pairs": (("video", "text"),)}


def tcl(**options: Any) -> Any:
    """An objective with no term but those that are named."""
    return build_objective("tcl", TOWERS, **{**PAIR, **SMALL, "text_augmentation": "none", **OFF, **options})


def batch_of(objective: Any, rows: int, groups: list[int] | None = None) -> Batch:
    batch = batch_for(objective, "full", rows=rows)
    batch.groups.fill_(-1)
    if groups:
        batch.groups[:, 0] = torch.tensor(groups)
    return batch


def value(term: Any, name: str) -> float:
    return float(term.metrics[f"loss/{name}/video-text"])
