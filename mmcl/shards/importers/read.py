"""Reading annotation files: every mistake is one line that names the file and the place."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmcl.shards.inputs import read_csv
from mmcl.types import ConfigError


@dataclass(frozen=True, slots=True)
class Item:
    """One item of a data set: what its annotations say."""

    id: str
    """its name in the data set"""
    files: tuple[str, ...]
    """names that its media file may have, without folder; with or without extension"""
    captions: tuple[str, ...] = ()
    label: str = ""
    """class, in words"""
    group: str = ""
    """items of equal group come from one source"""
    split: str = ""
    """where the annotations tell it; "": of the split that was asked for"""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """further columns"""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What of the annotations is asked for."""

    split: str
    fold: int


def malformed(path: Path, line: int, why: str) -> ConfigError:
    """The error for one line of a file."""
    return ConfigError(f"{path}, line {line}: {why}")


def need_file(path: Path, what: str) -> Path:
    """Raises ``ConfigError`` where there is no such file, or it is a pickle."""
    if path.suffix.lower() in (".pkl", ".pickle"):
        raise ConfigError(f"{path}: a pickle can run code when it is read, and is not; give {what}")
    if not path.is_file():
        raise ConfigError(f"{path}: no such file; {what} is needed")
    return path


def need_folder(path: Path, what: str) -> Path:
    """Raises ``ConfigError`` where there is no such folder."""
    if not path.is_dir():
        raise ConfigError(f"{path}: no such folder; {what} is needed")
    return path


def lines_of(path: Path, what: str) -> Iterator[tuple[int, str]]:
    """(number, text) of the lines that hold something."""
    for number, line in enumerate(_text(need_file(path, what)).splitlines(), 1):
        if line.strip():
            yield number, line.rstrip()


def csv_of(
    path: Path, columns: Sequence[str], what: str, *, header: bool = True
) -> Iterator[tuple[int, dict[str, str]]]:
    """(line, cells by column) of a CSV; with ``header`` it may have more columns, in any order."""
    names = list(columns)
    try:
        for number, (line, cells) in enumerate(read_csv(need_file(path, what), header=header)):
            if header and number == 0:
                missing = [name for name in columns if name not in cells]
                if missing:
                    raise malformed(path, line, f"no column {missing[0]!r}; {what} is needed")
                names = cells
            elif len(cells) != len(names):
                raise malformed(path, line, f"{len(cells)} fields where there should be {len(names)}")
            else:
                yield line, dict(zip(names, cells, strict=True))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 (byte {error.start})") from None


def json_of(path: Path, kind: type, what: str) -> Any:
    """The whole of a JSON file, which must be a list or a mapping."""
    try:
        found = json.loads(_text(need_file(path, what)))
    except json.JSONDecodeError as error:
        raise malformed(path, error.lineno, f"not JSON: {error.msg}") from None
    except RecursionError:
        raise ConfigError(f"{path}: not {what}: nested without end") from None
    if not isinstance(found, kind):
        raise ConfigError(f"{path}: not {what}: a {kind.__name__} is needed, it holds a {type(found).__name__}")
    return found


def entry(path: Path, place: str, found: Any, **kinds: type | tuple[type, ...]) -> list[Any]:
    """Values of the keys of an entry of a JSON file, each of its type."""
    if not isinstance(found, dict):
        raise ConfigError(f"{path}: {place} is no mapping")
    for name, kind in kinds.items():
        if not isinstance(found.get(name), kind):
            raise ConfigError(f"{path}: {place} has no {name!r} of the right type")
    return [found[name] for name in kinds]


def texts(path: Path, place: str, found: Sequence[Any]) -> tuple[str, ...]:
    """Captions, without blanks around them and without empty ones."""
    if not all(isinstance(text, str) for text in found):
        raise ConfigError(f"{path}: {place} holds something that is no text")
    return tuple(text for text in map(str.strip, found) if text)


def number(path: Path, line: int, row: Mapping[str, str], column: str) -> float:
    """A number ≥ 0 of a CSV."""
    try:
        value = float(row[column])
    except ValueError:
        value = -1.0
    if not 0 <= value < 1e9:
        raise malformed(path, line, f"{column}={row[column][:40]!r} is not a number of seconds")
    return value


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 (byte {error.start})") from None
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror or error}") from None
