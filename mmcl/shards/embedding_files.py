"""A folder of embeddings as `mmcl embed` writes it: two files for each shard, and an index that says they are whole.

``NAME.safetensors`` holds, for each modality, ``MODALITY.rows`` (float32) and ``MODALITY.items`` (int64: the line of
the item that each row shows); ``NAME.jsonl`` a line for each item. ``index.json`` names them in the order of the shards
and is written last. All of it may be a stranger's: names stay inside the folder, and lines are checked.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmcl.shards.files import write_atomically
from mmcl.types import ConfigError

INDEX = "index.json"
FORMAT, VERSION = "mmcl-embeddings", 1
ROWS, ITEMS = ".safetensors", ".jsonl"

_NAME = re.compile(r"[\w-][\w.~-]*")


@dataclass(frozen=True, slots=True)
class EmbeddingFile:
    """What was made of one shard."""

    shard: str
    """its name in the manifest"""
    name: str
    """of the two files, without their endings"""
    key: str
    """what they were made from: see ``mmcl.evaluation.embedding_store``"""
    samples: int
    """of the shard"""
    items: int
    """of them those that could be read"""


@dataclass(frozen=True, slots=True)
class EmbeddingIndex:
    """What ``index.json`` holds."""

    folder: Path
    model: str
    """checksum of the model"""
    settings: Mapping[str, Any]
    """what the rows depend on besides model and shards"""
    widths: Mapping[str, int]
    """numbers in a row of each modality"""
    files: tuple[EmbeddingFile, ...]
    checkpoint: str = ""
    """where the model was, seen from the folder; "" where nobody said"""
    source: str = ""
    """where the shards were, seen from the folder; "" for remote ones"""

    def rows_path(self, number: int) -> Path:
        return self.folder / f"{self.files[number].name}{ROWS}"

    def items_path(self, number: int) -> Path:
        return self.folder / f"{self.files[number].name}{ITEMS}"

    def write(self) -> None:
        """Raises ``RunError`` where the folder cannot be written."""
        document = {
            "format": FORMAT,
            "version": VERSION,
            "model": self.model,
            "checkpoint": self.checkpoint,
            "source": self.source,
            "settings": dict(self.settings),
            "modalities": dict(self.widths),
            "items": sum(file.items for file in self.files),
            "shards": [{name: getattr(file, name) for name in EmbeddingFile.__slots__} for file in self.files],
        }
        text = json.dumps(document, indent=1, ensure_ascii=False) + "\n"
        write_atomically(self.folder / INDEX, text.encode("utf-8"))


def read_index(folder: str | Path) -> EmbeddingIndex:
    """The index of a folder of embeddings.

    Raises:
        ConfigError: not such a folder, not finished, of another version, or an index that says what cannot be.
    """
    place = Path(folder)
    wrong = ConfigError(f"{place}: not a folder that `mmcl embed` wrote")
    if not (place / INDEX).is_file():
        if any(place.glob(f"*{ROWS}")):
            raise ConfigError(f"{place}: unfinished embeddings: run the same command again, it goes on from there")
        raise wrong
    try:
        document = json.loads((place / INDEX).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        raise wrong from None
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise wrong
    if document.get("version") != VERSION:
        raise ConfigError(f"{place}: embeddings of version {document.get('version')}; this program reads {VERSION}")
    try:
        files = tuple(_checked(EmbeddingFile(**entry)) for entry in document["shards"])
        widths = {str(name): int(width) for name, width in document["modalities"].items()}
        return EmbeddingIndex(
            place,
            str(document["model"]),
            dict(document["settings"]),
            widths,
            files,
            str(document.get("checkpoint", "")),
            str(document.get("source", "")),
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{place / INDEX}: damaged: {error}") from None


def _checked(file: EmbeddingFile) -> EmbeddingFile:
    if not all(isinstance(text, str) for text in (file.shard, file.key, file.name)) or not _NAME.fullmatch(file.name):
        raise ValueError(f"{str(file.name)[:80]!r} is not a name")
    if type(file.samples) is not int or type(file.items) is not int or not 0 <= file.items <= file.samples:
        raise ValueError(f"{file.name}: {file.items!r} items of {file.samples!r} samples")
    return file


def file_names(shards: Sequence[str]) -> list[str]:
    """A name for the files of each shard, all different; that of the shard where it is a plain one.

    >>> file_names(["a/0.tar", "a_0.tar", ".x.tar"])
    ['a_0', 'a_0~1', '_.x']
    """
    names: list[str] = []
    taken: set[str] = set()
    for number, shard in enumerate(shards):
        plain = re.sub(r"[^\w.-]", "_", re.sub(r"\.tar$", "", shard), flags=re.ASCII)[-150:]
        plain = f"_{plain}" if plain.startswith(".") or not plain else plain
        names.append(plain if plain not in taken else f"{plain}~{number}")
        taken.add(names[-1])
    return names


def read_items(path: Path, first: int = 0) -> Iterator[dict[str, Any]]:
    """The lines of an items file: ``key``, ``index`` in the shard, ``captions``, ``label`` (−1: none), ``metadata``.

    Those before ``first`` are passed over without a look at what they hold.

    Raises:
        ConfigError: a line is something else.
    """
    kinds = {"key": str, "index": int, "captions": list, "label": int, "metadata": dict}
    try:
        with path.open("rb") as file:
            for number, line in enumerate(itertools.islice(file, first, None), first + 1):
                item = json.loads(line)
                if not isinstance(item, dict) or any(type(item.get(name)) is not kind for name, kind in kinds.items()):
                    raise ConfigError(f"{path}:{number}: not an item of embeddings")
                yield item
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
