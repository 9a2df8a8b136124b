"""What the files of a sample mean: our own table of extensions, and the JSON of the tools that write such shards.

Nothing is guessed from content and nothing is unpickled; what the table does not name is ignored and can be counted.
JSON and captions are a stranger's: bounded, and refused whole where they are not plain text.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal, TypeAlias

from mmcl.shards.questions import Question, parse_member
from mmcl.shards.reader import RawSample
from mmcl.types import SampleError, Source

Bytes: TypeAlias = bytes | memoryview
Role: TypeAlias = Literal["video", "image", "audio", "text", "json", "label", "embedding", "questions"]

ROLES: Mapping[str, Role] = MappingProxyType(
    {
        **dict.fromkeys(("mp4", "mkv", "webm", "avi", "mov", "mpg", "mpeg", "m4v", "gif", "ts", "flv", "3gp"), "video"),
        **dict.fromkeys(("jpg", "jpeg", "png", "webp"), "image"),
        **dict.fromkeys(("wav", "flac", "mp3", "m4a", "aac", "ogg", "opus"), "audio"),
        "txt": "text",
        "json": "json",
        "cls": "label",
    }
)
"""What each extension holds. A longer one (``cam0.mp4``) counts by its last part."""

QUESTIONS = "qa.json"
"""multiple-choice questions about the clip"""

MAX_JSON_BYTES = 4 << 20
MAX_JSON_DEPTH = 32
MAX_TEXT_BYTES = 256 << 10
MAX_CAPTIONS = 10_000


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """One sample of a shard: media still encoded, text and facts read."""

    key: str
    video: Bytes | None = None
    """a media file; it may hold sound as well"""
    image: Bytes | None = None
    audio: Bytes | None = None
    """a media file of sound alone, where the sample has one beside or without the video"""
    captions: tuple[str, ...] = ()
    group: str | None = None
    """samples of equal group (the same source video) are never each other's negatives"""
    label: int | None = None
    duration_seconds: float | None = None
    video_size: tuple[int, int] | None = None
    """(height, width) in pixels"""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """the sample's whole JSON object"""
    source: Source | None = None
    vectors: Mapping[str, Bytes] = field(default_factory=dict)
    """embeddings by name, still encoded (``mmcl.shards.vectors``): NAME of each file ``KEY.NAME.npy``"""
    ignored: tuple[str, ...] = ()
    """extensions that the table does not name"""
    window_seconds: tuple[float, float] | None = None
    """[start, end) of the media files that the sample is, ``duration_seconds`` long; None: all of them"""
    questions: tuple[Question, ...] = ()
    """about the clip, from ``KEY.qa.json``"""


def parse_sample(raw: RawSample) -> Sample:
    """Sorts the files of a sample by meaning. The first of a kind counts; media are not opened.

    Captions come from the JSON (``captions``, a list, or ``caption``), else from the ``.txt`` file. Raises
    ``SampleError``: ``too_large``, ``bad_json``, ``caption_not_utf8``, ``no_media_and_no_caption``,
    ``bad_questions``.
    """
    found: dict[str, Bytes] = {}
    ignored: list[str] = []
    vectors: dict[str, Bytes] = {}
    for extension, data in raw.members.items():
        role = role_of(extension)
        if role is None:
            ignored.append(extension)
        elif role == "embedding":
            vectors[extension.removesuffix(".npy")] = data
        else:
            found.setdefault(role, data)
    facts = parse_json(found["json"]) if "json" in found else {}
    captions = read_captions(facts)
    if not captions and "text" in found:
        captions = clean_captions([decode_text(found["text"])])
    if not captions and not found.keys() & {"video", "image", "audio"}:
        raise SampleError("no_media_and_no_caption", f"{raw.key}: {', '.join(raw.members) or 'no files'}")
    label = _integer(facts.get("label"))
    if label is None and "label" in found:
        label = _integer(decode_text(found["label"]).strip())
    return Sample(
        raw.key,
        found.get("video"),
        found.get("image"),
        found.get("audio"),
        captions,
        read_group(facts),
        label,
        _window_length(facts) or _duration_seconds(facts),
        _video_size(facts),
        facts,
        raw.source,
        vectors,
        tuple(ignored),
        _window_seconds(facts),
        parse_member(found["questions"]) if "questions" in found else (),
    )


def role_of(extension: str) -> Role | None:
    """What a file of this extension holds; None: the table does not name it."""
    if extension.endswith(".npy"):  # named ones alone: a sample may have many
        return "embedding"
    if extension == QUESTIONS:
        return "questions"
    return ROLES.get(extension) or ROLES.get(extension.rpartition(".")[2])


