"""Reading what ``mmcl embed`` wrote."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mmcl.evaluation.embed import EmbeddedItem, EmbeddedShards
from mmcl.types import ConfigError


def load_embeddings(folder: Path) -> EmbeddedShards:
    """``embeddings.safetensors`` and ``items.jsonl`` of a folder.

    Raises:
        ConfigError: they are not there, or do not belong together; names the file, and the line.
    """
    rows_path, items_path = folder / "embeddings.safetensors", folder / "items.jsonl"
    try:
        tensors = load_file(rows_path)
        lines = items_path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{folder}: no embeddings of `mmcl embed`: {reason}") from None
    items = tuple(_item(items_path, number, line) for number, line in enumerate(lines))
    rows: dict[str, Tensor] = {}
    owners: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        modality, _, kind = name.rpartition(".")
        (rows if kind == "rows" else owners)[modality] = tensor
    for modality, values in rows.items():
        named = owners.get(modality)
        if named is None or values.ndim != 2 or named.shape != values.shape[:1] or _outside(named, len(items)):
            raise ConfigError(f"{rows_path}: {modality} does not fit the {len(items)} lines of {items_path.name}")
    return EmbeddedShards(items, rows, owners)


def _outside(owners: Tensor, items: int) -> bool:
    return bool(len(owners)) and not 0 <= int(owners.min()) <= int(owners.max()) < items


def _item(path: Path, number: int, line: str) -> EmbeddedItem:
    try:
        facts = json.loads(line)
        captions, metadata = facts["captions"], facts.get("metadata", {})
        if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in captions):
            raise TypeError
        return EmbeddedItem(str(facts["key"]), number, tuple(captions), int(facts["label"]), metadata)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ConfigError(f"{path}, line {number + 1}: not an item with key, captions and label") from None
