"""``hf:`` text towers: models of transformers and folders of sentence-transformers.

What the folder says of its tokenizer, its length, its marks, its pooling and its normalisation is what is done.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from mmcl.encoders.base import Encoder
from mmcl.encoders.hf_common import by_own_names, library_error, load_config, longest_list, stem_and_layers
from mmcl.encoders.options import TowerCommon
from mmcl.encoders.packages import place_of
from mmcl.media.text import ByteTokenizer
from mmcl.types import ConfigError, Features, TextSpec, Tokenizer

UNSAID_TOKENS = 64
"""of the longest caption where a tower does not say"""
POOLINGS = ("mean", "cls", "max", "last")
HEADS = {"siglip_text_model": "SiglipTextModel", "siglip2_text_model": "Siglip2TextModel"}
"""Model types, and classes of transformers, that are trained with a head of their own on the last place of a row padded
to its full length."""


class HfTextOptions(TowerCommon):
    """A text model of transformers or sentence-transformers."""

    name: str = Field(pattern=r"^hf:.+$")
    """``hf:`` and a local folder with a ``config.json``, ``package:NAME`` of an installed package, or a model type such
    as ``hf:bert``"""
    modality: Literal["text"] = "text"
    config: dict[str, Any] = Field(default_factory=dict)
    """keys of the model's configuration to set; dropout is 0 unless set here"""
    max_tokens: int | None = Field(default=None, ge=2)
    """longer captions are cut; null: as its folder says, 64 where it says nothing"""
    pooling: Literal["mean", "cls", "max", "last"] | None = None
    """over real tokens, or the first or the last of them; null: as its folder says, the mean where it says nothing"""


