"""Embeddings of whole shards: the value, and folders that keep it shard by shard.

The files of a shard are good for exactly one key: the checksums of the model and of the shard, and the settings. So
what is there need not be embedded again, an interrupted run goes on with the shards that are left, and a changed shard
or model is never mistaken for the old one.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mmcl.concatenated import AnyModel, ConcatenatedModel, open_model
from mmcl.shards.embedding_files import (
    INDEX,
    ITEMS,
    ROWS,
    VERSION,
    EmbeddingFile,
    EmbeddingIndex,
    file_names,
    read_index,
    read_items,
)
from mmcl.shards.files import is_remote, write_atomically
from mmcl.shards.manifest import Manifest
from mmcl.types import DEFAULT_DECODER, ConfigError, Decoder, Modality, RunError

_FACTS = "mmcl"
"""the one entry of a file's metadata"""


@dataclass(frozen=True, eq=False)
class EmbeddedItem:
    """One sample of the shards."""

    key: str
    draw: int
    """its number in the shards"""
    captions: tuple[str, ...]
    label: int
    metadata: dict[str, Any]


@dataclass(frozen=True, eq=False)
class EmbeddedShards:
    """All samples that could be read, and their embeddings."""

    items: tuple[EmbeddedItem, ...]
    rows: dict[Modality, Tensor]
    """float32 ``(n, D)`` of each modality, unit rows at level ``joint``; ``(n, views, D)`` where each view was kept"""
    owners: dict[Modality, Tensor]
    """int64 ``(n,)``: the item that each row shows; an item may have none, or, for text, several"""
    skipped: tuple[tuple[int, str, str, str], ...] = field(default=())
    """(draw, key, reason, detail) of samples that could not be read"""


@dataclass(frozen=True, slots=True)
class EmbedSettings:
    """What embeddings depend on besides model and shards."""

    clips: int = 1
    """evenly spaced windows of a sample"""
    crops: int = 1
    """1: the centre; 3: the start, centre and end of the long side of a picture"""
    level: Literal["joint", "pooled"] = "joint"
    """``pooled``: before every head, as it is (probes); texts are then left out"""
    each_view: bool = False
    """keep a row of each window and crop instead of their mean"""
    decoder: Decoder = DEFAULT_DECODER


def model_checksum(model: AnyModel | Path | str) -> str:
    """32 hexadecimal digits of all that embeddings depend on: the options, and the weights of towers and heads.

    ``model`` may be the place of one. Raises ``ConfigError`` where there is none.
    """
    if isinstance(model, (str, Path)):
        model = open_model(model)
    if isinstance(model, ConcatenatedModel):
        joined: ConcatenatedModel = model
        return hashlib.sha256("".join(map(model_checksum, joined.stages())).encode()).hexdigest()[:32]
    options = model.options.model_dump(mode="json", exclude={"fusion"})
    digest = hashlib.sha256(json.dumps(options, sort_keys=True).encode())
    for name, value in sorted(model.state_dict().items()):
        if not name.startswith(("momentum_", "log_scales", "fusions.")):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]


