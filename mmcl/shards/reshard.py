"""The same samples in other shards: other sizes, another order, parts of them, several folders in one."""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from mmcl.hashing import hash64, text_hash, uniform
from mmcl.progress import Progress
from mmcl.shards.files import new_folder
from mmcl.shards.manifest import Manifest, ShardEntry, load_manifest, write_manifest
from mmcl.shards.members import QUESTIONS, parse_json, read_group
from mmcl.shards.questions import Question, for_sample, read_questions, write_member
from mmcl.shards.reader import RawSample, ShardReader
from mmcl.shards.scan import check_positive
from mmcl.shards.vectors import Vector, load_embeddings, write_vector
from mmcl.shards.writer import MAX_BYTES, MAX_COUNT, ShardWriter
from mmcl.types import ConfigError, RunError, SampleError

_SPLIT = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_MEMBER = re.compile(r"[a-z0-9_-]{1,64}")
_ORDER, _PART = 0, 1  # what a hashed number is for


@dataclass(frozen=True, slots=True)
class ReshardOptions:
    """What the new shards look like."""

    max_count: int = MAX_COUNT
    """samples per shard, at most"""
    max_bytes: int = MAX_BYTES
    """bytes per shard, at most"""
    shuffle: int | None = None
    """Seed of one order over all samples, by key, so that it does not depend on how they lay before; None: as they
    come."""
    split: Mapping[str, float] = field(default_factory=dict)
    """name of a folder -> its share of the groups; shares add up to 1. All samples of a group fall into one part."""
    split_seed: int = 0
    attach: Mapping[str, str] = field(default_factory=dict)
    """NAME -> ``FOLDER:MODALITY``: rows of `mmcl embed` that become a file ``KEY.NAME.npy`` of their samples, in place
    of one that is there; samples without a row get none"""
    questions: str | None = None
    """a JSONL file of multiple-choice questions (``mmcl.shards.questions``) that become a file ``KEY.qa.json`` of their
    samples, in place of one that is there; samples without a question get none"""
    rename: bool = False
    """give a key that came before a number, where otherwise nothing would be written"""

    def __post_init__(self) -> None:
        check_positive(max_count=self.max_count, max_bytes=self.max_bytes, **self.split)
        for name in self.split:
            if not _SPLIT.fullmatch(name):
                raise ConfigError(f"split={name[:40]!r}: letters, digits, _ and - only")
        for name in self.attach:
            if not _MEMBER.fullmatch(name):
                raise ConfigError(f"attach={name[:40]!r}: small letters, digits, _ and - only")
        if self.split and abs(sum(self.split.values()) - 1) > 1e-6:
            raise ConfigError(f"split: the shares add up to {sum(self.split.values()):g}, not to 1")


@dataclass(frozen=True, slots=True)
class ReshardReport:
    """What was written."""

    manifests: tuple[Manifest, ...]
    renamed: int
    attached: Mapping[str, int] = field(default_factory=dict)
    """samples that got an embedding, or questions, by the name of their file"""

    def lines(self) -> list[str]:
        """What to tell the user."""
        lines = [
            f"{manifest.url}: {manifest.num_samples} samples in {manifest.num_shards} shards, "
            f"{int(manifest.shard_bytes.sum()) / 1e6:.1f} MB"
            for manifest in self.manifests
        ]
        samples = sum(manifest.num_samples for manifest in self.manifests)
        lines += [f"{name}: {count} of {samples} samples" for name, count in self.attached.items()]
        return lines + ([f"{self.renamed} keys came twice and got a number"] if self.renamed else [])


def reshard(
    folders: Sequence[str | Path],
    out: str | Path,
    options: ReshardOptions | None = None,
    *,
    progress: Progress | None = None,
) -> ReshardReport:
    """Writes all samples of ``folders`` into the new folder ``out``; with ``split`` into one folder below it per part.

    Files are copied as they are. Raises ``ConfigError`` where ``out`` is there already or a key comes twice (unless
    ``rename``), ``RunError`` where a sample cannot be read or a part stays empty.
    """
    options = options or ReshardOptions()
    readers = [ShardReader(load_manifest(folder), max_open=512) for folder in folders]
    places = _places(readers)
    if not len(places):
        raise ConfigError(f"{', '.join(map(str, folders))}: no samples")
    keys = [readers[source].key(shard, index) for source, shard, index in places.tolist()]
    names, renamed = _unique(keys, options.rename)
    order = np.arange(len(places))
    if options.shuffle is not None:
        hashes = hash64(options.shuffle, _ORDER, np.array([text_hash(name) for name in names], dtype=np.uint64))
        order = np.argsort(hashes, kind="stable")
    asked = read_questions(options.questions) if options.questions is not None else {}
    asking = 0
    vectors = {name: _vectors(name, place, keys) for name, place in options.attach.items()}
    target = new_folder(out)
    writers = {
        name: ShardWriter(target / name, max_count=options.max_count, max_bytes=options.max_bytes)
        for name in options.split or ("",)
    }
    shares = np.cumsum(list(options.split.values())) if options.split else None
    done = 0
    try:
        for raw, name in _read(readers, places, names, order):
            added = {f"{n}.npy": write_vector(rows[raw.key]) for n, rows in vectors.items() if raw.key in rows}
            questions = _questions(raw, asked)
            asking += bool(questions)
            writers[_part(raw, options, shares)].write(name, {**raw.members, **added, **questions})
            done += 1
            if progress is not None:
                progress(done, len(names), "")
        for writer in writers.values():
            writer.close()
    except BaseException:
        for writer in writers.values():
            writer.discard()
        raise
    manifests = tuple(_manifest(target / name, writer.entries) for name, writer in writers.items())
    if asked and not asking:
        raise ConfigError(f"questions: {options.questions}: it has none about the {len(keys)} samples of these shards")
    attached = {f"{name}.npy": sum(k in rows for k in keys) for name, rows in vectors.items()}
    return ReshardReport(manifests, renamed, attached | ({QUESTIONS: asking} if asked else {}))


