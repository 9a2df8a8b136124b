"""What a worker of ``make_shards`` does with one row: read, encode, and leave the finished sample in a staging file.

A staging file is named by the hash of everything its sample depends on, so an interrupted run finds what is done.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mmcl.media.motion_file import MEMBER, extract_motion
from mmcl.shards.files import write_atomically
from mmcl.shards.inputs import Row
from mmcl.shards.members import role_of
from mmcl.shards.sources import local_files, source_sha256
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
    source: str = ""
    """SHA-256 of its media files"""
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
        source = source_sha256(row)
        name = content_hash(job, source)
        if name == job.known:
            return Prepared(name, source=source)
        path = staged_path(job.staging, name)
        staged = load_staged(path)
        if staged is None:
            staged = _transcode(job, name, source)
            _save_staged(path, staged)
        return Prepared(name, sample_bytes(row.key, staged.members), staged.seconds, source)
    except SampleError as error:
        return Prepared(reason=error.reason, detail=error.detail)


def _transcode(job: Job, name: str, source: str) -> Staged:
    """Sound in a file of its own counts, not what the video beside it may hold as well."""
    row = job.row
    roles = [role_of(member.extension) for member in row.files]
    with local_files(row, job.staging) as paths:
        made = [_medium(job, path, with_sound="audio" not in roles[1:]) for path in paths[:1]]
        for path in paths[1:]:
            # a stretch of a video that begins after its sound has ended has none
            with contextlib.suppress(_OutsideError):
                made.append(_medium(job, path))
    seconds = next((medium.duration_seconds for medium in made if medium.duration_seconds is not None), None)
    sounds = [medium.audio for medium in made if medium.audio is not None]
    whole = replace(made[0], duration_seconds=seconds, audio=sounds[0] if sounds else None)
    members = _members(job, whole, name, source) | {medium.extension: medium.data for medium in made[1:]}
    return Staged(members, seconds or 0.0)


class _OutsideError(SampleError):
    """The stretch lies behind the end of a file."""


def _medium(job: Job, path: str, *, with_sound: bool = True) -> Transcoded:
    start, end = job.row.start_seconds, job.row.end_seconds
    try:
        return transcode(path, _options(job), start_seconds=start, end_seconds=end, with_sound=with_sound)
    except SampleError as error:
        if error.reason == "window_outside":
            raise _OutsideError(error.reason, error.detail) from error
        raise


def _options(job: Job) -> MediaOptions:
    if job.row.crop is None:
        return job.media
    if job.media.codec == "copy":
        raise SampleError("cannot_copy", "the row has a crop, codec=copy stores pictures as they are")
    return replace(job.media, crop=job.row.crop)


def content_hash(job: Job, sha256: str) -> str:
    """32 hexadecimal digits of everything that the sample's bytes depend on."""
    row, media = job.row, job.media
    settings: list[Any] = [media.short_side, media.fps, media.gop, media.crf, media.audio_rate_hz]
    if (media.codec, media.audio_codec) != ("h264", "aac"):
        settings += [media.codec, media.audio_codec]
    if media.motion:
        settings.append("motion")
    facts = [row.key, row.name, row.start_seconds, row.end_seconds, row.captions, row.group, job.label, row.metadata]
    crop = [_options(job).crop] if _options(job).crop is not None else []
    text = json.dumps([1, settings, facts, row.label, sha256, *crop], sort_keys=True)
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


def _motion(job: Job, media: Transcoded) -> dict[str, bytes]:
    """The member of motion vectors, where they are asked for and the stored stream has some."""
    if not job.media.motion or media.video is None:
        return {}
    try:
        return {f"{MEMBER}.npy": extract_motion(media.data)}
    except SampleError as error:
        if error.reason not in ("no_motion_vectors", "no_video_stream"):
            raise
        return {}


def _members(job: Job, media: Transcoded, name: str, sha256: str) -> dict[str, bytes]:
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
            "sha256": sha256,
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
    members = {media.extension: media.data, **media.beside, **_motion(job, media), "json": text.encode("utf-8")}
    if row.captions:
        members["txt"] = row.captions[0].encode("utf-8")
    return members
