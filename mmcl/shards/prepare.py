"""What a worker of ``make_shards`` does with one row: read, encode, and leave the finished sample in a staging file.

A staging file is named by the hash of everything its sample depends on, so an interrupted run finds what is done.
"""

from __future__ import annotations

import functools
import hashlib
import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mmcl.shards.files import write_atomically
from mmcl.shards.inputs import Row
from mmcl.shards.transcode import MediaOptions, Transcoded, transcode
from mmcl.shards.writer import sample_bytes
from mmcl.types import SampleError


@dataclass(frozen=True, slots=True)
class Job:
    """One row to prepare."""

    row: Row
    media: MediaOptions
    label: int | None
    staging: str
    """folder"""
    known: str = ""
    """content hash of the sample of this key that is already in a shard"""


@dataclass(frozen=True, slots=True)
class Prepared:
    """What came of a row: a sample (staged, or in a shard already), or the reason why there is none."""

    content_hash: str = ""
    num_bytes: int = 0
    """of the sample in a tar; 0: it is in a shard already"""
    seconds: float = 0.0
    reason: str = ""
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Staged:
    """A finished sample."""

    members: Mapping[str, bytes | memoryview] = field(default_factory=dict)
    seconds: float = 0.0


def prepare(job: Job) -> Prepared:
    """Runs in a worker process. Raises ``RunError`` where the staging folder cannot be written."""
    row = job.row
    try:
        if row.problem is not None:
            raise SampleError(*row.problem)
        source_sha256 = _file_sha256(row.path, *_stat(row.path))
        name = content_hash(job, source_sha256)
        if name == job.known:
            return Prepared(name)
        path = staged_path(job.staging, name)
        staged = load_staged(path)
        if staged is None:
            media = transcode(row.path, _options(job), start_seconds=row.start_seconds, end_seconds=row.end_seconds)
            staged = Staged(_members(job, media, name, source_sha256), media.duration_seconds or 0.0)
            _save_staged(path, staged)
        return Prepared(name, sample_bytes(row.key, staged.members), staged.seconds)
    except SampleError as error:
        return Prepared(reason=error.reason, detail=error.detail)


def _options(job: Job) -> MediaOptions:
    if job.row.crop is None:
        return job.media
    if job.media.codec == "copy":
        raise SampleError("cannot_copy", "the row has a crop, codec=copy stores pictures as they are")
    return replace(job.media, crop=job.row.crop)


def content_hash(job: Job, source_sha256: str) -> str:
    """32 hexadecimal digits of everything that the sample's bytes depend on."""
    row, media = job.row, job.media
    settings: list[Any] = [media.short_side, media.fps, media.gop, media.crf, media.audio_rate_hz]
    if (media.codec, media.audio_codec) != ("h264", "aac"):
        settings += [media.codec, media.audio_codec]
    facts = [row.key, row.name, row.start_seconds, row.end_seconds, row.captions, row.group, job.label, row.metadata]
    crop = [_options(job).crop] if _options(job).crop is not None else []
    text = json.dumps([1, settings, facts, row.label, source_sha256, *crop], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def staged_path(folder: str | Path, name: str) -> Path:
    return Path(folder) / f"{name}.sample"


def load_staged(path: Path) -> Staged | None:
    """None where there is no whole staging file."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    line, _, body = content.partition(b"\n")
    try:
        header = json.loads(line)
    except ValueError:
        return None
    if header["crc32"] != zlib.crc32(body):
        return None
    members, start = {}, 0
    for extension, length in header["members"].items():
        members[extension] = body[start : start + length]
        start += length
    return Staged(members, header["seconds"])


def _save_staged(path: Path, staged: Staged) -> None:
    body = b"".join(staged.members.values())
    lengths = {extension: len(data) for extension, data in staged.members.items()}
    header = {"members": lengths, "seconds": staged.seconds, "crc32": zlib.crc32(body)}
    write_atomically(path, json.dumps(header).encode() + b"\n" + body)


def _members(job: Job, media: Transcoded, name: str, source_sha256: str) -> dict[str, bytes]:
    """The files of the sample. ``txt`` holds the first caption, for readers that know no other; ``json`` holds all."""
    row = job.row
    facts: dict[str, Any] = {
        **row.metadata,
        "captions": list(row.captions),
        "group": row.group,
        "duration_seconds": media.duration_seconds,
        "video": media.video,
        "audio": media.audio,
        "source": {
            "path": Path(row.name).name if Path(row.name).is_absolute() else row.name,
            "sha256": source_sha256,
            "start_seconds": row.start_seconds,
            "end_seconds": row.end_seconds,
        },
        "content_hash": name,
    }
    if media.hdr:
        facts["source"]["hdr_ignored"] = media.hdr
    if media.window_seconds is not None:
        facts["window_seconds"] = media.window_seconds
    if _options(job).crop is not None:
        facts["source"]["crop"] = _options(job).crop
    if job.label is not None:
        facts["label"] = job.label
        if isinstance(row.label, str):
            facts["label_name"] = row.label
    text = json.dumps(facts, sort_keys=True, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    members = {media.extension: media.data, **media.beside, "json": text.encode("utf-8")}
    if row.captions:
        members["txt"] = row.captions[0].encode("utf-8")
    return members


def _stat(path: str) -> tuple[int, int]:
    try:
        status = Path(path).stat()
    except FileNotFoundError:
        raise SampleError("missing_file", path) from None
    except (OSError, ValueError) as error:
        raise SampleError("unreadable", f"{path}: {error}") from None
    return status.st_size, status.st_mtime_ns


@functools.lru_cache(maxsize=4096)
def _file_sha256(path: str, num_bytes: int, modified_ns: int) -> str:
    """One film may be the source of a thousand rows: the arguments beside the path make the cache notice a change."""
    digest = hashlib.sha256()
    try:
        with Path(path).open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise SampleError("unreadable", f"{path}: {error.strerror or error}") from None
    return digest.hexdigest()
