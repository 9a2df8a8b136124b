"""The rows that shards are made of: a folder of media, or a CSV, TSV, JSONL or Parquet table.

A table needs ``path`` (relative ones count from the table's folder) and may have ``caption`` or ``captions`` (a list;
in CSV written as JSON), ``start_seconds``, ``end_seconds``, ``crop_x``, ``crop_y``, ``crop_w``, ``crop_h`` (pixels),
``label``, ``group``, ``split``; every other column is kept as metadata. A folder gives every media
file below it, sorted by name, with the caption and facts of ``NAME.txt`` or ``NAME.json`` beside it; names of
subfolders mean nothing. A table that cannot be read is a ``ConfigError``; a row that cannot be used carries its
problem.
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mmcl.shards.files import check_local
from mmcl.shards.member_index import Member
from mmcl.shards.members import ROLES, clean_captions, decode_text, parse_json, read_captions
from mmcl.types import ConfigError, SampleError

CROP_COLUMNS = ("crop_x", "crop_y", "crop_w", "crop_h")
COLUMNS = ("path", "caption", "captions", "start_seconds", "end_seconds", *CROP_COLUMNS, "label", "group", "split")
TABLES = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")
_MEDIA = {extension for extension, role in ROLES.items() if role in ("video", "image", "audio")}
_SAFE_SPLIT = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


@dataclass(frozen=True, slots=True)
class Row:
    """One sample to be made."""

    key: str
    """unique, of letters, digits, ``_`` and ``-``"""
    name: str
    """the path as written in the table, or below the folder"""
    path: str
    """where the file lies"""
    captions: tuple[str, ...] = ()
    start_seconds: float | None = None
    end_seconds: float | None = None
    crop: tuple[int, int, int, int] | None = None
    """(x, y, width, height) in pixels; None: as for all rows"""
    label: int | str | None = None
    group: str = ""
    """default: ``name``"""
    split: str = ""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    problem: tuple[str, str] | None = None
    """(reason, detail) of a row that cannot be used"""
    files: tuple[Member, ...] = ()
    """the sample's media where ``path`` is a tar; the first decides its length"""
    member_key: str = ""
    """of the sample in that tar"""
    ignored: tuple[str, ...] = ()
    """extensions of its other members, which nothing reads"""
    part: int | None = None
    """number of the scene in its stretch"""


def check_places(input: str | Path, out: str | Path) -> None:
    """Refuses URLs. Raises ``ConfigError``."""
    check_local(
        input, "shards are made of local files; copy them here first (`mmcl shards reshard` reads indexed tars by URL)"
    )
    check_local(out, "shards are written into a local folder; copy them to the store afterwards")


def read_rows(source: str | Path) -> list[Row]:
    """All rows of a folder or table, in order, with their keys. Raises ``ConfigError`` where there are none."""
    path = Path(source).expanduser().absolute()
    if path.is_dir():
        rows = list(_folder_rows(path))
        if not rows:
            raise ConfigError(f"{source} holds no media files ({', '.join(sorted(_MEDIA))})")
        return with_keys(rows)
    needed = f"a folder of media or of shards, a pattern of .tar files or a table ({', '.join(TABLES)}) is needed"
    if not path.exists():
        raise ConfigError(f"{source} is not there: {needed}")
    if path.suffix.lower() not in TABLES or not path.is_file():
        raise ConfigError(f"{source}: {needed}")
    rows = [_table_row(path.parent, record, problem) for record, problem in _records(path)]
    if not rows:
        raise ConfigError(f"{source} has no rows")
    return with_keys(rows)


_Records = Iterator[tuple[Mapping[str, Any], str]]
"""the columns of a row that are not missing, and what makes it unusable, if anything"""


def _records(path: Path) -> _Records:
    kind = path.suffix.lower()
    try:
        if kind in (".csv", ".tsv"):
            yield from _csv_records(path, "\t" if kind == ".tsv" else ",")
        elif kind == ".parquet":
            yield from _parquet_records(path)
        else:
            yield from _jsonl_records(path)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 (byte {error.start}); save the table as UTF-8") from None
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror or error}") from None


