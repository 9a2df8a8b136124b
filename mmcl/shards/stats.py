"""What shards hold, counted: seconds, sizes, rates, codecs, captions, duplicates, what is missing; JSON and a page."""

from __future__ import annotations

import hashlib
import json
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mmcl.media.probe import MediaInfo, probe
from mmcl.progress import Progress, failures
from mmcl.shards.files import write_atomically, writing
from mmcl.shards.manifest import Manifest, load_manifest
from mmcl.shards.members import Sample, parse_sample
from mmcl.shards.page import bars, histogram, render_page
from mmcl.shards.pool import Lost
from mmcl.shards.reader import ShardReader
from mmcl.shards.scan import Place, choose_places, scan
from mmcl.types import SampleError, redact

_MOST_NAMED = 12
_MOST_EXAMPLES = 20
_FEW_PAIRS = 20


@dataclass(frozen=True, slots=True)
class SampleFacts:
    """What a glance at one sample tells; media are opened, not decoded."""

    key: str
    num_bytes: int = 0
    media: bytes = b""
    """digest of all media; b"": none"""
    group: str | None = None
    seconds: float | None = None
    resolution: tuple[int, int] | None = None
    """(width, height) as displayed"""
    fps: float | None = None
    hdr: str = ""
    """its HDR tag, which readers ignore"""
    video_codec: str = ""
    """"" : no video"""
    image: bool = False
    audio_codec: str = ""
    """"": no sound"""
    audio_rate_hz: int = 0
    words: tuple[int, ...] = ()
    """of each caption"""
    captions: tuple[bytes, ...] = ()
    """digest of each caption"""
    ignored: tuple[str, ...] = ()
    problem: str = ""
    """why it cannot be used"""


@dataclass(frozen=True, slots=True)
class ShardStats:
    """Sums over samples. ``document`` is what ``stats.json`` holds; ``histograms`` what the page draws."""

    document: Mapping[str, Any]
    histograms: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()
    """further lines, of who knows how the shards will be read"""

    @property
    def alike(self) -> tuple[float, float] | None:
        """How often neighbours are of one group, and how often any two samples are; None: not known."""
        found = self.document["neighbours"]
        if found["of_one_group"] is None:
            return None
        return found["of_one_group"], found["any_two_of_one_group"]

    def with_mixing(self, facts: Mapping[str, Any], remarks: Sequence[str]) -> ShardStats:
        """With what batches will be like, as ``mixing`` of the document."""
        return replace(self, document={**self.document, "mixing": facts}, remarks=(*self.remarks, *remarks))

    def lines(self) -> list[str]:
        """What to tell the user."""
        document = self.document
        seconds, missing, twice = document["seconds"], document["missing"], document["duplicates"]
        part = f" ({document['looked_at']} looked at)" if document["looked_at"] != document["samples"] else ""
        lines = [
            f"{document['samples']} samples{part} in {document['shards']} shards, {document['bytes'] / 1e6:.1f} MB, "
            f"{seconds['total']:.1f} s of media"
        ]
        for title, counts in self.histograms.items():
            if counts:
                found = (f"{_safe(name)} × {count}" for name, count in counts.items() if count)
                lines.append(f"{title}: " + ", ".join(found))
        lines.append("missing: " + _named(missing))
        lines.append("duplicates: " + _named({name: twice[name] for name in ("keys", "media", "captions")}))
        if document["unreadable"]:
            lines.append("unreadable: " + _named(document["unreadable"]) + "; `mmcl shards verify` names them")
        if document["hdr_tags_ignored"]:
            lines.append("HDR tags that readers ignore (colours are flat): " + _named(document["hdr_tags_ignored"]))
        if document["ignored_files"]:
            lines.append("files that nothing reads: " + _named(document["ignored_files"]))
        return [*lines, *self.remarks]


def shard_stats(
    folder: str | Path,
    *,
    sample: int | None = None,
    seed: int = 0,
    workers: int | None = None,
    timeout_seconds: float = 60.0,
    progress: Progress | None = None,
) -> ShardStats:
    """Looks at all samples (or at ``sample`` of them, drawn at random), in child processes.

    Raises ``ConfigError`` where there is no manifest, ``RunError`` where a shard cannot be read.
    """
    manifest = load_manifest(folder)
    places = choose_places(manifest, sample, seed)
    facts: list[SampleFacts] = []
    bad = 0
    for (shard, index), result in scan(manifest, look_at, places, workers=workers, timeout_seconds=timeout_seconds):
        if isinstance(result, Lost):
            result = SampleFacts(f"{manifest.shard_name(shard)}:{index}", problem=result.reason)
        facts.append(result)
        bad += bool(result.problem)
        if progress is not None:
            progress(len(facts), len(places), failures(bad))
    return summarise(manifest, facts, places)


