"""Towers in model folders: what of them lies beside the weights, and what a folder says of their input."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from mmcl.config import Options
from mmcl.encoders.packages import place_of
from mmcl.types import ConfigError, Spec, TextSpec, Tokenizer

FOLDER = "towers"
"""in a model folder: one folder for each tower that reads files"""

LIBRARY = "hf:"
"""names that may be followed by a folder"""

FILES = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tokenizer.model",
    "preprocessor_config.json",
    "modules.json",
    "sentence_bert_config.json",
    "1_Pooling/config.json",
)
"""what is copied of a folder of transformers; never weights, never code"""


def _source(options: Options) -> Path | None:
    """The folder that a tower's name points to, if it does."""
    name = str(getattr(options, "name", ""))
    if not name.startswith(LIBRARY):
        return None
    folder = place_of(name.removeprefix(LIBRARY))
    return folder if (folder / "config.json").is_file() else None


def stored_tower(tower: str, options: Options) -> dict[str, Any]:
    """Changes to a tower's options on their way into a model folder, where its files and its weights lie."""
    changes: dict[str, Any] = {"pretrained": None} if hasattr(options, "pretrained") else {}
    if _source(options) is not None:
        changes["name"] = f"{LIBRARY}./{FOLDER}/{tower}"
    return changes


def tower_files(tower: str, options: Options) -> dict[str, Path]:
    """Path in the model folder → file to copy."""
    source = _source(options)
    if source is None:
        return {}
    return {f"{FOLDER}/{tower}/{name}": source / name for name in FILES if (source / name).is_file()}


def found_tower(options: Options, folder: Path, *, where: str) -> dict[str, Any]:
    """The way back: changes to options that were read from ``config.json`` of a model folder.

    Raises:
        ConfigError: the tower would read files of another place.
    """
    changes: dict[str, Any] = {"pretrained": None} if hasattr(options, "pretrained") else {}
    name = str(getattr(options, "name", ""))
    place = name.removeprefix(LIBRARY)
    if not name.startswith(LIBRARY) or ("/" not in place and "\\" not in place and place not in ("", ".", "..", "~")):
        return changes
    inside = (folder / FOLDER).resolve()
    target = (folder / place).resolve()
    if not place.startswith("./") or not target.is_relative_to(inside) or target == inside:
        raise ConfigError(f"{where}.name: {name!r} is not a place in {FOLDER}/ of this folder; nothing else is read")
    if not target.is_dir():
        raise ConfigError(f"{where}.name: {target} is missing")
    return {**changes, "name": f"{LIBRARY}{target}"}


def spec_values(spec: Spec) -> dict[str, Any]:
    """What a tower eats, as JSON values; of a tokenizer its kind and settings."""
    if isinstance(spec, TextSpec):
        return {"modality": spec.modality, "tokenizer": _tokenizer_values(spec.tokenizer)}
    return {"modality": spec.modality, **dataclasses.asdict(spec)}


def _tokenizer_values(tokenizer: Tokenizer) -> dict[str, Any]:
    values: dict[str, Any] = {"kind": type(tokenizer).__name__}
    if dataclasses.is_dataclass(tokenizer):
        values |= {each.name: getattr(tokenizer, each.name) for each in dataclasses.fields(tokenizer)}
    values.pop("folder", None)  # where its files lie is the folder's affair
    return values


def card_name(options: Options) -> str:
    """A tower's name for people: of a folder, its last part alone."""
    name = str(getattr(options, "name", ""))
    return name if _source(options) is None else f"{LIBRARY}{Path(name.removeprefix(LIBRARY)).name}"
