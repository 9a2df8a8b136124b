"""Search in a folder of embeddings: exact and streamed from memory-mapped files, or by an approximate index of faiss.

Nothing but ``index.json`` is read when a folder is opened; of a hit, one line of its items file.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mmcl.concatenated import AnyModel, open_model
from mmcl.config import unknown_name
from mmcl.evaluation.embedding_store import model_checksum
from mmcl.media.inputs import PICTURES
from mmcl.media.probe import probe
from mmcl.media.text import clean_caption
from mmcl.search_faiss import near_index
from mmcl.shards.embedding_files import INDEX, EmbeddingIndex, read_index, read_items
from mmcl.types import ConfigError, Modality, SampleError

METHODS = ("exact", "faiss")

CHUNK_ROWS = 1 << 16
"""rows of a file that are compared at once"""

FAISS_FOLDER = "faiss"
MEDIA = (*PICTURES, ".mp4", ".mkv", ".webm", ".mov", ".avi", ".wav", ".flac", ".mp3", ".ogg", ".opus", ".m4a")
"""endings of a query that is meant as a file"""


@dataclass(frozen=True, slots=True)
class Hit:
    """One found item."""

    key: str
    shard: str
    """its name in the manifest"""
    index: int
    """its number in the shard"""
    score: float
    """cosine"""
    caption: str
    """the caption that was found, or the item's first; "" for none"""
    modality: Modality
    """of the row that was found"""