def look_at(reader: ShardReader, shard: int, index: int) -> SampleFacts:
    """Runs in a child process. Raises ``RunError`` where the shard cannot be read."""
    key = reader.key(shard, index)
    try:
        raw = reader.read(shard, index)
        num_bytes = sum(map(len, raw.members.values()))
    except SampleError as error:
        return SampleFacts(key, problem=error.reason)
    try:
        sample = parse_sample(raw)
        media = [part for part in (sample.video, sample.image, sample.audio) if part is not None]
        video = probe(sample.video) if sample.video is not None else None
        audio = probe(sample.audio) if sample.audio is not None else None
    except SampleError as error:
        return SampleFacts(key, num_bytes, problem=error.reason)
    digest = hashlib.blake2b(digest_size=16)
    for part in media:
        digest.update(part)
    if sample.window_seconds is not None:  # stretches of one stored file are not the same
        digest.update(repr(sample.window_seconds).encode())
    return SampleFacts(
        key,
        num_bytes,
        digest.digest() if media else b"",
        sample.group,
        image=sample.image is not None,
        words=tuple(len(text.split()) for text in sample.captions),
        captions=tuple(hashlib.blake2b(text.encode(), digest_size=16).digest() for text in sample.captions),
        ignored=sample.ignored,
        **_media_facts(sample, video, audio),
    )


def _media_facts(sample: Sample, video: MediaInfo | None, audio: MediaInfo | None) -> dict[str, Any]:
    seconds = sample.duration_seconds
    found: dict[str, Any] = {}
    if seconds is None:
        info = video or audio
        seconds = info.duration_seconds if info is not None else None
    if video is not None and video.video is not None:
        height, width = video.video.displayed_size
        found["hdr"] = video.video.hdr
        found |= {"video_codec": video.video.codec, "resolution": (width, height), "fps": round(video.video.fps, 3)}
    sound = audio or video
    if sound is not None and sound.audio is not None:
        found |= {"audio_codec": sound.audio.codec, "audio_rate_hz": sound.audio.sample_rate_hz}
    return {"seconds": seconds, **found}


def summarise(manifest: Manifest, facts: Sequence[SampleFacts], places: Sequence[Place]) -> ShardStats:
    """The sums of what was found in samples of a manifest, at these places."""
    good = [sample for sample in facts if not sample.problem]
    seconds = [sample.seconds for sample in good if sample.seconds is not None]
    words = [count for sample in good for count in sample.words]
    sizes = manifest.sizes.tolist()
    counted = {
        "resolutions": _count(f"{s.resolution[0]}×{s.resolution[1]}" for s in good if s.resolution is not None),
        "video_codecs": _count(s.video_codec for s in good if s.video_codec),
        "frames_per_second": _count(f"{s.fps:g}" for s in good if s.fps is not None),
        "audio_codecs": _count(s.audio_codec for s in good if s.audio_codec),
        "audio_rates_hz": _count(str(s.audio_rate_hz) for s in good if s.audio_codec),
    }
    document = {
        "manifest": manifest.fingerprint,
        "shards": manifest.num_shards,
        "samples": manifest.num_samples,
        "looked_at": len(facts),
        "bytes": sum(sample.num_bytes for sample in facts),
        "samples_per_shard": _spread(sizes),
        "groups": len({sample.group for sample in good if sample.group is not None}),
        "neighbours": _neighbours(facts, places),
        "seconds": _spread(seconds),
        **counted,
        "captions": sum(len(sample.words) for sample in good),
        "caption_words": _spread(words),
        "missing": {
            "video": sum(not s.video_codec and not s.image for s in good),
            "audio": sum(not s.audio_codec for s in good),
            "captions": sum(not s.words for s in good),
        },
        "images": sum(s.image for s in good),
        "hdr_tags_ignored": _count(s.hdr for s in good if s.hdr),
        "duplicates": _duplicates(good),
        "unreadable": _count(sample.problem for sample in facts if sample.problem),
        "ignored_files": _count(extension for sample in good for extension in sample.ignored),
    }
    histograms = {
        "seconds per sample": histogram(seconds),
        "resolution": _most(counted["resolutions"]),
        "frames per second": _most(counted["frames_per_second"]),
        "video codec": _most(counted["video_codecs"]),
        "audio codec": _most(counted["audio_codecs"]),
        "audio samples per second": _most(counted["audio_rates_hz"]),
        "words per caption": histogram(words),
        "captions per sample": histogram([len(sample.words) for sample in good]),
        "kilobytes per sample": histogram([round(sample.num_bytes / 1e3, 1) for sample in facts]),
        "samples per shard": histogram(sizes),
    }
    return ShardStats(document, histograms)