def _file_digest(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest() if hasattr(hashlib, "file_digest") else _digest(file)


def _digest(file: Any) -> bytes:
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.digest()


def shard_checksum(manifest: Manifest, shard: int) -> str:
    """What tells a shard from a changed one: the sha256 of the tar, or, where the manifest has none, of its index."""
    known: bytes = manifest.checksums[shard].tobytes()
    if any(known):
        return known.hex()
    url = manifest.shard_url(shard)
    if not is_remote(url):
        try:
            return _file_digest(Path(url)).hex()
        except OSError as error:
            raise RunError(f"cannot read {url}: {error.strerror or error}") from None
    index = manifest.shard_index(shard)
    places = hashlib.sha256(str((manifest.shard_name(shard), int(manifest.shard_bytes[shard]))).encode())
    for number in range(index.num_samples):
        places.update(repr((index.key(number), index.members(number))).encode())
    return places.hexdigest()


class EmbeddingStore:
    """The folder that the embeddings of some shards are written to, by one model with one choice of settings."""

    def __init__(
        self, folder: Path, manifest: Manifest, model: str, settings: EmbedSettings, *, checkpoint: str = ""
    ) -> None:
        """``checkpoint``: where the model is, seen from the folder."""
        self.folder, self.manifest, self.model, self.settings = folder, manifest, model, settings
        self.checkpoint = checkpoint
        self.source = "" if is_remote(manifest.url) else os.path.relpath(manifest.url, folder)
        self.names = file_names([manifest.shard_name(shard) for shard in range(manifest.num_shards)])
        facts = [VERSION, model, dataclasses.asdict(settings)]
        self.keys = [
            hashlib.sha256(json.dumps([*facts, shard_checksum(manifest, shard)]).encode()).hexdigest()[:32]
            for shard in range(manifest.num_shards)
        ]
        self._starts = np.cumsum([0, *manifest.sizes.tolist()])

    @classmethod
    def in_cache(cls, cache: Path, manifest: Manifest, model: str, settings: EmbedSettings) -> EmbeddingStore:
        """The folder in ``cache`` for the shards at this place, this model and these settings."""
        facts = json.dumps([manifest.url, model, dataclasses.asdict(settings)])
        name = file_names([manifest.url.rstrip("/").rpartition("/")[2]])[0]
        return cls(cache / f"{name}-{hashlib.sha256(facts.encode()).hexdigest()[:16]}", manifest, model, settings)

    def has(self, shard: int) -> bool:
        """Whether the files of a shard are there, whole, and made from what is there now."""
        return self._head(shard).get("key") == self.keys[shard]

    def _head(self, shard: int) -> dict[str, Any]:
        """What the file of rows says of itself; nothing where it is not the one that belongs to the items."""
        try:
            with safe_open(str(self._path(shard, ROWS)), framework="pt") as file:
                head = _facts(file.metadata())
            digest = _file_digest(self._path(shard, ITEMS)).hex()
        except (OSError, SafetensorError, ValueError):
            return {}
        return head if head.get("items") == digest else {}

    def _path(self, shard: int, ending: str) -> Path:
        return self.folder / f"{self.names[shard]}{ending}"

    def write(self, shard: int, part: EmbeddedShards) -> None:
        """Keeps a shard: first its items, then its rows, which say whose they are.

        Raises:
            RunError: the folder cannot be written.
        """
        first = int(self._starts[shard])
        lines = [
            {
                "key": item.key,
                "index": item.draw - first,
                "captions": list(item.captions),
                "label": item.label,
                "metadata": item.metadata,
            }
            for item in part.items
        ]
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode("utf-8", "replace")
        tensors = {f"{modality}.rows": rows.contiguous() for modality, rows in part.rows.items()}
        tensors |= {f"{modality}.items": owners for modality, owners in part.owners.items()}
        head = {
            "key": self.keys[shard],
            "items": hashlib.sha256(text).hexdigest(),
            "modalities": list(part.rows),
            "skipped": [(draw - first, *why) for draw, *why in part.skipped],
        }
        path = self._path(shard, ROWS)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)  # the rows that are there may belong to other items
            write_atomically(self._path(shard, ITEMS), text)
            save_file(tensors, temporary, metadata={_FACTS: json.dumps(head)})  # of several entries the order is random
            temporary.replace(path)
        except (OSError, SafetensorError) as error:
            words = getattr(error, "strerror", None) or error
            raise RunError(f"cannot write embeddings to {self.folder}: {words}") from None
        finally:
            temporary.unlink(missing_ok=True)

    def begin(self) -> None:
        """Takes the index away while shards change, and with it the files of shards that are no more."""
        if not (self.folder / INDEX).exists():
            return
        try:
            old = {file.name for file in read_index(self.folder).files}
        except ConfigError:
            old = set()
        (self.folder / INDEX).unlink()
        for name in old - set(self.names):
            for ending in (ROWS, ITEMS):
                (self.folder / f"{name}{ending}").unlink(missing_ok=True)

    def finish(self, widths: Mapping[Modality, int]) -> EmbeddingIndex:
        """Writes the index, once every shard is there."""
        files = []
        for shard, name in enumerate(self.names):
            count = sum(1 for _ in read_items(self._path(shard, ITEMS)))
            size = int(self.manifest.sizes[shard])
            files.append(EmbeddingFile(self.manifest.shard_name(shard), name, self.keys[shard], size, count))
        settings = dataclasses.asdict(self.settings)
        index = EmbeddingIndex(
            self.folder, self.model, settings, dict(widths), tuple(files), self.checkpoint, self.source
        )
        index.write()
        return index

    def read(self, shard: int) -> EmbeddedShards:
        """A shard that is there."""
        return read_part(
            self._path(shard, ROWS), self._path(shard, ITEMS), int(self._starts[shard]), int(self.manifest.sizes[shard])
        )


