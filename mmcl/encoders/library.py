"""Towers of open_clip, with random weights and nothing downloaded: ``open_clip:NAME``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from mmcl.config import unknown_name
from mmcl.encoders.base import Encoder
from mmcl.encoders.frames import FramesEncoder, FramesOptions
from mmcl.encoders.hf_common import library_error
from mmcl.encoders.options import TowerCommon
from mmcl.encoders.pixels import renamed, video_spec
from mmcl.types import ConfigError, Features, TextSpec


class OpenClipOptions(FramesOptions):
    """One of the two towers of an open_clip model configuration."""

    name: str = Field(pattern=r"^open_clip:.+$")
    """``open_clip:`` and a name of ``open_clip.list_models()``, such as ``open_clip:ViT-B-32``"""
    modality: Literal["video", "text"] = "video"
    config: dict[str, Any] = Field(default_factory=dict)
    """keys of the tower's own configuration to change, such as ``layers`` or ``image_size``"""

    @model_validator(mode="after")
    def _of_its_modality(self) -> OpenClipOptions:
        if self.modality == "text":
            for key in sorted(FramesOptions.model_fields.keys() - TowerCommon.model_fields.keys() - {"config"}):
                if getattr(self, key) != FramesOptions.model_fields[key].default:
                    raise ValueError(f"a text tower has no {key}")
        return self


@dataclass(frozen=True, slots=True)
class OpenClipTokenizer:
    """CLIP's byte pairs, between a start and an end mark."""

    max_tokens: int = 77

    def __call__(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """ids int64 and mask bool ``(B, L)``, L = the longest row, at most ``max_tokens``."""
        library = _clip_tokenizer()
        ids = library(list(texts), context_length=self.max_tokens)
        length = (ids == library.eot_token_id).int().argmax(1) + 1
        mask = torch.arange(self.max_tokens) < length[:, None]
        longest = int(length.max()) if len(texts) else 1
        return ids[:, :longest], mask[:, :longest]

    def cut(self, texts: Sequence[str]) -> list[bool]:
        """Which texts are longer than ``max_tokens``, marks and all."""
        encode = _clip_tokenizer().encode
        return [len(encode(text)) + 2 > self.max_tokens for text in texts]

    @property
    def special_ids(self) -> tuple[int, ...]:
        """The start and the end mark; there is no mask token."""
        library = _clip_tokenizer()
        return (int(library.sot_token_id), int(library.eot_token_id))


@lru_cache(maxsize=1)
def _clip_tokenizer() -> Any:
    import open_clip

    return open_clip.SimpleTokenizer()


def build_open_clip(options: OpenClipOptions) -> Encoder:
    """The image or the text tower of an open_clip configuration, randomly initialised."""
    return OpenClipVideo(options) if options.modality == "video" else OpenClipText(options)


def _open_clip_config(options: OpenClipOptions, part: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The model's configuration and that of one tower with the user's changes. Weights of a hub are never asked for."""
    import open_clip

    model = options.name.removeprefix("open_clip:")
    names = open_clip.list_models()
    if model not in names:
        raise unknown_name("tower.name", options.name, [f"open_clip:{name}" for name in names])
    whole = open_clip.get_model_config(model)
    tower = {**whole[part], **options.config}
    if "timm_model_name" in tower:
        tower["timm_model_pretrained"] = False
    return whole, tower


class OpenClipVideo(FramesEncoder):
    """The image tower of open_clip on each frame: one token a frame."""

    def __init__(self, options: OpenClipOptions) -> None:
        from open_clip.model import _build_vision_tower  # the public way builds the other tower too: 100 MB unused

        whole, config = _open_clip_config(options, "vision_cfg")
        try:
            tower = _build_vision_tower(whole["embed_dim"], config, whole.get("quick_gelu", False))
        except (TypeError, ValueError, RuntimeError) as error:
            raise library_error(options, error) from error
        size = config.get("image_size", 224)
        height, width = size if isinstance(size, (tuple, list)) else (size, size)
        if height != width:
            raise ConfigError(f"tower.config.image_size: pictures must be square, {options.name} has {size}")
        mean, std = _open_clip_pixels(options.name.removeprefix("open_clip:"))
        spec = video_spec(options, frames=8, fps=4.0, size=height, mean=mean, std=std)
        super().__init__(spec, tower, whole["embed_dim"], options)

    def foreign(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """open_clip's own names: ``visual.…``, beside those of its text tower."""
        own = {name: tensor for name, tensor in tensors.items() if name.startswith(("tower.", "temporal."))}
        visual = {name[7:]: tensor for name, tensor in tensors.items() if name.startswith("visual.")}
        return {**own, **renamed(visual, "tower.")}


def _open_clip_pixels(model: str) -> tuple[Sequence[float], Sequence[float]]:
    """Mean and standard deviation that the model's published weights were trained with."""
    import open_clip

    tags = open_clip.list_pretrained_tags_by_model(model)
    published = open_clip.get_pretrained_cfg(model, tags[0]) if tags else {}
    return (
        published.get("mean") or open_clip.OPENAI_DATASET_MEAN,
        published.get("std") or open_clip.OPENAI_DATASET_STD,
    )


class OpenClipText(Encoder):
    """The text tower of open_clip, on CLIP's byte pairs; tokens go through its projection as ``pooled`` does."""

    def __init__(self, options: OpenClipOptions) -> None:
        super().__init__()
        from open_clip.model import _build_text_tower  # as for pictures

        whole, config = _open_clip_config(options, "text_cfg")
        for key in ("hf_model_name", "hf_tokenizer_name"):
            if config.get(key):
                raise ConfigError(
                    f"tower.name: {options.name} wants {config[key]} from a model hub, and nothing is downloaded; "
                    "take a model with CLIP's own tokenizer, such as open_clip:ViT-B-32"
                )
        try:
            self.tower = _build_text_tower(
                whole["embed_dim"], {**config, "output_tokens": True}, whole.get("quick_gelu", False)
            )
        except (TypeError, ValueError, RuntimeError, AssertionError) as error:
            raise library_error(options, error) from error
        self.context = config.get("context_length", 77)
        self.spec = TextSpec(OpenClipTokenizer(self.context))
        self.width = whole["embed_dim"] if self.tower.text_projection is not None else self.tower.width

    def blocks(self) -> list[nn.Module]:
        return [*self.tower.transformer.resblocks]

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Features:
        """``x``: int64 ``(B, L)``; ``mask``: bool ``(B, L)``."""
        length = x.shape[1]
        # its causal mask has one size
        pooled, tokens = self.tower(F.pad(x, (0, self.context - length)))
        projection = self.tower.text_projection
        if isinstance(projection, nn.Linear):
            tokens = projection(tokens)
        elif projection is not None:
            tokens = tokens @ projection
        return Features(pooled, tokens[:, :length], mask)
