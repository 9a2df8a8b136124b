"""Retrieval from a checkpoint and shards to a report that one can open."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from mmcl.concatenated import open_model
from mmcl.distributed import Comm
from mmcl.evaluation.against import compare
from mmcl.evaluation.embed import EmbeddedItem, EmbeddedShards, default_clips, embed_shards, modalities_of
from mmcl.evaluation.embedding_store import open_embeddings
from mmcl.evaluation.gallery import GalleryItem
from mmcl.evaluation.protocols import RetrievalProtocol, fingerprint, retrieval_protocol, split_of
from mmcl.evaluation.report import RetrievalReport, evaluate_list, write_report
from mmcl.evaluation.shard_gallery import ShardGallery
from mmcl.evaluation.sides import Fuse, learned_fusion, sets_in, sides_of, wanted_directions
from mmcl.folders import check_writable, read_report
from mmcl.shards import load_manifest
from mmcl.types import DEFAULT_DECODER, ConfigError, Decoder

JOINED = {
    "mean": "an item's rows joined by their mean",
    "learned": "an item's rows joined by the model's fusion of them",
}


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What an evaluation made."""

    report: RetrievalReport
    embedded: EmbeddedShards
    page: Path
    """the HTML report"""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What of an evaluation is wanted besides its protocol."""

    by: str | None = None
    """a metadata column; each of its values is a list that is searched on its own"""
    headline: str | None = None
    """the value of ``by`` whose list comes first"""
    per: str | None = None
    """a metadata column, or ``label``: also the figures of the queries of each value, in the whole gallery"""
    against: Path | None = None
    """the folder of an older report: what got better or worse"""
    note: str = ""
    """a sentence about the data, for the page"""
    data_name: str = ""
    """what the title calls the data; default: the end of its path"""
    titles: Mapping[str, str] = field(default_factory=dict)
    """for people, by list"""


def evaluate_checkpoint(
    checkpoint: Path | str,
    shards: str,
    out: Path,
    *,
    protocol: RetrievalProtocol | None = None,
    clips: int | None = None,
    workers: int = 2,
    decoder: Decoder = DEFAULT_DECODER,
    bank: str | None = None,
    cache: Path | None = None,
    **wanted: Any,
) -> Evaluation:
    """Embeds ``shards``, ranks what the protocol asks for and writes the report into ``out``.

    Args:
        shards: a folder of them, or one of splits, of which that of the protocol is taken.
        protocol: default: ``paired``.
        clips: evenly spaced windows per sample whose embeddings are averaged; default: as the protocol, else the
            checkpoint's run says.
        bank: shards of training samples, whose rows are the bank of QB-norm, in figures of its own.
        cache: a folder that keeps embeddings: what it has of this model and these shards is not embedded again.
        wanted: of :class:`Wanted`.

    In a process group every process calls this; each does its share and the first writes.

    Raises:
        ConfigError: no such checkpoint, shards, column or value; an older report that shares no query; a set of
            modalities that the model has learned no fusion of, where the protocol asks for it.
        RunError: nothing could be read, or the report cannot be written.
    """
    check_writable(out)
    further = Wanted(**wanted)
    protocol = protocol or retrieval_protocol("paired")
    older = None if further.against is None else read_report(further.against)
    comm = Comm.current()
    shards = split_of(shards, protocol)
    model = open_model(checkpoint)
    fuse = None
    if protocol.fusion == "learned":
        fuse = learned_fusion(model, wanted_directions(protocol.directions, modalities_of(model)))
    clips = clips or protocol.clips or default_clips(checkpoint)
    embedded, banked = (
        None
        if place is None
        else embed_shards(model, place, clips=clips, workers=workers, decoder=decoder, comm=comm, cache=cache)
        for place in (shards, bank)
    )
    assert embedded is not None
    facts = {"checkpoint": short_name(str(checkpoint)), "shards": short_name(shards), "windows per clip": str(clips)}
    title = f"{further.data_name or short_name(shards)} · {short_name(str(checkpoint))}"
    protocol = protocol.model_copy(update={"clips": clips})
    made = _report(embedded, protocol, further, title, facts, banked, older, comm, fuse)
    if comm.rank == 0:
        write_report(made, ShardGallery(load_manifest(shards), embedded), out)
    comm.barrier()
    return Evaluation(made, embedded, out / "report.html")


def evaluate_embeddings(
    folder: Path, out: Path, *, protocol: RetrievalProtocol | None = None, bank: Path | None = None, **wanted: Any
) -> Evaluation:
    """As :func:`evaluate_checkpoint`, of rows that ``mmcl embed`` wrote into ``folder``; the page has no pictures.

    Raises:
        ConfigError: no embeddings there; as ``evaluate_checkpoint``.
    """
    check_writable(out)
    further = Wanted(**wanted)
    protocol = protocol or retrieval_protocol("paired")
    older = None if further.against is None else read_report(further.against)
    comm = Comm.current()
    embedded, banked = (None if place is None else open_embeddings(place).joint() for place in (folder, bank))
    assert embedded is not None
    if protocol.fusion == "learned":
        sets = sets_in(wanted_directions(protocol.directions, list(embedded.rows)))
        named = ", ".join("+".join(side) for side in sets) or "no set"
        raise ConfigError(f"learned fusion of {named}: embeddings hold no model; give CHECKPOINT and SHARDS")
    facts = {"embeddings": short_name(str(folder))}
    title = further.data_name or short_name(str(folder))
    made = _report(embedded, protocol, further, title, facts, banked, older, comm)
    if comm.rank == 0:
        write_report(made, [GalleryItem(item.key, item.captions) for item in embedded.items], out)
    comm.barrier()
    return Evaluation(made, embedded, out / "report.html")


def _report(
    embedded: EmbeddedShards,
    protocol: RetrievalProtocol,
    further: Wanted,
    title: str,
    facts: dict[str, str],
    bank: EmbeddedShards | None,
    older: Mapping[str, Any] | None,
    comm: Comm,
    fuse: Fuse | None = None,
) -> RetrievalReport:
    """All lists of an evaluation, and what the report says about them."""
    if "qb_norm" in protocol.post and bank is None:
        raise ConfigError(f"protocol {protocol.name}: qb_norm needs --bank, the shards of training samples")
    directions = wanted_directions(protocol.directions, list(embedded.rows))
    named = tuple(each.name for each in directions)
    protocol = protocol.model_copy(update={"directions": named})
    by_caption = protocol.right == "caption"
    labels = caption_labels(embedded.items) if by_caption else None
    banks = {} if bank is None else sides_of(bank, np.arange(len(bank.items)), directions, protocol.captions, fuse)
    results = []
    for name, items in split_lists(embedded, further.by, further.headline).items():
        numbers = np.array(items, dtype=np.int64)
        result = evaluate_list(
            name,
            sides_of(embedded, numbers, directions, protocol.captions, fuse),
            labels=labels,
            items=numbers,
            title=further.titles.get(name, "all clips" if further.by is None else ""),
            groups=None if further.per is None else group_names(embedded.items, further.per),
            post=protocol.post + (("qb_norm",) if bank is not None and "qb_norm" not in protocol.post else ()),
            banks={side: rows.embeddings for side, rows in banks.items() if len(rows.items)},
            directions=named,
            best_text=protocol.text_gallery == "best",
            media=[media_hash(item) for item in embedded.items],
            comm=comm,
        )
        results.append(result)
    asked = {**protocol.asked(), "by": further.by}
    report = RetrievalReport(
        protocol.name,
        fingerprint(asked, sorted(identity(item, protocol.captions) for item in embedded.items)),
        tuple(results),
        title=title,
        note=further.note,
        asked=asked,
        right="the query's own clip" + (", or one with the same caption" if by_caption else ""),
        facts={**facts, **_facts(protocol, embedded)},
        keys=[item.key for item in embedded.items],
    )
    return report if older is None else replace(report, against=compare(older, report.as_json()))


def _facts(protocol: RetrievalProtocol, embedded: EmbeddedShards) -> dict[str, str]:
    """What people should know before they compare figures."""
    facts = {"figures that are compared": ", ".join(protocol.figures)}
    if any("+" in name for name in protocol.directions):
        facts["sets of modalities"] = JOINED[protocol.fusion]
    if protocol.about:
        facts["asked"] = protocol.about
    if embedded.skipped:
        facts["unreadable samples"] = str(len(embedded.skipped))
    here = len(embedded.items)
    if protocol.items is not None and here != protocol.items:
        facts["not the whole set"] = f"{here} items, the protocol has {protocol.items}: figures do not compare"
    if protocol.captions is not None and "text" in embedded.rows:
        few = sum(len(item.captions) < protocol.captions for item in embedded.items)
        if few:
            facts["few captions"] = f"{few} items have fewer captions than the protocol's {protocol.captions}"
    return facts


def media_hash(item: EmbeddedItem) -> str | None:
    """What tells the media of a sample from others: the hash of its source, the stretch and the crop; None: unknown."""
    source = item.metadata.get("source")
    if not isinstance(source, Mapping) or not source.get("sha256"):
        return None
    return json.dumps([source.get(name) for name in ("sha256", "start_seconds", "end_seconds", "crop")])


def identity(item: EmbeddedItem, captions: int | None) -> str:
    """An item for a fingerprint: its name in its data set, else its key, and the captions that take part."""
    return json.dumps([str(item.metadata.get("item", item.key)), *item.captions[:captions]])


def short_name(place: str) -> str:
    """What tells a folder or an address apart for people: its last two names, less those that every run has.

    >>> short_name("/data/msrvtt/shards/test"), short_name("runs/large/checkpoints/step_00000100")
    ('msrvtt/test', 'large/step_00000100')
    """
    path = place.partition("://")[2].partition("?")[0] or str(Path(place).absolute())
    names = [name for name in path.split("/") if name not in ("", ".", "shards", "checkpoints", "index.json")]
    return "/".join(names[-2:]) or place


def group_names(items: Sequence[EmbeddedItem], per: str) -> list[str | None]:
    """For each item its value of a metadata column, or its ``label``; None where it has none.

    Raises:
        ConfigError: no item has any.
    """
    names: list[str | None] = []
    for item in items:
        given = item.label if per == "label" and item.label >= 0 else None
        value = item.metadata.get(per, given)
        names.append(None if value is None else str(value))
    if not any(name is not None for name in names):
        known = sorted({"label", *(name for item in items for name in item.metadata)})
        raise ConfigError(f"--per {per}: no sample has it; there are: {', '.join(known)}")
    return names


def split_lists(embedded: EmbeddedShards, by: str | None, headline: str | None) -> dict[str, list[int]]:
    """Item numbers of each list, the headline first."""
    if by is None:
        return {"all": list(range(len(embedded.items)))}
    lists: dict[str, list[int]] = {}
    for number, item in enumerate(embedded.items):
        if by in item.metadata:
            lists.setdefault(str(item.metadata[by]), []).append(number)
    if not lists:
        known = sorted({name for item in embedded.items for name in item.metadata})
        raise ConfigError(f"--by {by}: no sample has this metadata; there are: {', '.join(known) or 'none'}")
    if headline is not None and headline not in lists:
        raise ConfigError(f"--headline {headline}: not a value of {by}; there are: {', '.join(sorted(lists))}")
    first = headline or next(iter(lists))
    return {first: lists[first], **{name: lists[name] for name in sorted(lists) if name != first}}


def caption_labels(items: Sequence[EmbeddedItem]) -> np.ndarray:
    """int64, one per item: equal where the first captions are the same words; items without caption stand alone."""
    seen: dict[str, int] = {}
    return np.array(
        [
            seen.setdefault(
                " ".join(item.captions[0].casefold().split()) if item.captions else f"\0{number}", len(seen)
            )
            for number, item in enumerate(items)
        ],
        dtype=np.int64,
    )
