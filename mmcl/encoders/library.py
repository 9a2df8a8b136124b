"""Towers from libraries, with random weights and nothing downloaded: ``open_clip:NAME`` and ``hf:MODEL``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from mmcl.config import nearest, unknown_name
from mmcl.encoders.base import Encoder
from mmcl.encoders.frames import FramesEncoder, FramesOptions
from mmcl.encoders.options import TowerCommon
from mmcl.encoders.pixels import renamed, video_spec
from mmcl.media.text import ByteTokenizer
from mmcl.types import ConfigError, Features, TextSpec, Tokenizer


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


class HfTextOptions(TowerCommon):
    """A text model of transformers."""

    name: str = Field(pattern=r"^hf:.+$")
    """``hf:`` and a local folder with a ``config.json``, or a model type such as ``hf:bert``"""
    config: dict[str, Any] = Field(default_factory=dict)
    """keys of the model's configuration to set; dropout is 0 unless set here"""
    max_tokens: int = Field(default=64, ge=2)
    """longer captions are cut"""


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

    @property
    def special_ids(self) -> tuple[int, ...]:
        """The start and the end mark; there is no mask token."""
        library = _clip_tokenizer()
        return (int(library.sot_token_id), int(library.eot_token_id))


@lru_cache(maxsize=1)
def _clip_tokenizer() -> Any:
    import open_clip

    return open_clip.SimpleTokenizer()


@dataclass(frozen=True, slots=True)
class HfTokenizer:
    """The tokenizer in a local folder of transformers."""

    folder: str
    max_tokens: int = 64

    def __call__(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """ids int64 and mask bool ``(B, L)``, L = the longest row, at most ``max_tokens``."""
        rows = _hf_tokenizer(self.folder)(
            list(texts), padding=True, truncation=True, max_length=self.max_tokens, return_tensors="pt"
        )
        ids, mask = rows["input_ids"].long(), rows["attention_mask"].bool()
        if ids.shape[1] == 0:  # every text is empty and this tokenizer adds no marks
            ids, mask = ids.new_zeros(len(texts), 1), mask.new_zeros(len(texts), 1)
        mask[:, 0] |= ~mask.any(1)
        return ids, mask

    @property
    def special_ids(self) -> tuple[int, ...]:
        """Start, end, padding and other marks."""
        return tuple(_hf_tokenizer(self.folder).all_special_ids)

    @property
    def mask_id(self) -> int | None:
        """None: this tokenizer has no mask token."""
        number: int | None = _hf_tokenizer(self.folder).mask_token_id
        return number

    @property
    def vocabulary(self) -> int:
        """How many different numbers there are."""
        return len(_hf_tokenizer(self.folder))


@lru_cache(maxsize=8)
def _hf_tokenizer(folder: str) -> Any:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    tokenizer.padding_side = "right"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return tokenizer


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


def _library_error(options: OpenClipOptions | HfTextOptions, error: Exception) -> ConfigError:
    return ConfigError(f"tower.config: {options.name} cannot be built with {options.config}: {error}")


class OpenClipVideo(FramesEncoder):
    """The image tower of open_clip on each frame: one token a frame."""

    def __init__(self, options: OpenClipOptions) -> None:
        from open_clip.model import _build_vision_tower  # the public way builds the other tower too: 100 MB unused

        whole, config = _open_clip_config(options, "vision_cfg")
        try:
            tower = _build_vision_tower(whole["embed_dim"], config, whole.get("quick_gelu", False))
        except (TypeError, ValueError, RuntimeError) as error:
            raise _library_error(options, error) from error
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
            raise _library_error(options, error) from error
        self.context = config.get("context_length", 77)
        self.spec = TextSpec(OpenClipTokenizer(self.context))
        self.width = whole["embed_dim"] if self.tower.text_projection is not None else self.tower.width

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


class HfText(Encoder):
    """A text model of transformers with random weights; ``pooled`` is the mean over real tokens.

    The tokenizer is the folder's own; without one, captions are bytes.
    """

    def __init__(self, options: HfTextOptions) -> None:
        super().__init__()
        from transformers import AutoModel

        place = options.name.removeprefix("hf:")
        folder = Path(place).expanduser()
        tokenizer = self._tokenizer(options, folder)
        self.spec = TextSpec(tokenizer)
        config = self._config(options, place, folder, on_bytes=isinstance(tokenizer, ByteTokenizer))
        try:
            model = AutoModel.from_config(config, trust_remote_code=False)
        except (TypeError, ValueError, RuntimeError) as error:
            raise _library_error(options, error) from error
        self.model = model.get_encoder() if config.is_encoder_decoder else model
        if getattr(self.model, "pooler", None) is not None:
            self.model.pooler = None  # weights that the mean never uses would get no gradient
        self.width = config.hidden_size

    @staticmethod
    def _tokenizer(options: HfTextOptions, folder: Path) -> Tokenizer:
        if any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt")):
            return HfTokenizer(str(folder), options.max_tokens)
        return ByteTokenizer(options.max_tokens)

    @staticmethod
    def _config(options: HfTextOptions, place: str, folder: Path, *, on_bytes: bool) -> Any:
        from transformers import CONFIG_MAPPING, AutoConfig

        changes = {**({"vocab_size": 257, "pad_token_id": 0} if on_bytes else {}), **options.config}
        try:
            if (folder / "config.json").is_file():
                config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **changes)
            elif place in CONFIG_MAPPING:
                config = AutoConfig.for_model(place, **changes)
            else:
                raise ConfigError(
                    f"tower.name: {options.name} is neither a folder with a config.json nor a model type of "
                    f"transformers{nearest(place, CONFIG_MAPPING)}; nothing is downloaded"
                )
        except (OSError, TypeError) as error:
            raise _library_error(options, error) from error
        if not hasattr(type(config)(), "vocab_size") or not hasattr(config, "hidden_size"):
            raise ConfigError(f"tower.name: {options.name} is not a text model")
        limit = getattr(config, "max_position_embeddings", None)
        if limit is not None and options.max_tokens > limit:
            raise ConfigError(f"tower.max_tokens: {options.max_tokens}, but {options.name} takes at most {limit}")
        for key, value in config.to_dict().items():
            if ("dropout" in key or "pdrop" in key) and isinstance(value, float) and key not in options.config:
                setattr(config, key, 0.0)
        return config

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Features:
        """``x``: int64 ``(B, L)``; ``mask``: bool ``(B, L)``, at least one True a row (None: all are tokens)."""
        if mask is None:
            mask = torch.ones_like(x, dtype=torch.bool)
        tokens = self.model(input_ids=x, attention_mask=mask.long()).last_hidden_state
        tokens = tokens.masked_fill(~mask[:, :, None], 0.0)
        return Features(tokens.sum(1) / mask.sum(1, keepdim=True), tokens, mask)
