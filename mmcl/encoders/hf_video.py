"""``hf:`` video models of transformers: VideoMAE, ViViT, TimeSformer and V-JEPA 2."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import Field
from torch import Tensor, nn

from mmcl.config import unknown_name
from mmcl.encoders.hf_common import by_own_names, library_error, load_config, longest_list, stem_and_layers
from mmcl.encoders.pixels import VideoEncoder, WindowOptions, repeated_to, video_spec
from mmcl.types import ConfigError, Features

_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


class _Kind(NamedTuple):
    """How a family of models is used."""

    fps: float
    """at which its authors sample Kinetics, 30 frames a second"""
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    frames: str = "num_frames"
    """the key of its configuration"""
    size: str = "image_size"
    class_token: bool = True
    any_length: bool = False
    """shorter clips need no repeated frames"""


VIDEO_KINDS: Mapping[str, _Kind] = {
    "videomae": _Kind(30 / 4, *_IMAGENET, class_token=False),
    "vivit": _Kind(30 / 2, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "timesformer": _Kind(30 / 32, (0.45, 0.45, 0.45), (0.225, 0.225, 0.225)),
    "vjepa2": _Kind(30 / 4, *_IMAGENET, frames="frames_per_clip", size="crop_size", class_token=False, any_length=True),
}
"""Model types of transformers that take video."""


class HfVideoOptions(WindowOptions):
    """A video model of transformers."""

    name: str = Field(pattern=r"^hf:.+$")
    """``hf:`` and a local folder with a ``config.json``, or one of videomae, vivit, timesformer, vjepa2"""
    modality: Literal["video"] = "video"
    config: dict[str, Any] = Field(default_factory=dict)
    """keys of the model's configuration to set; dropout is 0 unless set here"""


class HfVideo(VideoEncoder):
    """uint8 ``(B, T, C, H, W)`` to space-time tokens; ``pooled`` is the class token, or the tokens' mean without one.

    Frames, size and normalisation are those of the folder's files, or what the model type is published with. Models
    with a position for each frame repeat the last frame of shorter clips.
    """

    def __init__(self, options: HfVideoOptions) -> None:
        place = options.name.removeprefix("hf:")
        folder = Path(place).expanduser()
        config = load_config(options, folder, dict(options.config))
        kind = VIDEO_KINDS.get(config.model_type)
        if kind is None:
            raise unknown_name("tower.name", f"hf:{config.model_type}", [f"hf:{name}" for name in VIDEO_KINDS])
        if options.frames is not None and not kind.any_length and options.frames > 1:
            setattr(config, kind.frames, options.frames)
        if getattr(config, "attention_type", "") == "space_only":
            raise ConfigError(
                f"tower.config.attention_type: space_only gives no clip, {options.name}; take a frame tower"
            )
        size = getattr(config, kind.size)
        if not isinstance(size, int):
            raise ConfigError(f"tower.config.{kind.size}: pictures must be square, {options.name} has {size}")
        seen = _preprocessor(folder)
        super().__init__(
            video_spec(
                options,
                frames=getattr(config, kind.frames),
                fps=kind.fps,
                size=size,
                mean=seen.get("image_mean", kind.mean),
                std=seen.get("image_std", kind.std),
            )
        )
        self.kind, self.config = kind, config
        self.least = _tube(config)[0] if kind.any_length else getattr(config, kind.frames)
        self.model = _part(_model(options, config))
        self.width = config.hidden_size
        # VideoMAE norms the mean, not the tokens, and keeps that norm beside the model
        self.norm = nn.LayerNorm(self.width, eps=config.layer_norm_eps) if _unnormed(config) else nn.Identity()

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Features:
        """``x``: uint8 ``(B, T, C, H, W)``; ``mask`` is not used. Tokens unfold to a grid ``(time, height, width)``."""
        pixels = self.normalised(repeated_to(x, self.least))
        argument = "pixel_values_videos" if self.config.model_type == "vjepa2" else "pixel_values"
        tokens = self.model(**{argument: pixels}).last_hidden_state
        pooled = None
        if self.kind.class_token:
            pooled, tokens = tokens[:, 0], tokens[:, 1:]
        time, height, width = _tube(self.config)
        grid = (max(1, pixels.shape[1] // time), pixels.shape[3] // height, pixels.shape[4] // width)
        if self.config.model_type == "timesformer":  # its tokens run along time first
            tokens = tokens.unflatten(1, (grid[1] * grid[2], grid[0])).transpose(1, 2).flatten(1, 2)
        return Features(self.norm(tokens.mean(1)) if pooled is None else pooled, tokens, grid=grid)

    def blocks(self) -> list[nn.Module]:
        """The patches and each transformer layer."""
        return stem_and_layers(self.model, longest_list(self.model))

    def foreign(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Names in files of transformers, old ones too; VideoMAE keeps the norm of the mean beside the model."""
        part = "encoder." if self.config.model_type == "vjepa2" else ""
        found = by_own_names(tensors, self, _model_class(self.config), self.config, part)
        return {f"norm.{name[8:]}" if name.startswith("fc_norm.") else name: t for name, t in found.items()}


def _preprocessor(folder: Path) -> dict[str, Any]:
    for name in ("video_preprocessor_config.json", "preprocessor_config.json"):
        if (folder / name).is_file():
            try:
                found: dict[str, Any] = json.loads((folder / name).read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                raise ConfigError(f"tower.name: {folder / name} cannot be read: {error}") from None
            return found
    return {}


def _tube(config: Any) -> tuple[int, int, int]:
    """Frames and pixels of one token."""
    tube, patch = getattr(config, "tubelet_size", 1), getattr(config, "patch_size", None)
    if isinstance(tube, (list, tuple)):
        return (tube[0], tube[1], tube[2])
    height, width = patch if isinstance(patch, (list, tuple)) else (patch, patch)
    return (tube, height, width)


def _unnormed(config: Any) -> bool:
    return config.model_type == "videomae" and bool(config.use_mean_pooling)


def _model_class(config: Any) -> Any:
    from transformers import AutoModel

    return AutoModel._model_mapping[type(config)]  # from_config cannot read tensors that are at hand


def _model(options: HfVideoOptions, config: Any) -> nn.Module:
    if config.model_type == "vjepa2":
        config.pred_num_hidden_layers = 0  # it predicts masked tokens, which no embedding needs
    extra = {"add_pooling_layer": False} if config.model_type == "vivit" else {}
    try:
        model: nn.Module = _model_class(config)(config, **extra)
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        raise library_error(options, error) from error
    return model


def _part(model: Any) -> nn.Module:
    part: nn.Module = model.encoder if model.config.model_type == "vjepa2" else model
    return part