def parse_json(data: Bytes) -> dict[str, Any]:
    """The object in a JSON file. Raises ``SampleError``: ``too_large``, ``bad_json``."""
    if len(data) > MAX_JSON_BYTES:
        raise SampleError("too_large", f"JSON of {len(data)} bytes, at most {MAX_JSON_BYTES}")
    try:
        facts = json.loads(bytes(data), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise SampleError("bad_json", str(error)[:200]) from None
    if not isinstance(facts, dict):
        raise SampleError("bad_json", f"an object is needed, not {type(facts).__name__}")
    _check_depth(facts)
    return facts


def decode_text(data: Bytes) -> str:
    """UTF-8, with or without a byte order mark. Raises ``SampleError``: ``too_large``, ``caption_not_utf8``."""
    if len(data) > MAX_TEXT_BYTES:
        raise SampleError("too_large", f"text of {len(data)} bytes, at most {MAX_TEXT_BYTES}")
    try:
        return bytes(data).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise SampleError("caption_not_utf8", str(error)) from None


def read_captions(facts: Mapping[str, Any]) -> tuple[str, ...]:
    """The captions of a sample's JSON: ``captions``, else ``caption``; either may be a text or a list of texts."""
    for name in ("captions", "caption"):
        value = facts.get(name)
        texts = [value] if isinstance(value, str) else value
        if isinstance(texts, list):
            captions = clean_captions([text for text in texts if isinstance(text, str)])
            if captions:
                return captions
    return ()


def clean_captions(texts: list[str]) -> tuple[str, ...]:
    """Outer blanks gone, empty ones left out. Raises ``SampleError``: ``too_large``, ``caption_not_utf8``."""
    if len(texts) > MAX_CAPTIONS or sum(map(len, texts)) > MAX_TEXT_BYTES:
        raise SampleError("too_large", f"{len(texts)} captions of {sum(map(len, texts))} characters")
    for text in texts:
        if not text.isascii():
            try:
                text.encode("utf-8")
            except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair
                raise SampleError("caption_not_utf8", str(error)[:200]) from None
    return tuple(text for text in (text.strip() for text in texts) if text)


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def _check_depth(value: Any) -> None:
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > MAX_JSON_DEPTH:
            raise SampleError("bad_json", f"nested deeper than {MAX_JSON_DEPTH}")
        inner: list[Any] = []
        for item in level:
            inner.extend(item.values() if isinstance(item, dict) else item)
        level = [item for item in inner if isinstance(item, (dict, list))]


def read_group(facts: Mapping[str, Any]) -> str | None:
    """The group in a sample's JSON: ours, else the address that video2dataset cut its clips from."""
    for name in ("group", "url"):
        value = facts.get(name)
        if isinstance(value, str) and value:
            return value
        if type(value) is int:
            return str(value)
    return None


def _integer(value: Any) -> int | None:
    if isinstance(value, str) and len(value) < 20 and value.isascii() and value.isdigit():
        value = int(value)
    return value if type(value) is int and -1 < value < 1 << 62 else None


def _number(value: Any) -> float | None:
    """A positive finite number, or None; video2dataset writes some as text."""
    if isinstance(value, str) and len(value) < 40:
        try:
            value = float(value)
        except ValueError:
            return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if 0 < value < 1e12 and math.isfinite(value) else None


def _stream(facts: Mapping[str, Any]) -> Mapping[str, Any]:
    """The first stream that ffprobe found, where video2dataset noted it."""
    probed = facts.get("video_metadata")
    streams = probed.get("streams") if isinstance(probed, dict) else None
    return streams[0] if isinstance(streams, list) and streams and isinstance(streams[0], dict) else {}


def _duration_seconds(facts: Mapping[str, Any]) -> float | None:
    for place in (facts, _stream(facts)):
        for name in ("duration_seconds", "duration"):
            seconds = _number(place.get(name))
            if seconds is not None:
                return seconds
    return None


def _window_seconds(facts: Mapping[str, Any]) -> tuple[float, float] | None:
    """The stretch of its files that a sample is, where it is not all of them."""
    value = facts.get("window_seconds")
    if not isinstance(value, list) or len(value) != 2:
        return None
    start, end = (0.0 if part == 0 else _number(part) for part in value)
    return (start, end) if start is not None and end is not None and start < end else None


def _window_length(facts: Mapping[str, Any]) -> float | None:
    window = _window_seconds(facts)
    return None if window is None else window[1] - window[0]


def _video_size(facts: Mapping[str, Any]) -> tuple[int, int] | None:
    ours = facts.get("video")
    for place in (ours if isinstance(ours, dict) else {}, facts, _stream(facts)):
        height, width = _integer(place.get("height")), _integer(place.get("width"))
        if height and width:
            return height, width
    return None