def read_csv(path: Path, delimiter: str = ",", *, header: bool = True) -> Iterator[tuple[int, list[str]]]:
    """(the line it begins on, its cells) of the header, if it has one, and of every row; empty lines are left out.

    Raises ``ConfigError`` where quotes do not match (read on, an open one would swallow the rows after it) and where a
    column comes twice; ``OSError`` and ``UnicodeDecodeError`` pass.
    """
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        names: list[str] = []
        while True:
            line = reader.line_num + 1
            try:
                cells = next(reader, None)
            except csv.Error as error:
                why = "a quote is not closed" if str(error) == "unexpected end of data" else str(error)
                raise ConfigError(f"{path}: the row that begins on line {line}: {why}") from None
            if cells is None:
                return
            if not cells:
                continue
            if header and not names:
                names = cells
                twice = [name for name, count in Counter(names).items() if name and count > 1]
                if twice:
                    raise ConfigError(f"{path}, line {line}: the column {twice[0][:40]!r} comes twice")
            yield line, cells


def _csv_records(path: Path, delimiter: str) -> _Records:
    rows = read_csv(path, delimiter)
    _, header = next(rows, (0, []))
    _need_path(path, header)
    for line, cells in rows:
        surplus = len(cells) - len(header)
        problem = f"line {line} has {surplus} more fields than the header" if surplus > 0 else ""
        # An empty cell is a missing value.
        yield {name: cell for name, cell in zip(header, cells, strict=False) if cell != ""}, problem


def _jsonl_records(path: Path) -> _Records:
    found = False
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                record = parse_json(line.encode("utf-8"))
            except SampleError as error:
                yield {}, f"line {number}: {error.detail}"
                continue
            found = found or "path" in record
            yield {name: value for name, value in record.items() if value is not None}, ""
    if not found:
        raise ConfigError(f"{path}: no row has a path")


def _parquet_records(path: Path) -> _Records:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ConfigError(f'{path}: reading Parquet needs pyarrow: pip install "mmcl[parquet]"') from None
    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            _need_path(path, table.schema_arrow.names)
            for batch in table.iter_batches():
                for record in batch.to_pylist():
                    yield {name: value for name, value in record.items() if value is not None}, ""
    except pyarrow.ArrowInvalid as error:
        raise ConfigError(f"{path} is not Parquet: {str(error)[:200]}") from None


def _need_path(path: Path, columns: Any) -> None:
    if "path" not in columns:
        shown = ", ".join(str(name)[:40] for name in columns) or "none"
        raise ConfigError(f"{path} has no column 'path' (columns: {shown})")


def _folder_rows(folder: Path) -> Iterator[Row]:
    # links that lead nowhere and devices are kept: rows that fail and are named
    files = [path for path in folder.rglob("*") if path.suffix[1:].lower() in _MEDIA and not path.is_dir()]
    for path in sorted(files, key=lambda path: path.relative_to(folder).as_posix()):
        name = path.relative_to(folder).as_posix()
        if any(part.startswith(".") for part in Path(name).parts):
            continue
        facts: dict[str, Any] = {}
        if not path.is_file():
            yield Row("", name, str(path), group=name, problem=("unreadable", f"{path} is a broken link or no file"))
            continue
        try:
            sidecar = path.with_suffix(".json")
            if sidecar.is_file():
                facts = parse_json(sidecar.read_bytes())
            sidecar = path.with_suffix(".txt")
            if sidecar.is_file() and not read_captions(facts):
                facts["caption"] = decode_text(sidecar.read_bytes())
                if not facts["caption"].strip():
                    raise SampleError("caption_empty", f"{sidecar} holds no text")
        except (SampleError, OSError) as error:
            reason = error.reason if isinstance(error, SampleError) else "unreadable"
            yield Row("", name, str(path), group=name, problem=(reason, f"{sidecar.name}: {error}"))
            continue
        yield _table_row(folder, {**facts, "path": name})


def _table_row(folder: Path, record: Mapping[str, Any], problem: str = "") -> Row:
    raw_name = record.get("path")
    name = raw_name if isinstance(raw_name, str) else ""
    row = Row("", name, str(folder / Path(name).expanduser()) if name else "", group=name)
    if problem:
        return replace(row, problem=("bad_row", problem))
    if not name or "\0" in name:
        return replace(row, problem=("bad_row", "no path"))
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", name):
        return replace(row, problem=("bad_row", "the path is a URL; media are read from local files: copy them"))
    try:
        start, end = (_seconds(record, column) for column in ("start_seconds", "end_seconds"))
        if end is not None and end <= (start or 0.0):
            raise SampleError("bad_row", f"end_seconds={end:g} is not after start_seconds={start or 0:g}")
        filled = replace(
            row,
            captions=_captions(record),
            start_seconds=start,
            end_seconds=end,
            crop=_crop(record),
            label=_label(record.get("label")),
            group=str(record.get("group", "")) or name,
            split=_split(record.get("split")),
            metadata={
                column: plain(value)
                for column, value in record.items()
                if column and column not in (*COLUMNS, *CROP_COLUMNS)
            },
        )
        check_text([name, filled.label, filled.group, filled.metadata])
    except SampleError as error:
        return replace(row, problem=(error.reason, error.detail))
    return filled


