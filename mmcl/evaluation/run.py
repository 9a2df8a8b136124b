"""Retrieval from a checkpoint and shards to a report that one can open."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from torch import Tensor

from mmcl.distributed import Comm
from mmcl.evaluation.against import compare
from mmcl.evaluation.embed import EmbeddedItem, EmbeddedShards, default_clips, embed_shards
from mmcl.evaluation.report import ListResult, ModalityRows, RetrievalReport, evaluate_list, fingerprint, write_report
from mmcl.evaluation.shard_gallery import ShardGallery
from mmcl.folders import check_writable, read_report
from mmcl.model import MultimodalModel
from mmcl.shards import load_manifest
from mmcl.types import DEFAULT_DECODER, ConfigError, Decoder, Modality

PROTOCOL = "paired"


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What an evaluation made."""

    report: RetrievalReport
    embedded: EmbeddedShards
    page: Path
    """the HTML report"""


def evaluate_checkpoint(
    checkpoint: Path | str,
    shards: str,
    out: Path,
    *,
    by: str | None = None,
    headline: str | None = None,
    clips: int | None = None,
    workers: int = 2,
    decoder: Decoder = DEFAULT_DECODER,
    note: str = "",
    data_name: str = "",
    titles: dict[str, str] | None = None,
    per: str | None = None,
    transductive: bool = False,
    bank: str | None = None,
    against: Path | None = None,
) -> Evaluation:
    """Embeds ``shards``, ranks every ordered pair of modalities and writes the report into ``out``.

    An answer is right when it belongs to the query's own item, or to one with the same caption (nobody could tell them
    apart by their words).

    Args:
        by: a metadata column; each of its values is a list that is searched on its own.
        headline: the value of ``by`` whose list comes first.
        clips: evenly spaced windows per sample whose embeddings are averaged; default: as the checkpoint's run says.
        note: a sentence about the data, for the page.
        data_name: what the title calls the data, beside the checkpoint; default: the end of its path.
        titles: for people, by list.
        per: a metadata column, or ``label``: also the figures of the queries of each value, in the whole gallery.
        transductive: also dual and inverted softmax, in figures of their own.
        bank: shards of training samples, whose rows are the bank of QB-norm, in figures of its own.
        against: the folder of an older report: what got better or worse.

    In a process group every process calls this; each does its share and the first writes.

    Raises:
        ConfigError: no such checkpoint, shards, column or value; an older report that shares no query.
        RunError: nothing could be read, or the report cannot be written.
    """
    check_writable(out)
    older = None if against is None else read_report(against)
    comm = Comm.current()
    model = MultimodalModel.from_pretrained(checkpoint)
    clips = clips or default_clips(checkpoint)
    embedded = embed_shards(model, shards, clips=clips, workers=workers, decoder=decoder, comm=comm)
    further = _Further(
        None if per is None else group_names(embedded.items, per),
        transductive,
        {}
        if bank is None
        else embed_shards(model, bank, clips=clips, workers=workers, decoder=decoder, comm=comm).rows,
        comm,
    )
    lists = split_lists(embedded, by, headline)
    labels = caption_labels(embedded.items)
    results = tuple(
        _evaluate(name, embedded, items, labels, (titles or {}).get(name, "all clips" if by is None else ""), further)
        for name, items in lists.items()
    )
    protocol = {"name": PROTOCOL, "right": "same item or same caption", "clips": clips, "by": by}
    report = RetrievalReport(
        PROTOCOL,
        fingerprint(protocol, [item.key for item in embedded.items]),
        results,
        title=f"{data_name or short_name(shards)} · {short_name(str(checkpoint))}",
        note=note,
        right="the query's own clip, or one with the same caption",
        facts={
            "checkpoint": short_name(str(checkpoint)),
            "shards": short_name(shards),
            "windows per clip": str(clips),
            **({"unreadable samples": str(len(embedded.skipped))} if embedded.skipped else {}),
        },
        keys=[item.key for item in embedded.items],
    )
    if older is not None:
        report = replace(report, against=compare(older, report.as_json()))
    if comm.rank == 0:
        write_report(report, ShardGallery(load_manifest(shards), embedded), out)
    comm.barrier()
    return Evaluation(report, embedded, out / "report.html")


@dataclass(frozen=True, eq=False)
class _Further:
    """What is wanted besides the plain figures, and who computes."""

    groups: list[str | None] | None
    transductive: bool
    banks: dict[Modality, Tensor]
    comm: Comm


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


def _evaluate(
    name: str, embedded: EmbeddedShards, items: list[int], labels: np.ndarray, title: str, further: _Further
) -> ListResult:
    wanted = np.array(items, dtype=np.int64)
    rows = {}
    for modality in sorted(embedded.rows, key=lambda name: name != "text"):  # text->video comes first
        values = embedded.rows[modality]
        owners = embedded.owners[modality].numpy()
        mine = np.flatnonzero(np.isin(owners, wanted))
        captions = _caption_numbers(owners)[mine] if modality == "text" else None
        rows[modality] = ModalityRows(values[mine], owners[mine], captions)
    return evaluate_list(
        name,
        rows,
        labels=labels,
        items=wanted,
        title=title,
        groups=further.groups,
        transductive=further.transductive,
        banks=further.banks,
        comm=further.comm,
    )


def _caption_numbers(owners: np.ndarray) -> np.ndarray:
    """0, 1, … within each run of equal owners."""
    starts = np.flatnonzero(np.r_[True, owners[1:] != owners[:-1]])
    return np.arange(len(owners)) - np.repeat(starts, np.diff(np.r_[starts, len(owners)]))