def _questions(raw: RawSample, asked: Mapping[str, tuple[Question, ...]]) -> dict[str, bytes]:
    """The file of questions about a sample, where there are some."""
    if not asked:
        return {}
    facts = {}
    if "json" in raw.members:
        with contextlib.suppress(SampleError):  # readers will name it
            facts = parse_json(raw.members["json"])
    found = for_sample(asked, raw.key, facts)
    return {QUESTIONS: write_member(found)} if found else {}


def parse_attach(texts: Sequence[str]) -> dict[str, str]:
    """``["sound=emb:audio"]`` to places by name. Raises ``ConfigError``.

    >>> parse_attach(["sound=emb:audio"])
    {'sound': 'emb:audio'}
    """
    places: dict[str, str] = {}
    for text in texts:
        name, _, place = text.partition("=")
        folder, _, modality = place.rpartition(":")
        if not (name and folder and modality) or name in places:
            raise ConfigError(f"attach: {text[:80]!r} is not NAME=FOLDER:MODALITY with a name of its own")
        places[name] = place
    return places


def _vectors(name: str, place: str, keys: Sequence[str]) -> dict[str, Vector]:
    folder, _, modality = place.rpartition(":")
    found = load_embeddings(folder, modality)
    if not found.keys() & set(keys):
        raise ConfigError(f"attach: {name}={place}: it has none of the {len(keys)} keys of these shards")
    return found


def parse_split(text: str) -> dict[str, float]:
    """``train=0.9,test=0.1`` to shares by name. Raises ``ConfigError``.

    >>> parse_split("train=0.9, test=0.1")
    {'train': 0.9, 'test': 0.1}
    """
    shares: dict[str, float] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, share = part.partition("=")
        try:
            value = float(share)
        except ValueError:
            value = 0.0
        if not 0 < value <= 1 or name in shares:
            raise ConfigError(f"split: {part[:60]!r} is not NAME=SHARE with a share above 0 and a name of its own")
        shares[name] = value
    return shares


def _places(readers: Sequence[ShardReader]) -> np.ndarray[tuple[int, int], np.dtype[np.int64]]:
    """int64 ``(samples, 3)``: source, shard, index."""
    columns = [
        np.stack([np.full(size, source), np.full(size, shard), np.arange(size)], axis=1)
        for source, reader in enumerate(readers)
        for shard, size in enumerate(reader.manifest.sizes.tolist())
        if size
    ]
    return np.concatenate(columns).astype(np.int64) if columns else np.zeros((0, 3), np.int64)


def _read(
    readers: Sequence[ShardReader],
    places: np.ndarray[tuple[int, int], np.dtype[np.int64]],
    names: Sequence[str],
    order: np.ndarray[tuple[int], np.dtype[np.int64]],
) -> Iterator[tuple[RawSample, str]]:
    for number in order.tolist():
        source, shard, index = places[number].tolist()
        try:
            yield readers[source].read(shard, index), names[number]
        except SampleError as error:
            raise RunError(
                f"{readers[source].manifest.url}: {names[number]} cannot be read ({error}); "
                f"`mmcl shards verify --repair` writes shards without such samples"
            ) from None


def _unique(keys: list[str], rename: bool) -> tuple[list[str], int]:
    """Keys of which none comes twice, and how many had to change."""
    seen = Counter(keys)
    if len(seen) == len(keys):
        return keys, 0
    twice = [key for key, count in seen.items() if count > 1]
    if not rename:
        shown = ", ".join(ascii(key)[1:-1] for key in twice[:5])
        raise ConfigError(
            f"{len(twice)} keys come twice ({shown}{', …' if len(twice) > 5 else ''}): two samples of one key would be "
            "one to readers of WebDataset; --rename gives the later ones a number"
        )
    taken, names = set(keys), []
    met: Counter[str] = Counter()
    for key in keys:
        met[key] += 1
        name = key
        while met[key] > 1 and name in taken:
            name = f"{key}-{met[key]}"
            met[key] += name in taken
        taken.add(name)
        names.append(name)
    return names, sum(name != key for name, key in zip(names, keys, strict=True))


def _part(raw: RawSample, options: ReshardOptions, shares: np.ndarray[tuple[int], np.dtype[np.float64]] | None) -> str:
    """Drawn by the group, so that clips of one film never meet across a split."""
    if shares is None:
        return ""
    group = None
    if "json" in raw.members:
        with contextlib.suppress(SampleError):  # readers will name it
            group = read_group(parse_json(raw.members["json"]))
    drawn = float(uniform(options.split_seed, _PART, text_hash(group or raw.key)))
    return list(options.split)[min(int(np.searchsorted(shares, drawn, side="right")), len(options.split) - 1)]


def _manifest(folder: Path, entries: Sequence[ShardEntry]) -> Manifest:
    if not entries:
        raise RunError(f"{folder}: no sample fell into this part; fewer parts, or other shares")
    return write_manifest(folder, entries)