def write_stats(stats: ShardStats, out: str | Path, title: str) -> tuple[Path, Path]:
    """Writes ``stats.json`` and ``stats.html`` into a folder. Raises ``RunError`` where that cannot be done."""
    folder = Path(out).expanduser()
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({**stats.document, "histograms": stats.histograms}, indent=1, ensure_ascii=False)
    write_atomically(folder / "stats.json", (text + "\n").encode("utf-8", "replace"))
    write_atomically(folder / "stats.html", render_stats(stats, redact(title)).encode("utf-8", "replace"))
    return folder / "stats.json", folder / "stats.html"


def render_stats(stats: ShardStats, title: str) -> str:
    """One self-contained page."""
    document = stats.document
    facts = {
        "samples": f"{document['samples']:,}",
        "looked at": f"{document['looked_at']:,}",
        "shards": f"{document['shards']:,}",
        "megabytes": f"{document['bytes'] / 1e6:,.1f}",
        "hours of media": f"{document['seconds']['total'] / 3600:,.2f}",
        "groups": f"{document['groups']:,}",
        "captions": f"{document['captions']:,}",
        "missing": _named(document["missing"]),
        "duplicates": _named({name: document["duplicates"][name] for name in ("keys", "media", "captions")}),
        "unreadable": _named(document["unreadable"]),
        "HDR tags that readers ignore": _named(document["hdr_tags_ignored"]),
        "files that nothing reads": _named(document["ignored_files"]),
        **({"mixing": "; ".join(stats.remarks).removeprefix("mixing ")} if stats.remarks else {}),
    }
    cards = [bars(name, counts) for name, counts in stats.histograms.items()]
    return render_page(title, "What these shards hold.", facts, cards)


def _duplicates(facts: Sequence[SampleFacts]) -> dict[str, Any]:
    """How many samples, beyond the first of each kind, have a key, media or captions that came before."""
    keys: Counter[str] = Counter(sample.key for sample in facts)
    captions = Counter(caption for sample in facts for caption in sample.captions)
    first: dict[bytes, str] = {}
    pairs: list[list[str]] = []
    media = 0
    for sample in facts:
        if not sample.media:
            continue
        if sample.media in first:
            media += 1
            if len(pairs) < _MOST_EXAMPLES:
                pairs.append([first[sample.media], sample.key])
        first.setdefault(sample.media, sample.key)
    return {
        "keys": sum(count - 1 for count in keys.values()),
        "media": media,
        "captions": sum(count - 1 for count in captions.values()),
        "examples_of_keys": [key for key, count in keys.items() if count > 1][:_MOST_EXAMPLES],
        "examples_of_media": pairs,
    }


def _neighbours(facts: Sequence[SampleFacts], places: Sequence[Place]) -> dict[str, Any]:
    """How often samples side by side are of one group, and how often any two are; None where too few are known."""
    groups = {place: sample.group for place, sample in zip(places, facts, strict=True) if sample.group is not None}
    pairs = [group == groups[shard, i + 1] for (shard, i), group in groups.items() if (shard, i + 1) in groups]
    if len(pairs) < _FEW_PAIRS:
        return {"pairs": len(pairs), "of_one_group": None, "any_two_of_one_group": None}
    total = len(groups)
    any_two = sum(count * (count - 1) for count in Counter(groups.values()).values()) / (total * (total - 1))
    return {"pairs": len(pairs), "of_one_group": sum(pairs) / len(pairs), "any_two_of_one_group": any_two}


def _spread(values: Sequence[float]) -> dict[str, float]:
    if not values:
        return {"total": 0, "min": 0, "median": 0, "mean": 0, "max": 0}
    spread = {
        "total": sum(values),
        "min": min(values),
        "median": statistics.median(values),
        "mean": statistics.fmean(values),
        "max": max(values),
    }
    return {name: round(value, 3) for name, value in spread.items()}


def _count(values: Iterable[str]) -> dict[str, int]:
    return dict(sorted(Counter(values).items(), key=lambda item: (-item[1], item[0])))


def _most(counts: Mapping[str, int]) -> dict[str, int]:
    """The most frequent ones, the others together."""
    names = list(counts)
    kept = {name: counts[name] for name in names[:_MOST_NAMED]}
    rest = sum(counts[name] for name in names[_MOST_NAMED:])
    return {**kept, "others": rest} if rest else kept


def _named(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {_safe(name)}" for name, count in counts.items() if count) or "none"


def _safe(text: str) -> str:
    """Without control characters: names of files are a stranger's."""
    return "".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in text)
