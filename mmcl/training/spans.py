"""Names for the parts of a step, which a profile finds again."""

from __future__ import annotations

from typing import Literal, TypeAlias, get_args

from torch.profiler import record_function

PREFIX = "mmcl: "
Part: TypeAlias = Literal[
    "data wait",
    "augmentation",
    "objectives",
    "backward",
    "gradient cache",
    "optimizer",
    "logging",
    "evaluation",
    "checkpoint",
]
PARTS: tuple[Part, ...] = get_args(Part)


def span(part: Part) -> record_function:
    """A context in which a run does this; costs microseconds without a profile."""
    return record_function(PREFIX + part)
