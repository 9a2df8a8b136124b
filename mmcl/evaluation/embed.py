"""Embedding whole shards: every sample once, in the order of the shards, on any number of processes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from mmcl.config import read_yaml
from mmcl.data import ClipStream
from mmcl.distributed import Comm
from mmcl.folders import check_writable, model_folder
from mmcl.model import MultimodalModel, average_windows
from mmcl.progress import show_progress
from mmcl.shards import load_manifest
from mmcl.types import DEFAULT_DECODER, Batch, Decoder, Level, Modality, RunError, VectorSpec, View


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
    """float32 ``(n, D)`` of each modality; unit rows at level ``joint``"""
    owners: dict[Modality, Tensor]
    """int64 ``(n,)``: the item that each row shows; an item may have none, or, for text, several"""
    skipped: tuple[tuple[int, str, str, str], ...] = field(default=())
    """(draw, key, reason, detail) of samples that could not be read"""


@torch.no_grad()
def embed_shards(
    model: MultimodalModel,
    shards: str,
    *,
    clips: int = 1,
    batch: int = 64,
    workers: int = 2,
    in_process: bool = False,
    decoder: Decoder = DEFAULT_DECODER,
    comm: Comm | None = None,
    device: torch.device | str = "cpu",
    level: Literal["joint", "pooled"] = "joint",
) -> EmbeddedShards:
    """Embeds every sample of ``shards`` with the first tower of each modality; all captions of a sample are embedded.

    Args:
        clips: evenly spaced windows whose embeddings are averaged.
        level: ``pooled`` gives what is before every head, as it is (probes); texts are then left out.
        batch: rows per forward of one rank.
        workers: decoding processes of this rank; ``in_process`` decodes in this one.
        comm: with more than one rank each reads its share; every rank returns everything.

    Raises:
        RunError: no sample could be read.
    """
    comm = comm or Comm.current()
    towers = {modality: model.tower_of(modality) for modality in _modalities(model)}
    timed = {modality: tower for modality, tower in towers.items() if modality != "text"}
    views = {
        modality: [View(model.tower(tower).spec, clip) for clip in range(clips)] for modality, tower in timed.items()
    }
    # a text view keeps samples that have captions alone
    text = [View(model.tower(towers["text"]).spec)] if "text" in towers else []
    if level == "pooled":
        towers.pop("text", None)
    stream = ClipStream(
        load_manifest(shards),
        [*text, *(view for each in views.values() for view in each)],
        global_batch=batch * comm.world_size,
        rank=comm.rank,
        world_size=comm.world_size,
        workers=workers,
        shuffle=False,
        rule="even",
        decoder=decoder,
        in_process=in_process,
        with_metadata=True,
    )
    model = model.eval().to(device)
    collected = _Collected(list(towers))
    total = -(-stream.num_samples // (batch * comm.world_size))
    for rows in _progress(stream, total, quiet=comm.rank > 0):
        moved = rows.to(device)
        embedded = {
            modality: _mean([model.encode_view(tower, moved.views[v], [level])[level] for v in views[modality]], level)
            for modality, tower in timed.items()
        }
        collected.add(rows, {m: comm.gather(e).cpu() for m, e in embedded.items()}, views, comm)
    collected.add_texts(model if "text" in towers else None)
    if not collected.items:
        raise RunError(f"{shards}: none of {stream.num_samples} samples could be read")
    return collected.done()


def _mean(windows: Sequence[Tensor], level: Level) -> Tensor:
    return average_windows(windows) if level == "joint" else torch.stack(list(windows)).mean(0)


def _modalities(model: MultimodalModel) -> list[Modality]:
    """Modalities of the towers, in their order; stored embeddings of a teacher have no place in the joint space."""
    specs = [(name in model.options.frozen, model.tower(name).spec) for name in model.towers]
    return list(dict.fromkeys(spec.modality for frozen, spec in specs if not (frozen and isinstance(spec, VectorSpec))))


def _progress(stream: ClipStream, total: int, *, quiet: bool) -> Iterator[Batch]:
    with show_progress("embedding", "batches", quiet=quiet) as show:
        for number, batch in enumerate(stream, 1):
            yield batch
            show(number, total, "")


class _Collected:
    """Rows of all ranks, kept in the order of the shards."""

    def __init__(self, modalities: Sequence[Modality]) -> None:
        self.items: list[EmbeddedItem] = []
        self.skipped: list[tuple[int, str, str, str]] = []
        self._rows: dict[Modality, list[Tensor]] = {modality: [] for modality in modalities}
        self._owners: dict[Modality, list[int]] = {modality: [] for modality in modalities}

    def add(
        self, batch: Batch, embedded: dict[Modality, Tensor], views: dict[Modality, list[View]], comm: Comm
    ) -> None:
        """Takes the rows of one batch of all ranks; holes are left out."""
        present = {m: comm.gather(batch.views[each[0]].present) for m, each in views.items()}
        mine = [
            (key, draw, list(captions), label, dict(metadata))
            for key, draw, captions, label, metadata in zip(
                batch.keys, batch.draws.tolist(), batch.captions, batch.labels.tolist(), batch.metadata, strict=True
            )
        ]
        ranks = comm.gather_objects(mine)
        self.skipped += [tuple(skip) for rank in comm.gather_objects(list(batch.skipped)) for skip in rank]
        for place, (key, draw, captions, label, metadata) in enumerate(
            row for rows in zip(*ranks, strict=True) for row in rows
        ):
            if not key:
                continue
            for modality, rows in embedded.items():
                if present[modality][place]:
                    self._rows[modality].append(rows[place])
                    self._owners[modality].append(len(self.items))
            self.items.append(EmbeddedItem(key, draw, tuple(captions), label, metadata))

    def add_texts(self, model: MultimodalModel | None) -> None:
        if model is None:
            return
        texts = [(number, caption) for number, item in enumerate(self.items) for caption in item.captions]
        # each wording once: in another batch, padded otherwise, its last bits would differ, and equal texts must tie
        wordings = list(dict.fromkeys(caption for _, caption in texts))
        rows = dict(zip(wordings, model.encode_text(wordings), strict=True))
        self._rows["text"] = [rows[caption] for _, caption in texts]
        self._owners["text"] = [number for number, _ in texts]

    def done(self) -> EmbeddedShards:
        width = next(len(row) for rows in self._rows.values() for row in rows)
        return EmbeddedShards(
            tuple(self.items),
            {modality: torch.stack(rows) if rows else torch.zeros(0, width) for modality, rows in self._rows.items()},
            {modality: torch.tensor(owners, dtype=torch.int64) for modality, owners in self._owners.items()},
            tuple(sorted(self.skipped)),
        )


def default_clips(checkpoint: Path | str) -> int:
    """Windows per sample as the run that wrote a checkpoint says; 1 for a model without its run."""
    config = model_folder(Path(checkpoint)) / "config.yaml"
    # read as it is: a run of another version may hold keys that this one does not know
    return int(read_yaml(config).get("evaluate", {}).get("clips", 1)) if config.exists() else 1


def embed_to_folder(
    checkpoint: Path,
    shards: str,
    out: Path,
    *,
    clips: int | None = None,
    workers: int = 2,
    decoder: Decoder = DEFAULT_DECODER,
) -> int:
    """Writes ``embeddings.safetensors`` (rows and owners of each modality) and ``items.jsonl``; returns the items.

    Raises:
        ConfigError: no such checkpoint or shards.
        RunError: nothing could be read, or the folder cannot be written.
    """
    check_writable(out)
    model = MultimodalModel.from_pretrained(checkpoint)
    embedded = embed_shards(model, shards, clips=clips or default_clips(checkpoint), workers=workers, decoder=decoder)
    tensors = {f"{modality}.rows": rows for modality, rows in embedded.rows.items()}
    tensors.update({f"{modality}.items": owners for modality, owners in embedded.owners.items()})
    lines = [
        json.dumps(
            {"key": item.key, "captions": item.captions, "label": item.label, "metadata": item.metadata},
            ensure_ascii=False,
        )
        + "\n"
        for item in embedded.items
    ]
    comm = Comm.current()
    try:
        if comm.rank == 0:
            _write_folder(out, lines, tensors)
    finally:
        comm.barrier()
    return len(embedded.items)


def _write_folder(out: Path, lines: Sequence[str], tensors: dict[str, Tensor]) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        items, rows = out / ".items.jsonl.partial", out / ".embeddings.safetensors.partial"
        items.write_text("".join(lines), encoding="utf-8")
        save_file(tensors, rows)
        items.replace(out / "items.jsonl")
        rows.replace(out / "embeddings.safetensors")
    except (OSError, SafetensorError) as error:
        raise RunError(f"cannot write embeddings to {out}: {getattr(error, 'strerror', None) or error}") from None
