"""``precomputed``: a tower that passes on embeddings stored in the shards, so that they serve as any frozen tower."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator
from torch import Tensor

from mmcl.config import Options
from mmcl.encoders.base import Encoder
from mmcl.types import Features, VectorSpec


class PrecomputedOptions(Options):
    """The member ``KEY.NAME.npy`` of each sample, as it is: nothing is learned, nothing decoded."""

    name: Literal["precomputed"] = "precomputed"
    member: Annotated[str, Field(pattern="^[a-z0-9_-]{1,64}$")]
    """NAME, which is this tower's modality as well: small letters, digits, _ and -"""
    width: Annotated[int, Field(ge=1, le=65_536)]
    """how many numbers each of them has"""
    lock: Literal["none", "with_head"] = "none"
    """``with_head``: a teacher, which has no place in the joint space"""

    @field_validator("member")
    @classmethod
    def _not_taken(cls, value: str) -> str:
        if value in ("video", "audio", "text", "image", "motion"):
            raise ValueError("is a modality of its own; choose another name")
        return value


class Precomputed(Encoder):
    """float32 ``(B, D)`` to itself."""

    def __init__(self, options: PrecomputedOptions) -> None:
        super().__init__()
        self.spec = VectorSpec(options.member, options.width)
        self.width = options.width

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Features:
        """``x``: float32 ``(B, D)``."""
        return Features(x)