@dataclass(frozen=True, slots=True)
class HfTokenizer:
    """The tokenizer in a local folder of transformers, or of an installed package."""

    folder: str
    max_tokens: int = UNSAID_TOKENS
    lower: bool = False
    """lowercase texts first, as sentence-transformers does where its folder says so"""

    def __call__(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """ids int64 and mask bool ``(B, L)``, L = the longest row, at most ``max_tokens``."""
        rows = _hf_tokenizer(self.folder)(
            self._cased(texts), padding=True, truncation=True, max_length=self.max_tokens, return_tensors="pt"
        )
        ids, mask = rows["input_ids"].long(), rows["attention_mask"].bool()
        if ids.shape[1] == 0:  # every text is empty and this tokenizer adds no marks
            ids, mask = ids.new_zeros(len(texts), 1), mask.new_zeros(len(texts), 1)
        mask[:, 0] |= ~mask.any(1)
        return ids, mask

    def cut(self, texts: Sequence[str]) -> list[bool]:
        """Which texts are longer than ``max_tokens``."""
        rows = _hf_tokenizer(self.folder)(self._cased(texts), truncation=False, verbose=False)["input_ids"]
        return [len(row) > self.max_tokens for row in rows]

    def _cased(self, texts: Sequence[str]) -> list[str]:
        return [text.lower() for text in texts] if self.lower else list(texts)

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

    @property
    def own_limit(self) -> int | None:
        """The length that the tokenizer's folder states."""
        limit = int(_hf_tokenizer(self.folder).model_max_length)
        return limit if limit < 1 << 20 else None  # a huge number stands for "not said"


@lru_cache(maxsize=8)
def _hf_tokenizer(folder: str) -> Any:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(place_of(folder), local_files_only=True, trust_remote_code=False)
    tokenizer.padding_side = "right"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return tokenizer


class Sentence(NamedTuple):
    """What a folder of sentence-transformers says, as far as it says something."""

    max_tokens: int | None = None
    lower: bool = False
    pooling: str | None = None
    normalised: bool = False


def read_sentence(folder: Path, name: str) -> Sentence:
    """What ``modules.json`` and the files that it names say; nothing where there is none.

    Raises:
        ConfigError: the folder holds a step that is not a transformer, a pooling of one kind or a normalisation.
    """
    if not (folder / "modules.json").is_file():
        return Sentence()
    steps = json.loads((folder / "modules.json").read_text())
    kinds = {step["type"].rpartition(".")[2]: step["path"] for step in steps}
    for kind in kinds:
        if kind not in ("Transformer", "Pooling", "Normalize"):
            raise ConfigError(f"tower.name: {name} has a step {kind}; known: Transformer, Pooling, Normalize")
    own, pooling = folder / "sentence_bert_config.json", folder / kinds.get("Pooling", "") / "config.json"
    said = json.loads(own.read_text()) if own.is_file() else {}
    return Sentence(
        said.get("max_seq_length"),
        bool(said.get("do_lower_case", False)),
        _pooling_mode(json.loads(pooling.read_text()), name) if "Pooling" in kinds else None,
        "Normalize" in kinds,
    )


def _pooling_mode(said: dict[str, Any], name: str) -> str:
    older = {"cls_token": "cls", "mean_tokens": "mean", "max_tokens": "max", "lasttoken": "last"}
    modes = said.get("pooling_mode") or [
        older.get(key.removeprefix("pooling_mode_"), key)
        for key, value in said.items()
        if key.startswith("pooling_mode_") and value
    ]
    modes = {"lasttoken": ["last"]}.get(modes, [modes]) if isinstance(modes, str) else modes
    if len(modes) != 1 or modes[0] not in POOLINGS:
        raise ConfigError(f"tower.name: {name} pools by {', '.join(modes)}; known: {', '.join(POOLINGS)}, one of them")
    return str(modes[0])


class HfText(Encoder):
    """A text model of transformers; ``pooled`` as its folder says, else the mean over real tokens.

    The tokenizer is the folder's own; without one, captions are bytes.
    """

    def __init__(self, options: HfTextOptions) -> None:
        super().__init__()
        import transformers

        place = options.name.removeprefix("hf:")
        folder = place_of(place)
        said = read_sentence(folder, options.name)
        has_own = any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt"))
        changes = {**({} if has_own else {"vocab_size": 257, "pad_token_id": 0}), **options.config}
        config = load_config(options, folder, changes, "text_config")
        if not hasattr(type(config)(), "vocab_size") or not hasattr(config, "hidden_size"):
            raise ConfigError(f"tower.name: {options.name} is not a text model")
        self.spec = TextSpec(_tokenizer(options, place if has_own else None, said, config))
        own_head = config.model_type in HEADS
        try:
            if own_head:
                model = getattr(transformers, HEADS[config.model_type])(config)
            else:
                model = transformers.AutoModel.from_config(config, trust_remote_code=False)
        except (TypeError, ValueError, RuntimeError) as error:
            raise library_error(options, error) from error
        self.library = (type(model), config, "encoder." if config.is_encoder_decoder else "")
        self.model = model.get_encoder() if config.is_encoder_decoder else model
        if getattr(self.model, "pooler", None) is not None:
            self.model.pooler = None  # weights that no pooling here uses would get no gradient
        self.pooling = options.pooling or said.pooling or ("head" if own_head else "mean")
        if own_head and self.pooling != "head":
            self.model.head = torch.nn.Identity()
        self.full_length = int(config.max_position_embeddings) if own_head else None
        self.padding = int(config.pad_token_id or 0)
        self.normalised = said.normalised
        self.width = config.projection_size if self.pooling == "head" else config.hidden_size

    def blocks(self) -> list[torch.nn.Module]:
        """Its embeddings, then its layers."""
        return stem_and_layers(self.model, longest_list(self.model))

    def foreign(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Of a model of transformers of any task."""
        return by_own_names(tensors, self, *self.library)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Features:
        """``x``: int64 ``(B, L)``; ``mask``: bool ``(B, L)``, at least one True a row (None: all are tokens)."""
        if mask is None:
            mask = torch.ones_like(x, dtype=torch.bool)
        if self.full_length is not None:  # trained on rows of one length, with padding that attends and is attended to
            ids = F.pad(x.masked_fill(~mask, self.padding), (0, self.full_length - x.shape[1]), value=self.padding)
            found = self.model(input_ids=ids)
            tokens = found.last_hidden_state[:, : x.shape[1]]
        else:
            found = self.model(input_ids=x, attention_mask=mask.long())
            tokens = found.last_hidden_state
        tokens = tokens.masked_fill(~mask[:, :, None], 0.0)
        pooled = found.pooler_output if self.pooling == "head" else pool(tokens, mask, self.pooling)
        return Features(F.normalize(pooled, dim=-1) if self.normalised else pooled, tokens, mask)


def pool(tokens: Tensor, mask: Tensor, how: str) -> Tensor:
    """``(B, L, D)``, zeros outside ``mask``, to ``(B, D)``: ``mean`` or ``max`` of real tokens, ``cls`` the first, or
    the ``last``.

    >>> pool(torch.tensor([[[-3.0], [-1.0], [0.0]]]), torch.tensor([[True, True, False]]), "max")
    tensor([[-1.]])
    """
    if how == "mean":
        return tokens.sum(1) / mask.sum(1, keepdim=True)
    if how == "max":
        return tokens.masked_fill(~mask[:, :, None], -torch.inf).amax(1)
    places = torch.arange(mask.shape[1], device=mask.device)
    place = torch.zeros_like(mask[:, 0], dtype=torch.long) if how == "cls" else (places * mask).amax(1)
    return tokens[torch.arange(len(tokens), device=tokens.device), place]


def _tokenizer(options: HfTextOptions, place: str | None, said: Sentence, config: Any) -> Tokenizer:
    """The folder's own, as long as the folder says, else bytes."""
    limit = getattr(config, "max_position_embeddings", None)
    wanted = options.max_tokens or said.max_tokens
    if wanted is None and place is not None:
        wanted = HfTokenizer(place).own_limit
    if options.max_tokens is not None and limit is not None and options.max_tokens > limit:
        raise ConfigError(f"tower.max_tokens: {options.max_tokens}, but {options.name} takes at most {limit}")
    tokens = wanted or UNSAID_TOKENS
    tokens = tokens if limit is None else min(tokens, limit)
    return ByteTokenizer(tokens) if place is None else HfTokenizer(place, tokens, said.lower)
