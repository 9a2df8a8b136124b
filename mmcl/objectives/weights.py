"""How much an objective counts in its mix: a number, or a number that changes with the optimizer steps."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Discriminator, Field, Tag, model_validator

from mmcl.config import Options
from mmcl.types import ConfigError

Share = Annotated[float, Field(ge=0, le=1)]
Step = Annotated[int, Field(ge=0)]


class WeightSchedule(Options):
    """A weight that goes from ``start`` to ``end`` while optimizer steps are taken, and stays there.

    The first step of a run has number 0. The way begins at ``from_step`` or ``from_fraction`` of the run's steps (else
    with the run) and is over at ``to_step`` or ``to_fraction`` (else with the run).
    """

    start: Annotated[float, Field(ge=0)] = 0.0
    """the weight up to the beginning of the way"""
    end: Annotated[float, Field(ge=0)] = 1.0
    """the weight from the end of the way on"""
    from_step: Step | None = None
    """the last step at ``start``"""
    from_fraction: Share | None = None
    to_step: Step | None = None
    """the first step at ``end``"""
    to_fraction: Share | None = None
    shape: Literal["linear", "cosine", "constant"] = "linear"
    """a straight line, half a cosine, or ``start`` all the way and then at once ``end``"""

    @model_validator(mode="after")
    def _one_way_to_say_it(self) -> WeightSchedule:
        for side in ("from", "to"):
            if getattr(self, f"{side}_step") is not None and getattr(self, f"{side}_fraction") is not None:
                raise ValueError(f"{side}_step and {side}_fraction say the same; give one")
        return self


Weight: TypeAlias = Annotated[
    Annotated[float, Field(ge=0), Tag("number")] | Annotated[WeightSchedule, Tag("schedule")],
    Discriminator(lambda value: "schedule" if isinstance(value, (dict, WeightSchedule)) else "number"),
    Field(description="of its loss in the sum over all objectives; a schedule counts optimizer steps"),
]
"""The ``weight`` of every objective: a number ≥ 0, or a schedule."""


@dataclass(frozen=True)
class Ramp:
    """A schedule laid over the steps of one run: a pure function of the step, so that a resumed run has the same."""

    start: float
    end: float
    first: int
    last: int
    shape: Literal["linear", "cosine", "constant"]

    def at(self, step: int) -> float:
        """The weight of optimizer step ``step``, counted from 0.

        >>> ramp = Ramp(0.0, 2.0, 10, 20, "cosine")
        >>> [round(ramp.at(step), 3) for step in (0, 10, 15, 20, 99)]
        [0.0, 0.0, 1.0, 2.0, 2.0]
        """
        if step >= self.last:
            return self.end
        if step <= self.first or self.shape == "constant":
            return self.start
        way = (step - self.first) / (self.last - self.first)
        if self.shape == "cosine":
            way = (1 - math.cos(math.pi * way)) / 2
        return self.start + (self.end - self.start) * way


def over_run(weight: Any, steps: int, path: str) -> float | Ramp:
    """What a :data:`Weight` means in a run of ``steps`` optimizer steps.

    Raises:
        ConfigError: the way is over before it begins; names ``path``.
    """
    if not isinstance(weight, WeightSchedule):
        return float(weight)
    first = _step(weight.from_step, weight.from_fraction, steps, 0)
    last = _step(weight.to_step, weight.to_fraction, steps, max(steps - 1, first + 1))
    if last <= first:
        raise ConfigError(f"{path}: the weight's way ends at step {last} and begins at {first}; a later end is needed")
    return Ramp(weight.start, weight.end, first, last, weight.shape)


def _step(step: int | None, fraction: float | None, steps: int, otherwise: int) -> int:
    if step is not None:
        return step
    return otherwise if fraction is None else round(fraction * (steps - 1))
