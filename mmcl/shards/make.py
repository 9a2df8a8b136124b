"""From media and captions to indexed shards: many processes, one result.

The shards are a pure function of the rows, the files' content and the settings: the same bytes with any number of
workers, and however often the run was interrupted. What is done is known by content hash: from shards that are there
already, and from staging files that workers leave in ``.make`` until their shard is written.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av

import mmcl
from mmcl.hashing import hash64, text_hash
from mmcl.progress import Progress, failures
from mmcl.shards.assemble import Assembler
from mmcl.shards.cut import cut_rows
from mmcl.shards.duplicates import duplicates_of, find_duplicates, json_lines, name_duplicates
from mmcl.shards.engine import Crew, open_engine
from mmcl.shards.files import write_atomically, writing
from mmcl.shards.input_tars import find_tars, read_tar_rows
from mmcl.shards.inputs import Row, check_places, class_numbers, read_rows, with_keys
from mmcl.shards.make_options import MakeOptions, MakeReport
from mmcl.shards.manifest import WORK_FOLDER, ShardEntry, write_manifest
from mmcl.shards.pool import Lost
from mmcl.shards.prepare import Job, Prepared, prepare
from mmcl.shards.scenes import cut_scenes
from mmcl.shards.subtitles import cut_by_subtitles
from mmcl.types import ConfigError, RunError

_NOT_SETTINGS = {"workers", "timeout_seconds", "media", "engine", "address"}


def make_shards(
    input: str | Path, out: str | Path, options: MakeOptions | None = None, *, progress: Progress | None = None
) -> MakeReport:
    """Makes (or completes) the shards of ``input`` in the folder ``out``, one folder below it per split.

    A second run takes over what is done, drops samples whose rows are gone, and tries failed rows again. Raises
    ``ConfigError`` on wrong input or on settings other than those of the folder, ``RunError`` where the folder cannot
    be written or no row could be used.
    """
    check_places(input, out)
    options, target = options or MakeOptions(), Path(out).expanduser().absolute()
    _check_settings(target, _settings(input, options))
    with open_engine(options.engine, options.address, options.workers, options.timeout_seconds) as crew:
        rows = _read_rows(input, target, options, crew)
        with _work_folder(target) as work:
            write_atomically(target / "settings.json", _json(_settings(input, options) | _made_with()))
            return _make(input, target, rows, options, work, crew, progress)


def _make(
    input: str | Path,
    target: Path,
    rows: list[Row],
    options: MakeOptions,
    work: Path,
    crew: Crew,
    progress: Progress | None,
) -> MakeReport:
    classes = class_numbers(rows)
    same = find_duplicates(rows, crew) if options.dedup else {}
    done: list[_Split] = []
    failed = 0
    for name, part in _by_split(rows, options.shuffle).items():
        shown = sum(len(split.rows) for split in done)
        said = _said(progress, shown, len(rows) - len(same), failed)
        part = [numbered for numbered in part if numbered[0] not in same]
        if not part:
            continue  # duplicates alone: no folder for them
        done.append(_make_split(target / name, part, options, classes, work, said, crew))
        failed += len(done[-1].failures)
    failures = [failure for split in done for failure in split.failures]
    write_atomically(target / "failures.jsonl", json_lines(sorted(failures, key=lambda line: line["row"])))
    same = same or duplicates_of(rows, {number: digest for split in done for number, digest in split.sources.items()})
    write_atomically(target / "duplicates.jsonl", json_lines(name_duplicates(rows, same, left_out=options.dedup)))
    if len(failures) == len(rows) - (len(same) if options.dedup else 0):
        first = min(failures, key=lambda line: line["row"])
        raise RunError(
            f"none of the {len(rows)} rows of {input} could be used; the first: {first['path']}: "
            f"{first['reason']} ({first['detail']}); all are in {target / 'failures.jsonl'}"
        )
    if classes:
        write_atomically(target / "labels.json", _json({"classes": sorted(classes)}))
    for split in done:
        write_manifest(split.folder, split.entries)
    return _report(done, tuple(_stored_again(rows, options)), len(same), options)


def describe_plan(input: str | Path, out: str | Path, options: MakeOptions | None = None) -> list[str]:
    """What ``make_shards`` would do, in lines; reads the table, looks whether the files are there, writes nothing."""
    check_places(input, out)
    options, target = options or MakeOptions(), Path(out).expanduser().absolute()
    with open_engine(options.engine, options.address, options.workers, options.timeout_seconds) as crew:
        rows = _read_rows(input, target, options, crew)
    _check_settings(target, _settings(input, options))
    lines = [
        f"{len(rows)} {'stretches' if _cuts(options) else 'rows'} of {input}",
        *options.media.lines(),
        *_stored_again(rows, options),
    ]
    for name, part in _by_split(rows, options.shuffle).items():
        missing = sum(row.problem is None and not Path(row.path).is_file() for _, row in part)
        bad = sum(row.problem is not None for _, row in part)
        captioned = sum(bool(row.captions) for _, row in part)
        lines.append(f"{target / name}: {len(part)} samples, {captioned} with captions")
        if missing or bad:
            lines.append(f"  of these, {missing} files are missing and {bad} rows cannot be used")
    return lines


def _stored_again(rows: Sequence[Row], options: MakeOptions) -> list[str]:
    """What copying whole sources costs where several samples are stretches of one."""
    if "copy" not in (options.media.codec, options.media.audio_codec):
        return []
    times = collections.Counter(row.path for row in rows if row.problem is None)
    again = sum(count - 1 for count in times.values())
    num_bytes = sum((count - 1) * _size(path) for path, count in times.items() if count > 1)
    if not again:
        return []
    return [
        f"a copied stream is stored whole with every sample: {again} samples store a source once more, "
        f"about {num_bytes / 1e6:.1f} MB in all; only codecs that encode cut"
    ]


def _size(path: str) -> int:
    try:
        return Path(path).stat().st_size
    except (OSError, ValueError):
        return 0


def _cuts(options: MakeOptions) -> bool:
    return options.windows is not None or options.subtitles or bool(options.scenes)


def _read_rows(input: str | Path, target: Path, options: MakeOptions, crew: Crew) -> list[Row]:
    if target == Path(input).expanduser().absolute():
        raise ConfigError(f"--out {target} is the input itself; choose another folder, inside of it if you like")
    tars = find_tars(input, without=target)
    rows = read_tar_rows(tars) if tars else read_rows(input)
    if options.subtitles:
        rows = cut_by_subtitles(rows, merge_seconds=options.merge_cues_seconds)
    if options.scenes:
        rows = cut_scenes(rows, options.scenes, crew, min_seconds=options.min_scene_seconds)
    if options.windows is not None:
        rows = cut_rows(rows, options.windows, crew)
    return with_keys(rows) if _cuts(options) else rows


@dataclass(frozen=True, slots=True)
class _Split:
    folder: Path
    rows: Sequence[tuple[int, Row]]
    entries: list[ShardEntry]
    failures: list[dict[str, Any]]
    sources: dict[int, str]
    """digest of the media of each row that was used"""
    reused: int
    seconds: float


def _make_split(
    folder: Path,
    rows: Sequence[tuple[int, Row]],
    options: MakeOptions,
    classes: dict[str, int],
    work: Path,
    said: Callable[[int, int], None],
    crew: Crew,
) -> _Split:
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    assembler = Assembler(folder, work, options.max_count, options.max_bytes)
    failures: list[dict[str, Any]] = []
    sources: dict[int, str] = {}
    jobs = [Job(row, options.media, _class(row, classes), str(work), assembler.known_hash(row.key)) for _, row in rows]
    results = crew(prepare, jobs)
    with contextlib.closing(results), contextlib.closing(assembler):
        for (number, row), result in zip(rows, results, strict=True):
            if isinstance(result, Lost):
                result = Prepared(reason=result.reason, detail=result.detail)
            if result.reason:
                failure = {"row": number, "path": row.path, "key": row.key, "split": row.split}
                if row.member_key:
                    failure["sample"] = row.member_key
                if row.start_seconds is not None:
                    failure["start_seconds"] = row.start_seconds
                failures.append({**failure, "reason": result.reason, "detail": result.detail})
            else:
                assembler.add(row.key, result)
                sources[number] = result.source
            said(assembler.samples + len(failures), len(failures))
        entries = assembler.finish()
    return _Split(folder, rows, entries, failures, sources, assembler.reused, assembler.seconds)


def _class(row: Row, classes: dict[str, int]) -> int | None:
    if row.label is None:
        return None
    return classes[str(row.label)] if classes else int(row.label)


def _said(progress: Progress | None, before: int, total: int, failed: int) -> Callable[[int, int], None]:
    def said(done: int, new_failures: int) -> None:
        if progress is not None:
            progress(before + done, total, failures(failed + new_failures))

    return said


def _by_split(rows: list[Row], seed: int | None) -> dict[str, list[tuple[int, Row]]]:
    """(row number, row) in the order of the shards, by split. Where some rows name one, the others are ``train``."""
    splits: dict[str, list[tuple[int, Row]]] = collections.defaultdict(list)
    named = sorted({row.split for row in rows if row.split})
    default = "train" if named else ""
    if named and all(row.split or row.problem for row in rows):
        default = named[0]  # only unusable rows name none: no folder for them alone
    for number, row in enumerate(rows):
        splits[row.split or default].append((number, row))
    if seed is not None:
        for part in splits.values():
            part.sort(key=lambda numbered: (int(hash64(seed, text_hash(numbered[1].key))), numbered[0]))
    return dict(sorted(splits.items()))


def _settings(input: str | Path, options: MakeOptions) -> dict[str, Any]:
    settings = {name: value for name, value in dataclasses.asdict(options).items() if name not in _NOT_SETTINGS}
    if not options.subtitles:  # as folders have it that are older than this setting
        del settings["subtitles"], settings["merge_cues_seconds"]
    if not options.scenes:
        del settings["scenes"], settings["min_scene_seconds"]
    if not options.dedup:
        del settings["dedup"]
    source = str(Path(input).expanduser().absolute())
    media = dataclasses.asdict(options.media)
    if (options.media.codec, options.media.audio_codec) == ("h264", "aac"):
        del media["codec"], media["audio_codec"]
    if not options.media.motion:  # as older folders have it
        del media["motion"]
    found = {"format": 1, "input": source, **settings, **media}
    return dict(json.loads(_json(found)))  # as it comes back from the file


def _made_with() -> dict[str, Any]:
    """For people; other versions may encode other bytes, but are not refused."""
    return {"made_with": {"mmcl": mmcl.__version__, "av": av.__version__}}


def _check_settings(target: Path, settings: dict[str, Any]) -> None:
    path = target / "settings.json"
    if target.exists() and not target.is_dir():
        raise RunError(f"{target} is a file, a folder is needed")
    try:
        kept = json.loads(path.read_bytes())
    except FileNotFoundError:
        if any(target.glob("*.tar")) or any(target.glob("*/*.tar")):
            raise ConfigError(
                f"{target} holds shards that were not made by this command; choose another --out"
            ) from None
        return
    except OSError as error:
        raise RunError(f"cannot read {path}: {error.strerror or error}") from None
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from None
    names = [name for name in {**settings, **kept} if name != "made_with" and settings.get(name) != kept.get(name)]
    if names:
        shown = "; ".join(f"{name}: {kept.get(name)} there, {settings.get(name)} asked" for name in names)
        raise ConfigError(f"{target} was made with other settings ({shown}); choose another --out")


@contextlib.contextmanager
def _work_folder(target: Path) -> Iterator[Path]:
    """``.make``, locked against a second run, taken away at a good end and kept at any other."""
    work = target / WORK_FOLDER
    with writing(work):
        work.mkdir(parents=True, exist_ok=True)
        lock = (work / "lock").open("w")
    with lock:
        try:
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:
            pass  # Windows: nothing keeps two runs apart
        except OSError:
            raise RunError(f"another run is writing to {target}") from None
        yield work
        shutil.rmtree(work, ignore_errors=True)


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode("utf-8", "replace")


def _report(done: list[_Split], notes: tuple[str, ...], duplicates: int, options: MakeOptions) -> MakeReport:
    entries = [entry for split in done for entry in split.entries]
    reasons = collections.Counter(failure["reason"] for split in done for failure in split.failures)
    ignored = collections.Counter(name for split in done for _, row in split.rows for name in row.ignored)
    return MakeReport(
        tuple(split.folder for split in done),
        sum(entry.num_samples for entry in entries),
        sum(split.reused for split in done),
        sum(split.seconds for split in done),
        sum(entry.num_bytes for entry in entries),
        len(entries),
        notes,
        dict(sorted(reasons.items())),
        dict(sorted(ignored.items())),
        duplicates,
        options.dedup,
    )
