"""Embedding whole shards: every sample once, in the order of the shards, on any number of processes.

Samples are encoded in chunks: the first ``batch`` of a shard, the next, … Chunk c of those to be made is rank c mod W's
work. So the rows of a shard are the same, bit for bit, on any number of processes and wherever a run went on.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from mmcl.concatenated import AnyModel, open_model
from mmcl.config import read_yaml
from mmcl.data import ClipStream
from mmcl.distributed import Comm
from mmcl.evaluation.embedding_store import (
    EmbeddedItem,
    EmbeddedShards,
    EmbeddingStore,
    EmbedSettings,
    StoredEmbeddings,
    join,
    model_checksum,
    open_embeddings,
)
from mmcl.folders import check_writable, model_folder, run_config
from mmcl.model import average_windows
from mmcl.progress import show_progress
from mmcl.shards import load_manifest
from mmcl.shards.manifest import Manifest
from mmcl.types import (
    DEFAULT_DECODER,
    Batch,
    ConfigError,
    Decoder,
    Modality,
    RunError,
    VectorSpec,
    VideoSpec,
    View,
    ViewBatch,
)

__all__ = ["EmbedSettings", "EmbeddedItem", "EmbeddedShards", "default_clips", "embed_shards", "embed_to_folder"]

TEXTS = 64
"""captions per forward"""


def embed_shards(
    model: AnyModel,
    shards: str,
    *,
    clips: int = 1,
    crops: int = 1,
    batch: int = 64,
    workers: int = 2,
    in_process: bool = False,
    decoder: Decoder = DEFAULT_DECODER,
    comm: Comm | None = None,
    device: torch.device | str | None = None,
    level: Literal["joint", "pooled"] = "joint",
    each_view: bool = False,
    cache: Path | None = None,
    quiet: bool = False,
) -> EmbeddedShards:
    """Embeds every sample of ``shards`` with the first tower of each modality; all captions of a sample are embedded.

    Args:
        clips: evenly spaced windows whose embeddings are averaged.
        crops: 3 looks at the start, centre and end of the long side of each picture, and averages over these as well.
        level: ``pooled`` gives what is before every head, as it is (probes); texts are then left out.
        each_view: gives a row of each window and crop instead of their mean.
        batch: rows per forward of one rank.
        workers: decoding processes of this rank; ``in_process`` decodes in this one.
        device: where the model goes; default: the GPU of this process, else the CPU.
        comm: with more than one rank each reads its share; every rank returns everything.
        cache: a folder that keeps every shard as soon as it is done. What it holds of the same model, shards and
            options is not embedded again.
        quiet: shows no progress.

    Raises:
        ConfigError: crops that a tower has no use for.
        RunError: no sample could be read, or ``cache`` cannot be written.
    """
    comm, manifest = comm or Comm.current(), load_manifest(shards)
    settings = EmbedSettings(clips, crops, level, each_view, decoder)
    store = None if cache is None else EmbeddingStore.in_cache(cache, manifest, model_checksum(model), settings)
    embedder = _Embedder(model.eval().to(own_device() if device is None else device), settings, batch, comm)
    parts = dict(embedder.run(manifest, store, workers=workers, in_process=in_process, quiet=quiet))
    found = join([parts[shard] for shard in range(manifest.num_shards)])
    if not found.items:
        raise RunError(f"{shards}: none of {manifest.num_samples} samples could be read")
    return found


def embed_to_folder(
    checkpoint: Path,
    shards: str,
    out: Path,
    *,
    clips: int | None = None,
    crops: int = 1,
    level: Literal["joint", "pooled"] = "joint",
    each_view: bool = False,
    batch: int = 64,
    workers: int = 2,
    in_process: bool = False,
    decoder: Decoder = DEFAULT_DECODER,
    comm: Comm | None = None,
) -> StoredEmbeddings:
    """Writes the embeddings of some shards into a folder (see ``mmcl.shards.embedding_files``), shard by shard.

    What the folder holds of the same model, shards and settings is kept: an interrupted run goes on. In a process group
    every process calls this; each does its share and the first writes. Options are those of :func:`embed_shards`.

    Raises:
        ConfigError: no such checkpoint or shards.
        RunError: nothing could be read, or the folder cannot be written.
    """
    check_writable(out)
    comm = comm or Comm.current()
    model = open_model(checkpoint)
    settings = EmbedSettings(clips or default_clips(checkpoint), crops, level, each_view, decoder)
    place = os.path.relpath(model_folder(checkpoint).resolve(), out.resolve())
    store = EmbeddingStore(out, load_manifest(shards), model_checksum(model), settings, checkpoint=place)
    embedder = _Embedder(model.to(own_device()), settings, batch, comm)
    for _ in embedder.run(store.manifest, store, workers=workers, in_process=in_process, read=False):
        pass  # each shard is on disk by now
    comm.barrier()
    stored = open_embeddings(out)
    if not len(stored):
        raise RunError(f"{shards}: none of {store.manifest.num_samples} samples could be read")
    return stored


def own_device() -> torch.device:
    """The GPU of this process, or the CPU."""
    return (
        torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        if torch.cuda.is_available()
        else torch.device("cpu")
    )


def default_clips(checkpoint: Path | str) -> int:
    """Windows per sample as the run that wrote a checkpoint says; 1 for a model without its run."""
    config = run_config(Path(checkpoint))
    # read as it is: a run of another version may hold keys that this one does not know
    return int(read_yaml(config).get("evaluate", {}).get("clips", 1)) if config.exists() else 1


_Rows: TypeAlias = dict[Modality, Tensor]
_Made: TypeAlias = tuple[list[list[Any]], list[list[Any]], _Rows, _Rows]
"""of one chunk: facts of each row, samples that could not be read, rows, and which rows are there"""


class _Part:
    """The rows of a shard, as they come in."""

    def __init__(self) -> None:
        self.items: list[EmbeddedItem] = []
        self.skipped: list[tuple[int, str, str, str]] = []
        self.rows: dict[Modality, list[Tensor]] = {}
        self.owners: dict[Modality, list[int]] = {}

    def add(self, facts: list[list[Any]], skipped: list[list[Any]], rows: _Rows, present: _Rows) -> None:
        """Takes one chunk; holes are left out."""
        self.skipped += [(draw, key, reason, detail) for draw, key, reason, detail in skipped]
        for place, (key, draw, captions, label, metadata) in enumerate(facts):
            if not key:
                continue
            for modality, values in rows.items():
                if present[modality][place]:
                    self.rows.setdefault(modality, []).append(values[place])
                    self.owners.setdefault(modality, []).append(len(self.items))
            self.items.append(EmbeddedItem(key, draw, tuple(captions), label, metadata))

    def add_texts(self, wordings: dict[str, Tensor]) -> None:
        texts = [(number, caption) for number, item in enumerate(self.items) for caption in item.captions]
        self.rows["text"] = [wordings[caption] for _, caption in texts]
        self.owners["text"] = [number for number, _ in texts]

    def done(self, shapes: dict[Modality, tuple[int, ...]]) -> EmbeddedShards:
        return EmbeddedShards(
            tuple(self.items),
            {m: torch.stack(rows) if (rows := self.rows.get(m)) else torch.zeros(0, *shapes[m]) for m in shapes},
            {m: torch.tensor(self.owners.get(m, []), dtype=torch.int64) for m in shapes},
            tuple(sorted(self.skipped)),
        )


class _Embedder:
    """A model, what is wanted of it, and the process group that shares the work."""

    def __init__(self, model: AnyModel, settings: EmbedSettings, batch: int, comm: Comm) -> None:
        self.model, self.settings, self.batch, self.comm = model, settings, batch, comm
        self.device = next(model.parameters()).device
        towers = {modality: model.tower_of(modality) for modality in modalities_of(model)}
        self.towers = {modality: tower for modality, tower in towers.items() if modality != "text"}
        self.views = {modality: self._views(tower) for modality, tower in self.towers.items()}
        # a text view keeps samples that have captions alone
        self.all_views = [View(model.tower(towers["text"]).spec)] if "text" in towers else []
        self.all_views += [view for each in self.views.values() for view in each]
        self.text = towers.get("text") if settings.level == "joint" else None

    def _views(self, tower: str) -> list[View]:
        """Window by window, each with its crops."""
        spec = self.model.tower(tower).spec
        specs = [spec]
        if self.settings.crops == 3 and isinstance(spec, VideoSpec):
            if spec.fit == "squash":
                raise ConfigError(
                    f"crops=3: the tower {tower!r} scales both sides (fit: squash), there is nothing to cut"
                )
            specs = [dataclasses.replace(spec, fit=fit) for fit in ("crop_start", "crop", "crop_end")]
        elif self.settings.crops not in (1, 3):
            raise ConfigError(f"crops={self.settings.crops}; allowed: 1, 3")
        return [View(each, clip) for clip in range(self.settings.clips) for each in specs]

    def widths(self) -> dict[Modality, int]:
        """Numbers in a row of each modality."""
        named = {modality: self.model.width(tower, self.settings.level) for modality, tower in self.towers.items()}
        return named | ({} if self.text is None else {"text": self.model.joint_width})

    @torch.no_grad()
    def run(
        self,
        manifest: Manifest,
        store: EmbeddingStore | None,
        *,
        workers: int,
        in_process: bool,
        read: bool = True,
        quiet: bool = False,
    ) -> Iterator[tuple[int, EmbeddedShards]]:
        """Every shard, on every rank; those of ``store`` first, left out unless ``read``."""
        here = torch.tensor(
            [store is not None and store.has(shard) for shard in range(manifest.num_shards)], dtype=torch.int64
        )
        # where the ranks do not see one folder, it is made again
        done = self.comm.min(here.to(self.comm.host_device)).bool().tolist()
        if store is not None and self.comm.rank == 0:
            store.begin()
        if store is not None and read:
            for shard in np.flatnonzero(done).tolist():
                yield shard, store.read(shard)
        pending = np.flatnonzero(np.logical_not(done)).tolist()
        for shard, part in self._make(manifest, pending, workers, in_process, quiet):
            if store is not None and self.comm.rank == 0:
                store.write(shard, part)
            yield shard, part
        if store is not None and self.comm.rank == 0:
            store.finish(self.widths())

    def _make(
        self, manifest: Manifest, pending: Sequence[int], workers: int, in_process: bool, quiet: bool
    ) -> Iterator[tuple[int, EmbeddedShards]]:
        if not manifest.num_samples:
            raise ConfigError(f"{manifest.url}: holds no samples")
        if not pending:
            return
        comm, batch = self.comm, self.batch
        starts = np.cumsum([0, *manifest.sizes.tolist()]).tolist()
        chunks = [
            (shard, range(first, min(first + batch, starts[shard + 1])))
            for shard in pending
            for first in range(starts[shard], starts[shard + 1], batch)
        ]
        rounds = -(-len(chunks) // comm.world_size)
        mine = np.full((rounds, batch), -1)
        for turn in range(rounds):  # a rank whose turn is empty reads holes: all make the same number of forwards
            number = turn * comm.world_size + comm.rank
            if number < len(chunks):
                mine[turn, : len(chunks[number][1])] = chunks[number][1]
        stream = ClipStream(
            manifest,
            self.all_views,
            global_batch=batch,
            workers=workers,
            shuffle=False,
            samples=mine.ravel().tolist(),
            rule="even",
            decoder=self.settings.decoder,
            in_process=in_process,
            with_metadata=True,
        )
        parts = {shard: _Part() for shard in pending}
        left = {shard: math.ceil(int(manifest.sizes[shard]) / batch) for shard in pending}
        with show_progress("embedding", "batches", quiet=quiet or comm.rank > 0) as show:
            for turn, rows in enumerate(stream):
                for chunk, made in zip(chunks[turn * comm.world_size :], self._gathered(rows), strict=False):
                    parts[chunk[0]].add(*made)
                    left[chunk[0]] -= 1
                show(turn + 1, rounds, "")
                for shard in [shard for shard in parts if not left[shard]]:
                    yield shard, self._with_texts(parts.pop(shard))
        for shard, part in parts.items():  # empty ones
            yield shard, self._with_texts(part)

    def _gathered(self, rows: Batch) -> Iterator[_Made]:
        """What each rank made of its chunk, rank by rank."""
        moved, comm = rows.to(self.device), self.comm
        embedded = {
            modality: comm.gather_by_rank(
                self._encode(tower, [moved.views[view] for view in self.views[modality]])
            ).cpu()
            for modality, tower in self.towers.items()
        }
        present = {m: comm.gather_by_rank(moved.views[each[0]].present).cpu() for m, each in self.views.items()}
        facts = [
            [key, draw, list(captions), label, dict(metadata)]
            for key, draw, captions, label, metadata in zip(
                rows.keys, rows.draws.tolist(), rows.captions, rows.labels.tolist(), rows.metadata, strict=True
            )
        ]
        everyone = comm.gather_objects([facts, [list(skip) for skip in rows.skipped]])
        for rank, (items, skipped) in enumerate(everyone):
            part = slice(rank * self.batch, (rank + 1) * self.batch)
            yield (
                items,
                skipped,
                {modality: values[part] for modality, values in embedded.items()},
                {modality: values[part] for modality, values in present.items()},
            )

    def _encode(self, tower: str, views: Sequence[ViewBatch]) -> Tensor:
        """``(B, D)``, or ``(B, views, D)`` where each view is kept."""
        level = self.settings.level
        rows = [self.model.encode_view(tower, view, [level])[level].float() for view in views]
        if self.settings.each_view:
            return torch.stack(rows, 1)
        return average_windows(rows) if level == "joint" else torch.stack(rows).mean(0)

    def _with_texts(self, part: _Part) -> EmbeddedShards:
        if self.text is not None:
            wordings = list(dict.fromkeys(caption for item in part.items for caption in item.captions))
            part.add_texts(dict(zip(wordings, self._texts(wordings), strict=True)))
        widths = self.widths()
        views = {modality: (len(each),) if self.settings.each_view else () for modality, each in self.views.items()}
        return part.done({modality: (*views.get(modality, ()), width) for modality, width in widths.items()})

    def _texts(self, wordings: Sequence[str]) -> Tensor:
        """Unit rows of captions, always in the same batches."""
        batches = [wordings[start : start + TEXTS] for start in range(0, len(wordings), TEXTS)]
        found = []
        for turn in range(0, len(batches), self.comm.world_size):
            number = turn + self.comm.rank
            rows = self.model.encode_text(batches[number if number < len(batches) else turn], batch=TEXTS)
            padded = torch.nn.functional.pad(rows, [0, 0, 0, TEXTS - len(rows)])
            together = self.comm.gather_by_rank(padded.to(self.device)).cpu()
            found += [
                together[rank * TEXTS :][: len(texts)]
                for rank, texts in enumerate(batches[turn : turn + self.comm.world_size])
            ]
        return torch.cat(found) if found else torch.zeros(0, self.model.joint_width)


def modalities_of(model: AnyModel) -> list[Modality]:
    """Modalities of the towers, in their order; stored embeddings of a teacher have no place in the joint space."""
    specs = [(model.head_locked(name), model.tower(name).spec) for name in model.towers]
    return list(dict.fromkeys(spec.modality for frozen, spec in specs if not (frozen and isinstance(spec, VectorSpec))))
