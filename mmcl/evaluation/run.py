"""Retrieval from a checkpoint and shards to a report that one can open."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import overload

import numpy as np
from torch import Tensor

from mmcl.distributed import Comm
from mmcl.evaluation.against import compare
from mmcl.evaluation.embed import EmbeddedItem, EmbeddedShards, default_clips, embed_shards
from mmcl.evaluation.gallery import GalleryItem, poster_jpeg, waveform_svg
from mmcl.evaluation.protocols import fingerprint
from mmcl.evaluation.report import ListResult, ModalityRows, RetrievalReport, evaluate_list, write_report
from mmcl.folders import check_writable, read_report
from mmcl.media.clip import MediaReader
from mmcl.media.image import decode_image
from mmcl.media.video import open_video
from mmcl.media.windows import Window, frame_indices
from mmcl.model import MultimodalModel
from mmcl.shards import load_manifest
from mmcl.shards.manifest import Manifest
from mmcl.shards.members import Sample, parse_sample
from mmcl.shards.reader import ShardReader
from mmcl.types import DEFAULT_DECODER, AudioSpec, ConfigError, Decoder, Modality, SampleError

PROTOCOL = "paired"
WAVE_RATE_HZ = 4000


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
    titles: dict[str, str] | None = None,
    per: str | None = None,
    transductive: bool = False,
    bank: str | None = None,
    against: Path | None = None,
    cache: Path | None = None,
) -> Evaluation:
    """Embeds ``shards``, ranks every ordered pair of modalities and writes the report into ``out``.

    An answer is right when it belongs to the query's own item, or to one with the same caption (nobody could tell them
    apart by their words).

    Args:
        by: a metadata column; each of its values is a list that is searched on its own.
        headline: the value of ``by`` whose list comes first.
        clips: evenly spaced windows per sample whose embeddings are averaged; default: as the checkpoint's run says.
        note: a sentence about the data, for the page.
        titles: for people, by list.
        per: a metadata column, or ``label``: also the figures of the queries of each value, in the whole gallery.
        transductive: also dual and inverted softmax, in figures of their own.
        bank: shards of training samples, whose rows are the bank of QB-norm, in figures of its own.
        against: the folder of an older report: what got better or worse.
        cache: a folder that keeps embeddings: what it has of this model and these shards is not embedded again.

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
    embedded = embed_shards(model, shards, clips=clips, workers=workers, decoder=decoder, comm=comm, cache=cache)
    further = _Further(
        None if per is None else group_names(embedded.items, per),
        transductive,
        {}
        if bank is None
        else embed_shards(model, bank, clips=clips, workers=workers, decoder=decoder, comm=comm, cache=cache).rows,
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
        note=note,
        right="the query's own clip, or one with the same caption",
        facts={
            "checkpoint": Path(checkpoint).name,
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


class ShardGallery(Sequence[GalleryItem]):
    """The items of some embedded shards as pictures; each is decoded when the page asks for it."""

    def __init__(self, manifest: Manifest, embedded: EmbeddedShards) -> None:
        self._reader = ShardReader(manifest)
        self._ends = np.cumsum(manifest.sizes)
        self._embedded = embedded
        self._made: dict[int, GalleryItem] = {}
        self._have = {modality: set(owners.tolist()) for modality, owners in embedded.owners.items()}

    def __len__(self) -> int:
        return len(self._embedded.items)

    @overload
    def __getitem__(self, number: int) -> GalleryItem: ...
    @overload
    def __getitem__(self, number: slice) -> Sequence[GalleryItem]: ...
    def __getitem__(self, number: int | slice) -> GalleryItem | Sequence[GalleryItem]:
        if isinstance(number, slice):
            return [self[index] for index in range(*number.indices(len(self)))]
        if number not in self._made:
            self._made[number] = self._make(number)
        return self._made[number]

    def _make(self, number: int) -> GalleryItem:
        item = self._embedded.items[number]
        shard = int(np.searchsorted(self._ends, item.draw, side="right"))
        first = int(self._ends[shard - 1]) if shard else 0
        sample = parse_sample(self._reader.read(shard, item.draw - first))
        missing = tuple(modality for modality, owners in self._have.items() if number not in owners)
        return GalleryItem(item.key, item.captions, poster_of(sample), waveform_of(sample), missing)


def poster_of(sample: Sample) -> bytes | None:
    """A JPEG of the middle of a sample; None where it shows nothing."""
    try:
        if sample.video is not None:
            reader = open_video(sample.video, decoder="pyav")
            try:
                start, end = sample.window_seconds or (0.0, reader.duration_seconds)
                middle = frame_indices(reader.frame_times_seconds, np.array([(start + end) / 2]))
                return poster_jpeg(reader.read(middle)[0])
            finally:
                reader.close()
        return None if sample.image is None else poster_jpeg(decode_image(sample.image))
    except SampleError:
        return None


def waveform_of(sample: Sample) -> bytes | None:
    """An SVG of the sound of a sample, at most its middle 10 seconds; None where it is silent by lack of a track."""
    try:
        with _reader_of(sample) as media:
            seconds = min(max(media.duration_seconds, 0.1), 10.0)
            wave = media.read_audio(_middle(media, seconds), AudioSpec(WAVE_RATE_HZ, seconds))
    except SampleError:
        return None
    return None if wave is None else waveform_svg(wave)


def _middle(media: MediaReader, seconds: float) -> Window:
    start = max(0.0, (media.duration_seconds - seconds) / 2)
    return Window(start, start + seconds)


def _reader_of(sample: Sample) -> MediaReader:
    return MediaReader(
        video=sample.video,
        image=sample.image,
        audio=sample.audio,
        duration_seconds=sample.duration_seconds,
        window_seconds=sample.window_seconds,
    )
