"""``shared``: a tower that is another tower on other views, with the same weights, which exist once."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor, nn

from mmcl.config import Options
from mmcl.encoders.base import Encoder
from mmcl.types import ConfigError, Features, VideoSpec


class SharedOptions(Options):
    """The weights of another tower; its head is its own. How it is trained stands with the other."""

    name: Literal["shared"] = "shared"
    tower: str
    """whose weights these are"""
    frames: Annotated[int, Field(ge=1, le=4096)] | None = None
    """of its own windows; 1 makes it a tower for pictures; null: as many as the other tower's"""


class Shared(Encoder):
    """Runs another tower. It holds no weights: they are counted, stepped and saved where they are."""

    def __init__(self, options: SharedOptions, other: Encoder, path: str) -> None:
        super().__init__()
        self.spec = other.spec
        if options.frames is not None:
            if not isinstance(other.spec, VideoSpec):
                raise ConfigError(f"{path}.frames: {options.frames}, but tower {options.tower!r} does not take video")
            self.spec = dataclasses.replace(other.spec, frames=options.frames)
        self.width, self.stages, self.causal_patch = other.width, other.stages, other.causal_patch
        # in a tuple, a module is not registered: no second name for the same weights
        self._other: tuple[nn.Module] = (other,)

    def on(self, other: nn.Module) -> Shared:
        """The same views on another module, such as the momentum copy."""
        twin = Shared.__new__(Shared)
        nn.Module.__init__(twin)
        twin.spec, twin.width, twin.stages, twin._other = self.spec, self.width, self.stages, (other,)
        twin.causal_patch = self.causal_patch
        return twin

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Features:
        """As the other tower."""
        features: Features = self._other[0](x, mask)
        return features