def check_text(facts: Any) -> None:
    """Raises ``SampleError`` (``bad_row``) on text that is no UTF-8.

    A file name may hold bytes that are no UTF-8, and JSON may spell half of a surrogate pair: no shard can.
    """
    try:
        json.dumps(facts, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        shown = ascii(str(error.object)[error.start : error.end])[1:-1]
        raise SampleError("bad_row", f"a path, group or other column holds {shown}: no UTF-8") from None


def _captions(record: Mapping[str, Any]) -> tuple[str, ...]:
    several = record.get("captions")
    if isinstance(several, str) and several.lstrip().startswith("["):
        try:
            several = json.loads(several)
        except (ValueError, RecursionError):
            raise SampleError("bad_row", f"captions is not a JSON list: {several[:80]}") from None
    texts: Any = several if several is not None else record.get("caption", [])
    texts = [texts] if isinstance(texts, str) else texts
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise SampleError("bad_row", "captions must be texts")
    return clean_captions(texts)


def _seconds(record: Mapping[str, Any], column: str) -> float | None:
    value = record.get(column)
    if value is None:
        return None
    try:
        seconds = float(value)
    except (TypeError, ValueError):
        seconds = math.nan
    if not 0 <= seconds < 1e9 or isinstance(value, bool):
        raise SampleError("bad_row", f"{column}={str(value)[:40]!r} is not a number of seconds")
    return seconds


def _crop(record: Mapping[str, Any]) -> tuple[int, int, int, int] | None:
    values = [record.get(column) for column in CROP_COLUMNS]
    if all(value is None for value in values):
        return None
    try:
        numbers = [float(str(value)) for value in values]
        x, y, width, height = (int(number) if number.is_integer() else -1 for number in numbers)
    except ValueError:
        x = y = width = height = -1
    if min(x, y) < 0 or min(width, height) < 2:
        shown = ", ".join(f"{column}={str(value)[:20]}" for column, value in zip(CROP_COLUMNS, values, strict=True))
        raise SampleError("bad_row", f"{shown}: four whole numbers of pixels are needed")
    return x, y, width, height


def _label(value: Any) -> int | str | None:
    if value is None or (isinstance(value, (int, str)) and not isinstance(value, bool)):
        return value
    if isinstance(value, float) and value.is_integer():
        return int(value)
    raise SampleError("bad_row", f"label={str(value)[:40]!r} is neither an integer nor a text")


def _split(value: Any) -> str:
    if value is None:
        return ""
    if not isinstance(value, str) or not _SAFE_SPLIT.fullmatch(value):
        raise SampleError("bad_row", f"split={str(value)[:40]!r}: letters, digits, _ and - only")
    return value


def plain(value: Any) -> Any:
    """What JSON can hold; anything else (a date, a decimal, bytes) as its text."""
    if isinstance(value, dict):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    return value if value is None or isinstance(value, (str, int, bool)) else str(value)


def with_keys(rows: list[Row]) -> list[Row]:
    """Keys from path and stretch, so that a row keeps its key when others come and go; repeated rows are named."""
    seen: Counter[str] = Counter()
    whole: set[str] = set()
    keyed = []
    for row in rows:
        place = json.dumps([row.name, row.start_seconds, row.end_seconds, *(row.crop or ())])
        everything = json.dumps([place, row.captions, row.label, row.group, row.split, row.metadata], sort_keys=True)
        repeated = everything in whole
        whole.add(everything)
        digest = hashlib.sha256(json.dumps([place, seen[place]]).encode("utf-8", "surrogatepass")).hexdigest()[:12]
        stem = re.sub(r"[^A-Za-z0-9_-]+", "_", Path(row.name).stem)[:48].strip("_") or "sample"
        stem += "" if row.part is None else f"-{row.part:04d}"
        if repeated and row.problem is None:
            row = replace(row, problem=("duplicate_row", "the same row came before"))
        else:
            seen[place] += 1
        keyed.append(replace(row, key=f"{stem}-{digest}"))
    return keyed


def class_numbers(rows: list[Row]) -> dict[str, int]:
    """Sorted class names to 0, 1, …; empty where all labels are integers (or there are none)."""
    labels = {row.label for row in rows if row.label is not None}
    if all(isinstance(label, int) or re.fullmatch(r"[0-9]{1,18}", label) for label in labels):
        return {}
    return {name: number for number, name in enumerate(sorted(map(str, labels)))}