class Index:
    """An opened folder of embeddings; see :meth:`open`."""

    def __init__(self, index: EmbeddingIndex) -> None:
        self._index = index
        self.folder = index.folder
        self.model = index.model
        """checksum of the model that made it"""
        self._counts: dict[Modality, list[int]] = {}
        self._near: dict[Modality, Any] = {}
        if index.settings.get("level") != "joint":
            raise ConfigError(f"{self.folder}: rows from before the heads (--pooled); they are in no joint space")

    @classmethod
    def open(cls, folder: str | Path) -> Index:
        """Opens what ``mmcl embed`` wrote, without reading rows.

        Raises:
            ConfigError: not such a folder, or not rows of the joint space.
        """
        return cls(read_index(folder))

    @property
    def modalities(self) -> tuple[Modality, ...]:
        return tuple(self._index.widths)

    @property
    def shard_names(self) -> tuple[str, ...]:
        """Of the shards whose rows it holds, as their manifest names them."""
        return tuple(file.shard for file in self._index.files)

    def source(self) -> Path | None:
        """Where the shards were when they were embedded; None: nobody said, or they are there no more."""
        place = self.folder / self._index.source
        return place if self._index.source and (place / INDEX).is_file() else None

    @property
    def default_modality(self) -> Modality:
        """What is searched where nobody says: the first that is not text."""
        return next((each for each in self.modalities if each != "text"), self.modalities[0])

    def __len__(self) -> int:
        """Items."""
        return sum(file.items for file in self._index.files)

    def count(self, modality: Modality) -> int:
        """Rows of a modality."""
        return sum(self._shapes(modality))

    def check_model(self, checkpoint: Path | str) -> None:
        """That a model is the one that made the index: rows of another one mean something else.

        Raises:
            ConfigError: it is another.
        """
        found = model_checksum(checkpoint)
        if found != self.model:
            raise ConfigError(
                f"{self.folder} was made by the model {self.model[:12]}…, {checkpoint} is {found[:12]}…; "
                "embed the shards again with this one"
            )

    def checkpoint(self) -> Path:
        """Where the model that made the index was at the time.

        Raises:
            ConfigError: the index does not say, or it is there no more.
        """
        told = self._index.checkpoint
        place = self.folder / told
        if not told or not place.exists():
            where = f"was at {told}, seen from {self.folder}" if told else "is not named"
            raise ConfigError(f"{self.folder}: the model that made it {where}; say --checkpoint")
        return place

    def query(
        self, rows: Tensor, top: int = 10, *, modality: Modality | None = None, method: str = "exact"
    ) -> list[list[Hit]]:
        """For each row the ``top`` items of highest cosine, the best first; of an item, its best row counts.

        Args:
            rows: float ``(Q, D)`` of ``encode_*``; made unit rows here.
            modality: which rows are searched; default: the first that is not text.
            method: ``exact``, or ``faiss``: approximate, built and saved beside the embeddings at the first call.

        Raises:
            ConfigError: no such modality, another width, faiss is not installed, or damaged files.
        """
        wanted = self._checked(rows, top, modality)
        queries = F.normalize(rows.detach().cpu().float(), dim=-1)
        if method not in METHODS:
            raise unknown_name("--index", method, METHODS)
        find = self._exact if method == "exact" else self._faiss
        total = self.count(wanted)
        if not total:
            return [[] for _ in rows]
        few = min(total, top if wanted != "text" else 4 * top)
        while True:
            scores, places = find(queries, few, wanted)
            found = [self._hits(s, p, top, wanted) for s, p in zip(scores.tolist(), places.tolist(), strict=True)]
            if few >= total or all(len(hits) >= min(top, len(self)) for hits in found):
                return found
            few = min(total, 4 * few)

    def _checked(self, rows: Tensor, top: int, modality: Modality | None) -> Modality:
        wanted = modality or self.default_modality
        if wanted not in self._index.widths:
            raise unknown_name(f"{self.folder}: modality", wanted, self.modalities)
        if rows.ndim != 2 or not rows.is_floating_point() or not bool(torch.isfinite(rows).all()):
            raise ConfigError(f"queries must be finite float rows (Q, D), got {rows.dtype} {tuple(rows.shape)}")
        width = self._index.widths[wanted]
        if rows.shape[1] != width:
            raise ConfigError(f"queries have {rows.shape[1]} numbers, {wanted} rows of {self.folder} have {width}")
        if top < 1:
            raise ConfigError(f"top must be at least 1, got {top}")
        return wanted

    # rows: a row's place is its number over all shards

    def _opened(self, shard: int) -> Any:
        path = self._index.rows_path(shard)
        try:
            return safe_open(str(path), framework="pt")
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
            raise ConfigError(f"{path}: cannot be read: {reason}") from None

    def _shapes(self, modality: Modality) -> list[int]:
        """Rows of a modality in each shard; views of an item count each."""
        if modality not in self._counts:
            self._counts[modality] = [self._rows_of(shard, modality) for shard in range(len(self._index.files))]
        return self._counts[modality]

    def _rows_of(self, shard: int, modality: Modality) -> int:
        with self._opened(shard) as file:
            names = set(file.keys())
            if f"{modality}.rows" not in names:
                return 0
            shape = file.get_slice(f"{modality}.rows").get_shape()
            width = self._index.widths[modality]
            owners = file.get_slice(f"{modality}.items").get_shape() if f"{modality}.items" in names else []
        if len(shape) not in (2, 3) or shape[-1] != width or owners != shape[:1]:
            raise ConfigError(f"{self._index.rows_path(shard)}: {modality} rows of shape {shape}, wanted (n, {width})")
        return int(np.prod(shape[:-1]))

    def chunks(self, modality: Modality, size: int = CHUNK_ROWS) -> Iterator[tuple[int, Tensor]]:
        """All rows of a modality, file by file: the place of the first, and float32 ``(n, D)``."""
        place = 0
        for shard, count in enumerate(self._shapes(modality)):
            if not count:
                continue
            with self._opened(shard) as file:
                part = file.get_slice(f"{modality}.rows")
                length = part.get_shape()[0]
                step = max(1, size * length // count)
                for start in range(0, length, step):
                    rows = part[start : start + step]
                    yield place + start * (count // length), rows.reshape(-1, rows.shape[-1]).float()
            place += count

    def _exact(self, queries: Tensor, few: int, modality: Modality) -> tuple[Tensor, Tensor]:
        """Scores and places ``(Q, few)``, the best first."""
        best = torch.full((len(queries), 0), 0.0)
        places = torch.zeros(len(queries), 0, dtype=torch.int64)
        for first, rows in self.chunks(modality):
            scores, numbers = (queries @ rows.T).topk(min(few, len(rows)), dim=1)
            best, places = torch.cat([best, scores], 1), torch.cat([places, numbers + first], 1)
            best, kept = best.topk(min(few, best.shape[1]), dim=1)
            places = places.gather(1, kept)
        return best, places

    def _hits(self, scores: Sequence[float], places: Sequence[int], top: int, modality: Modality) -> list[Hit]:
        starts = np.cumsum([0, *self._shapes(modality)])
        seen: set[tuple[int, int]] = set()
        hits = []
        for score, place in sorted(zip(scores, places, strict=True), key=lambda hit: (-hit[0], hit[1])):
            if place < 0:  # faiss found no more
                continue
            shard = int(np.searchsorted(starts, place, side="right")) - 1
            item, caption = self._owner(shard, int(place - starts[shard]), modality)
            if (shard, item) in seen:
                continue
            seen.add((shard, item))
            hits.append(self._hit(shard, item, caption, score, modality))
            if len(hits) == top:
                break
        return hits

    def _owner(self, shard: int, row: int, modality: Modality) -> tuple[int, int]:
        """The item that a row shows, and which of the item's rows it is."""
        with self._opened(shard) as file:
            shape = file.get_slice(f"{modality}.rows").get_shape()
            row //= int(np.prod(shape[1:-1]))  # views of one item lie together
            owners: list[int] = file.get_slice(f"{modality}.items")[max(0, row - 1000) : row + 1].tolist()
        item = owners[-1]
        if not 0 <= item < self._index.files[shard].items:
            raise ConfigError(f"{self._index.rows_path(shard)}: rows and items do not belong together")
        return item, sum(1 for _ in itertools.takewhile(lambda owner: owner == item, reversed(owners))) - 1

    def _hit(self, shard: int, item: int, caption: int, score: float, modality: Modality) -> Hit:
        path = self._index.items_path(shard)
        line = next(read_items(path, item), None)
        if line is None:
            raise ConfigError(f"{path}: has no item {item}")
        captions = [str(each) for each in line["captions"]]
        shown = caption if modality == "text" and caption < len(captions) else 0
        return Hit(
            clean_caption(line["key"]),
            self._index.files[shard].shard,
            line["index"],
            round(score, 6),
            clean_caption(captions[shown]) if captions else "",
            modality,
        )

    # faiss

    def _faiss(self, queries: Tensor, few: int, modality: Modality) -> tuple[Tensor, Tensor]:
        if modality not in self._near:
            path = self.folder / FAISS_FOLDER / f"{modality}.faiss"
            source, total = self.checksum(modality), self.count(modality)
            self._near[modality] = near_index(path, source, total, lambda: self.chunks(modality))
        scores, places = self._near[modality].search(queries.numpy(), few)
        return torch.from_numpy(scores), torch.from_numpy(places)

    def checksum(self, modality: Modality) -> str:
        """Of what rows are: the index, and of each file its size, its header, and its rows at even distances."""
        digest = hashlib.sha256((self.folder / INDEX).read_bytes())
        for shard, count in enumerate(self._shapes(modality)):
            path = self._index.rows_path(shard)
            with path.open("rb") as file:
                header = int.from_bytes(file.read(8), "little")
                digest.update(str(path.stat().st_size).encode() + file.read(header))
            if not count:
                continue
            with self._opened(shard) as opened:
                part = opened.get_slice(f"{modality}.rows")
                for row in np.linspace(0, part.get_shape()[0] - 1, 64).astype(int).tolist():
                    digest.update(part[row : row + 1].numpy().tobytes())
        return digest.hexdigest()


def encode_query(model: AnyModel, query: str) -> Tensor:
    """A unit row ``(1, D)`` of a text, or of a file: with a picture by the video tower, else by the audio tower.

    Raises:
        ConfigError: the model has no such tower, or the file is no such media.
    """
    path = Path(query)
    try:
        if not _is_file(path):
            return model.encode_text(query)
        if path.suffix.lower() in PICTURES or probe(path).video is not None:
            return model.encode_video(path)
        return model.encode_audio(path)
    except SampleError as error:
        raise ConfigError(f"{query}: {error}") from None


def _is_file(path: Path) -> bool:
    try:
        found = path.is_file()
    except (OSError, ValueError):  # a text longer than a name may be
        return False
    if not found and path.suffix.lower() in MEDIA and " " not in path.name:
        raise ConfigError(f"{path}: no such file; a text that ends like this needs a blank")
    return found


def search(
    index: Index,
    query: str,
    *,
    checkpoint: Path | str | None = None,
    top: int = 10,
    modality: Modality | None = None,
    method: str = "exact",
) -> list[Hit]:
    """What ``mmcl search`` shows: the ``top`` items of an index for a text or a media file.

    Args:
        checkpoint: the model that made the index; default: where it was when it made it.

    Raises:
        ConfigError: another model than the index's, a file that is no media, or what :meth:`Index.query` refuses.
    """
    place = index.checkpoint() if checkpoint is None else Path(checkpoint)
    index.check_model(place)
    model = open_model(place)
    return index.query(encode_query(model, query), top, modality=modality, method=method)[0]


def hit_lines(hits: Sequence[Hit]) -> str:
    """Hits for people: score, key, shard and caption, one line each."""
    keys, shards = max((len(hit.key) for hit in hits), default=0), max((len(hit.shard) for hit in hits), default=0)
    return "\n".join(
        f"{rank:>3}  {hit.score:+.4f}  {hit.key:<{keys}}  {hit.shard:<{shards}}  {hit.caption}".rstrip()
        for rank, hit in enumerate(hits, 1)
    )


def hits_json(hits: Sequence[Hit]) -> str:
    """Hits for programs: a JSON array of objects."""
    return json.dumps([dataclasses.asdict(hit) for hit in hits], ensure_ascii=False, indent=1)
