"""What video towers share: the window they look at, and pixels made ready on the device of the weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from mmcl.encoders.base import Encoder
from mmcl.encoders.norms import Norm
from mmcl.encoders.options import TowerCommon
from mmcl.encoders.packages import package_pixels
from mmcl.types import VideoSpec


class WindowOptions(TowerCommon):
    """A tower whose frames, rate and size are known from where it comes; each can be changed."""

    frames: Annotated[int, Field(ge=1, le=4096)] | None = None
    """frames of a window, 1: pictures; null: as published"""
    fps: Annotated[float, Field(ge=0.001, le=1000)] | None = None
    """frames per second at which a window is sampled; null: as published"""
    stride: Annotated[int, Field(ge=1)] | None = None
    """take every such frame of the source, at whatever rate it has, instead of ``fps``"""
    fit: Literal["crop", "squash"] = "crop"
    """scale the short side and crop the centre, or scale both sides"""
    mean: tuple[float, float, float] | None = None
    """of pixels in [0, 1], taken away from them; null: as published with the weights"""
    std: tuple[float, float, float] | None = None
    """of pixels in [0, 1], by which they are divided; null: as published with the weights"""

    @model_validator(mode="before")
    @classmethod
    def _as_its_package_wants(cls, given: Any) -> Any:
        """Written out here, so that a model keeps them when it no longer starts from the package."""
        pixels = package_pixels(given.get("pretrained")) if isinstance(given, dict) else None
        if pixels is None or given.get("mean") is not None or given.get("std") is not None:
            return given
        return {**given, "mean": pixels[0], "std": pixels[1]}


class NormedOptions(WindowOptions):
    """A tower whose network may have batch norm."""

    norm: Norm = "frozen"
    """batch norm keeps the statistics it has (its scale and shift learn), or takes those of all ranks' present rows"""


class VideoEncoder(Encoder):
    """A tower of uint8 ``(B, T, C, H, W)``; mean and standard deviation are those of its ``spec``."""

    spec: VideoSpec
    scale: Tensor
    shift: Tensor

    def __init__(self, spec: VideoSpec) -> None:
        super().__init__()
        self.spec = spec
        std = torch.tensor(spec.std, dtype=torch.float64).view(3, 1, 1)
        mean = torch.tensor(spec.mean, dtype=torch.float64).view(3, 1, 1)
        self.register_buffer("scale", (1 / (255 * std)).float(), persistent=False)
        self.register_buffer("shift", (-mean / std).float(), persistent=False)

    def normalised(self, x: Tensor) -> Tensor:
        """uint8 ``(B, T, C, H, W)`` to ``(x / 255 − mean) / std``, in the precision of the weights."""
        return torch.addcmul(self.shift, x.to(self.scale.dtype), self.scale)


def video_spec(
    options: WindowOptions, *, frames: int, fps: float, size: int, mean: Sequence[float], std: Sequence[float]
) -> VideoSpec:
    """What a tower eats: as published, where ``options`` do not say otherwise."""
    mean, std = options.mean or mean, options.std or std
    return VideoSpec(
        frames=frames if options.frames is None else options.frames,
        size=size,
        fps=fps if options.fps is None else options.fps,
        fit=options.fit,
        mean=(mean[0], mean[1], mean[2]),
        std=(std[0], std[1], std[2]),
        stride=options.stride,
    )


def repeated_to(x: Tensor, frames: int) -> Tensor:
    """``(B, T, …)`` with its last frame repeated until there are ``frames``; a picture is a still clip."""
    missing = frames - x.shape[1]
    return x if missing <= 0 else torch.cat([x, x[:, -1:].expand(-1, missing, *x.shape[2:])], 1)


def renamed(tensors: Mapping[str, Tensor], prefix: str, leave: Sequence[str] = ()) -> dict[str, Any]:
    """Names with ``prefix`` in front unless it is there, without those that begin with one of ``leave`` and without
    the counters of batch norms.
    """
    return {
        name if name.startswith(prefix) else prefix + name: tensor
        for name, tensor in tensors.items()
        if not name.startswith(tuple(leave)) and not name.endswith("num_batches_tracked")
    }
