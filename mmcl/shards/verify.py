"""Proof that shards can be read to the last frame, the list of what cannot, and a copy of the shards without it."""

from __future__ import annotations

import functools
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from mmcl.progress import Progress, failures
from mmcl.shards.check import Problem, check_files
from mmcl.shards.files import is_remote, new_folder, write_atomically, writing
from mmcl.shards.index import read_whole
from mmcl.shards.manifest import Manifest, ShardEntry, load_manifest, write_manifest
from mmcl.shards.members import role_of
from mmcl.shards.pool import Lost
from mmcl.shards.reader import ShardReader
from mmcl.shards.scan import check_positive, choose_places, scan
from mmcl.shards.writer import TarShard
from mmcl.types import DEFAULT_DECODER, ConfigError, Decoder, RunError, SampleError

_SHARD_SECONDS = 3600.0


@dataclass(frozen=True, slots=True)
class VerifyOptions:
    """How thoroughly shards are verified."""

    sample: int | None = None
    """decode so many samples, drawn at random; None: all"""
    seed: int = 0
    """of that draw"""
    checksums: bool | None = None
    """read whole tars, compare their checksums and members with the index; None: unless ``sample`` is given"""
    decoder: Decoder = DEFAULT_DECODER
    """the one that runs use; PyAV decodes everything beside it"""
    tolerance_seconds: float = 0.5
    """between picture, sound, and the length that the JSON states"""
    workers: int | None = None
    """processes; None: as many as there are cores"""
    timeout_seconds: float = 120.0
    """per sample; then its process is ended and the sample named"""

    def __post_init__(self) -> None:
        if self.decoder not in ("decord", "pyav", "torchcodec"):
            raise ConfigError(f"decoder={self.decoder}: decord, pyav or torchcodec")
        check_positive(
            sample=self.sample,
            tolerance_seconds=self.tolerance_seconds,
            workers=self.workers,
            timeout_seconds=self.timeout_seconds,
        )


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong."""

    shard: str
    """name in the manifest"""
    index: int
    """of the sample in the shard; −1: the shard itself"""
    key: str
    """"" for a shard"""
    member: str
    """extension of the file; "" where it is not one file"""
    reason: str
    detail: str

    def __str__(self) -> str:
        """One line without control characters: keys and details are a stranger's."""
        place = self.shard if self.index < 0 else f"{self.shard}:{self.index} {self.key}"
        line = f"{place}{'.' if self.member else ''}{self.member}: {self.reason} ({self.detail})"
        return "".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in line)


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What ``verify_shards`` found."""

    url: str
    shards: int
    """checked"""
    samples: int
    """decoded"""
    total: int
    """samples of the manifest"""
    findings: tuple[Finding, ...]
    ignored: dict[str, int]
    """files that nothing reads, by extension or by why they belong to no sample"""

    @property
    def ok(self) -> bool:
        return not self.findings

    def bad_samples(self) -> dict[tuple[str, int], Finding]:
        """The first finding of each bad sample, by (shard, index)."""
        bad: dict[tuple[str, int], Finding] = {}
        for finding in self.findings:
            if finding.index >= 0:
                bad.setdefault((finding.shard, finding.index), finding)
        return bad

    def lines(self) -> list[str]:
        """What to tell the user: every finding, then the sums."""
        lines = [str(finding) for finding in self.findings]
        if self.ignored:
            lines.append("ignored: " + ", ".join(f"{n} × {ascii(name)[1:-1]}" for name, n in self.ignored.items()))
        reasons = Counter(finding.reason for finding in self.findings)
        counted = "".join(f", {count} {reason}" for reason, count in sorted(reasons.items()))
        bad, shards = len(self.bad_samples()), sum(finding.index < 0 for finding in self.findings)
        part = "" if self.samples == self.total else f" of {self.total}"
        lines.append(
            f"{self.samples}{part} samples decoded, {self.shards} shards checked: "
            + ("all good" if self.ok else f"{bad} bad samples, {shards} findings on shards{counted}")
        )
        return lines


def verify_shards(
    folder: str | Path, options: VerifyOptions | None = None, *, progress: Progress | None = None
) -> VerifyReport:
    """Reads shards as a run would, more thoroughly, each sample in a child process: a crash or hang is one finding.

    Samples of a shard that cannot be read at all are not decoded. Raises ``ConfigError`` where there is no manifest.
    """
    options, manifest = options or VerifyOptions(), load_manifest(folder)
    places = choose_places(manifest, options.sample, options.seed)
    shards = sorted({shard for shard, _ in places})
    if options.sample is None:  # empty ones too
        shards = list(range(manifest.num_shards))
    total = len(shards) + len(places)
    findings: list[Finding] = []
    ignored: Counter[str] = Counter()
    whole = options.checksums if options.checksums is not None else options.sample is None
    unreadable: set[int] = set()
    for done, (shard, problems, left_out) in enumerate(_check_shards(manifest, shards, whole, options), 1):
        findings += [Finding(manifest.shard_name(shard), -1, "", *problem) for problem in problems]
        unreadable |= {shard for problem in problems if problem.reason == "unreadable_shard"}
        ignored.update(left_out)
        if progress is not None:
            progress(done, total, failures(len(findings)))
    places = [place for place in places if place[0] not in unreadable]
    keys = ShardReader(manifest)
    check = functools.partial(_check_sample, decoder=options.decoder, tolerance_seconds=options.tolerance_seconds)
    results = scan(manifest, check, places, workers=options.workers, timeout_seconds=options.timeout_seconds)
    for done, ((shard, index), result) in enumerate(results, len(shards) + 1):
        if isinstance(result, Lost):
            result = [Problem("", result.reason, result.detail)], []
        problems, extensions = result
        ignored.update(extensions)
        if problems:
            name, key = manifest.shard_name(shard), keys.key(shard, index)
            findings += [Finding(name, index, key, *problem) for problem in problems]
        if progress is not None:
            progress(done, total, failures(len(findings)))
    return VerifyReport(
        manifest.url, len(shards), len(places), manifest.num_samples, tuple(findings), dict(sorted(ignored.items()))
    )


def _check_sample(
    reader: ShardReader, shard: int, index: int, *, decoder: Decoder, tolerance_seconds: float
) -> tuple[list[Problem], list[str]]:
    """Runs in a child process: (problems, extensions that nothing reads)."""
    try:
        raw = reader.read(shard, index)
    except SampleError as error:
        return [Problem("", error.reason, error.detail)], []
    except RunError as error:  # changed since the shard was checked
        return [Problem("", "unreadable_shard", str(error))], []
    ignored = [extension for extension in raw.members if role_of(extension) is None]
    return check_files(raw, decoder=decoder, tolerance_seconds=tolerance_seconds), ignored


def _check_shards(
    manifest: Manifest, shards: list[int], whole: bool, options: VerifyOptions
) -> Iterator[tuple[int, list[Problem], dict[str, int]]]:
    check = functools.partial(_check_shard, whole=whole)
    places = [(shard, -1) for shard in shards]
    limit = max(_SHARD_SECONDS if whole else 0.0, options.timeout_seconds)
    for (shard, _), result in scan(manifest, check, places, workers=options.workers, timeout_seconds=limit):
        if isinstance(result, Lost):
            yield shard, [Problem("", "unreadable_shard", f"{result.reason}: {result.detail}")], {}
        else:
            yield shard, *result


def _check_shard(reader: ShardReader, shard: int, _: int, *, whole: bool) -> tuple[list[Problem], dict[str, int]]:
    """Runs in a child process: (problems, what of the tar belongs to no sample)."""
    manifest, url = reader.manifest, reader.manifest.shard_url(shard)
    try:
        index = reader.open_index(shard)
    except (RunError, ConfigError, SampleError) as error:
        return [Problem("", "unreadable_shard", str(error))], {}
    stated = int(manifest.shard_bytes[shard])
    if 0 <= stated != index.tar_bytes:
        return [Problem("", "wrong_size", f"{index.tar_bytes} bytes, the manifest states {stated}")], {}
    if not whole:
        return [], {}
    try:
        contents, _, found = read_whole(url)
    except (OSError, RunError, SampleError) as error:
        return [Problem("", "unreadable_shard", str(error))], {}
    problems: list[Problem] = []
    known = bytes(manifest.checksums[shard])
    if any(known) and found != known:
        problems.append(Problem("", "checksum", f"sha256 {found.hex()}, the manifest states {known.hex()}"))
    problems += [Problem("", "tar", problem) for problem in contents.problems]
    keys = [key.encode("utf-8", "replace").decode() for key in contents.keys]  # as the index keeps them
    there = [(key, sorted(files)) for key, files in zip(keys, contents.members, strict=True)]
    if there != [(index.key(i), sorted(index.members(i))) for i in range(index.num_samples)]:
        problems.append(Problem("", "index_differs", "the tar holds other files; `mmcl shards index` reads it again"))
    return problems, dict(contents.ignored)


def write_quarantine(path: str | Path, report: VerifyReport) -> int:
    """Adds the bad samples to a list, one JSON object a line (``key``, ``reason``, ``detail``, ``shard``, ``index``).

    What the file holds stays, keys that it names already are not added again. Returns how many were added. Raises
    ``ConfigError`` where the file is no such list, ``RunError`` where it cannot be written.
    """
    target = Path(path)
    try:
        before = target.read_bytes()
        known = {json.loads(line)["key"] for line in before.splitlines() if line.strip()}
    except FileNotFoundError:
        before, known = b"", set()
    except OSError as error:
        raise RunError(f"cannot read {path}: {error.strerror or error}") from None
    except (ValueError, KeyError, TypeError):
        raise ConfigError(f"{path} is there already and is no list of samples (JSON lines with a key)") from None
    if before and not before.endswith(b"\n"):
        before += b"\n"
    lines = []
    for finding in report.bad_samples().values():
        if finding.key not in known:
            known.add(finding.key)
            facts = {name: value for name, value in asdict(finding).items() if name != "member"}
            lines.append(json.dumps(facts, ensure_ascii=False) + "\n")
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(target, before + "".join(lines).encode("utf-8", "replace"))
    return len(lines)


def repair_shards(report: VerifyReport, out: str | Path) -> Manifest:
    """Writes the shards again into the new folder ``out``, each without its bad samples; the old ones stay.

    Shards that cannot be read, and those of which nothing is left, are left out. All files of a good sample are kept.
    Raises ``ConfigError`` where ``out`` is there already or the report is of a part of the samples, ``RunError`` where
    nothing is left or the folder cannot be written.
    """
    manifest = load_manifest(report.url)
    left_out = {finding.shard for finding in report.findings if finding.reason == "unreadable_shard"}
    shards = [shard for shard in range(manifest.num_shards) if manifest.shard_name(shard) not in left_out]
    if report.samples != sum(int(manifest.sizes[shard]) for shard in shards):
        raise ConfigError("--repair keeps what was found good: verify all samples, without --sample")
    bad = report.bad_samples().keys()
    if report.samples == len(bad):
        raise RunError(f"{report.url}: no good sample is left")
    target = new_folder(out)
    reader = ShardReader(manifest)
    entries = [entry for shard in shards if (entry := _rewrite(reader, shard, target, bad)) is not None]
    return write_manifest(target, entries)


def _rewrite(reader: ShardReader, shard: int, target: Path, bad: Any) -> ShardEntry | None:
    name = reader.manifest.shard_name(shard)
    good = [index for index in range(int(reader.manifest.sizes[shard])) if (name, index) not in bad]
    if not good:
        return None
    path = target / (f"shard-{shard:06d}.tar" if is_remote(name) else name)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    tar = TarShard(path)
    try:
        for index in good:
            raw = reader.read(shard, index)
            tar.add(raw.key, raw.members)
        entry = tar.close()
    except SampleError as error:
        tar.discard()
        raise RunError(f"{name}: a sample that was good cannot be read any more: {error}") from None
    except BaseException:
        tar.discard()
        raise
    return replace(entry, url=path.relative_to(target).as_posix())