def read_part(rows_path: Path, items_path: Path, first: int, samples: int) -> EmbeddedShards:
    """The files of one shard, rows memory-mapped; ``first`` is the number of its first sample.

    Raises:
        ConfigError: files that do not belong together.
    """
    items = tuple(
        EmbeddedItem(
            item["key"], first + item["index"], tuple(map(str, item["captions"])), item["label"], item["metadata"]
        )
        for item in read_items(items_path)
    )
    rows: dict[Modality, Tensor] = {}
    owners: dict[Modality, Tensor] = {}
    try:
        with safe_open(str(rows_path), framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                modality, _, kind = name.rpartition(".")
                (rows if kind == "rows" else owners)[modality] = file.get_tensor(name)
            facts = _facts(file.metadata())
        skipped = tuple(
            (first + int(index), str(key), str(why), str(detail))
            for index, key, why, detail in facts.get("skipped", [])
        )
        order = [str(name) for name in facts.get("modalities", [])]
    except (OSError, SafetensorError, ValueError, TypeError) as error:
        raise ConfigError(f"{rows_path}: not embeddings: {error}") from None
    fitting = rows.keys() == owners.keys() and all(
        owners[name].shape == rows[name].shape[:1] and not _outside(owners[name], len(items)) for name in rows
    )
    if not fitting or any(not first <= item.draw < first + samples for item in items):
        raise ConfigError(f"{rows_path}: rows and items do not belong together")
    named = sorted(rows, key=lambda name: order.index(name) if name in order else len(order))
    return EmbeddedShards(items, {name: rows[name] for name in named}, {name: owners[name] for name in named}, skipped)


def _facts(metadata: Mapping[str, str] | None) -> dict[str, Any]:
    facts = json.loads((metadata or {}).get(_FACTS, "{}"))
    return facts if isinstance(facts, dict) else {}


def _outside(owners: Tensor, items: int) -> bool:
    return bool(len(owners)) and not 0 <= int(owners.min()) <= int(owners.max()) < items


@dataclass(frozen=True, eq=False)
class StoredEmbeddings:
    """A finished folder of embeddings; nothing but its index is read before it is asked for."""

    index: EmbeddingIndex

    @property
    def modalities(self) -> tuple[Modality, ...]:
        return tuple(self.index.widths)

    def __len__(self) -> int:
        """Items."""
        return sum(file.items for file in self.index.files)

    def shard(self, number: int) -> EmbeddedShards:
        """One shard, its rows memory-mapped. Raises ``ConfigError`` where its files are gone or damaged."""
        files = self.index.files
        first = sum(file.samples for file in files[:number])
        part = read_part(self.index.rows_path(number), self.index.items_path(number), first, files[number].samples)
        if len(part.items) != files[number].items:
            raise ConfigError(f"{self.index.items_path(number)}: {len(part.items)} items, not {files[number].items}")
        return part

    def __iter__(self) -> Iterator[EmbeddedShards]:
        return (self.shard(number) for number in range(len(self.index.files)))

    def load(self) -> EmbeddedShards:
        """All of it in memory."""
        return join(list(self))

    def joint(self) -> EmbeddedShards:
        """As :meth:`load`; ``ConfigError`` unless these are rows of the joint space, one of each sample's modality."""
        settings = self.index.settings
        if settings.get("level") != "joint" or settings.get("each_view"):
            raise ConfigError(f"{self.index.folder}: retrieval needs embeddings without --pooled and --each-view")
        return self.load()


def open_embeddings(folder: str | Path) -> StoredEmbeddings:
    """Opens what ``mmcl embed`` wrote.

    Raises:
        ConfigError: not such a folder, or one that is not finished.
    """
    return StoredEmbeddings(read_index(folder))


def join(parts: Sequence[EmbeddedShards]) -> EmbeddedShards:
    """Parts one after the other. Equal captions get the same row.

    A text that is encoded in another batch may differ in its last bits, and equal texts must tie.
    """
    starts = np.cumsum([0, *(len(part.items) for part in parts)]).tolist()
    items = tuple(item for part in parts for item in part.items)
    names = list(dict.fromkeys(modality for part in parts for modality in part.rows))
    rows = {name: torch.cat([part.rows[name] for part in parts if name in part.rows]) for name in names}
    owners = {
        name: torch.cat(
            [part.owners[name] + start for part, start in zip(parts, starts, strict=False) if name in part.rows]
        )
        for name in names
    }
    if "text" in rows:
        captions = [caption for item in items for caption in item.captions]
        if len(captions) == len(rows["text"]):
            first: dict[str, int] = {}
            same = [first.setdefault(caption, number) for number, caption in enumerate(captions)]
            if len(first) < len(captions):
                rows["text"] = rows["text"][torch.tensor(same)]
    return EmbeddedShards(items, rows, owners, tuple(sorted(skip for part in parts for skip in part.skipped)))
