"""The table of importers, and the table that one writes: JSONL, as ``mmcl shards make`` reads it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmcl.config import unknown_name
from mmcl.shards.files import write_file
from mmcl.shards.importers import captions, classes
from mmcl.shards.importers.read import Item, Wanted, lines_of, need_folder
from mmcl.shards.members import ROLES
from mmcl.types import ConfigError

_NAMED = 5
"""missing items that are named on the terminal; the file names all"""
_TEST = ("test", "train", "val")


@dataclass(frozen=True, slots=True)
class Importer:
    """How the annotations of one data set are read."""

    read: Callable[[Path, Wanted], Iterator[Item]]
    medium: str
    """``video`` or ``audio``: which file of an item is taken where it has both"""
    splits: tuple[str, ...] = ()
    """that it may be asked for, the default first; none: the set has none"""
    folds: int = 1
    """official splits of the set, numbered from 1"""
    classes: Callable[[Path], list[str]] | None = None
    """names of all classes, where not every list of items shows them all"""


IMPORTERS: dict[str, Importer] = {
    "msrvtt_1k_a": Importer(captions.msrvtt_1k_a, "video", ("test",)),
    "msrvtt_full": Importer(captions.msrvtt_full, "video", _TEST),
    "msvd": Importer(captions.msvd, "video", _TEST),
    "didemo": Importer(captions.didemo, "video", _TEST),
    "activitynet": Importer(captions.activitynet, "video", ("val", "train")),
    "lsmdc": Importer(captions.lsmdc, "video", _TEST),
    "vatex": Importer(captions.vatex, "video", _TEST),
    "audiocaps": Importer(captions.audiocaps, "audio", _TEST),
    "clotho": Importer(captions.clotho, "audio", ("evaluation", "development", "validation")),
    "vggsound": Importer(classes.vggsound, "video", ("test", "train")),
    "ucf101": Importer(classes.ucf101, "video", ("test", "train"), 3, classes.ucf101_classes),
    "hmdb51": Importer(classes.hmdb51, "video", ("test", "train"), 3, classes.hmdb51_classes),
    "k400": Importer(classes.k400, "video", ("val", "train", "test")),
    "esc50": Importer(classes.esc50, "audio"),
    "urbansound8k": Importer(classes.urbansound8k, "audio"),
}
"""by the names of the protocols of ``configs/evaluate``"""


@dataclass(frozen=True, slots=True)
class Imported:
    """What an import wrote."""

    table: Path
    items: int
    """with media, rows of the table"""
    missing: tuple[str, ...]
    """items without media"""
    doubtful: tuple[str, ...]
    """items with several files of one name, of which the first by path was taken"""
    classes: int

    def lines(self) -> list[str]:
        """What to tell the user."""
        lines = [f"{self.table}: {self.items} of {self.items + len(self.missing)} items have media"]
        if self.missing:
            lines.append(f"missing: {_some(self.missing)}; all of them: {_beside(self.table, 'missing')}")
        if self.doubtful:
            lines.append(f"several files of one name, the first was taken: {_some(self.doubtful)}")
        if self.classes:
            lines.append(f"{_beside(self.table, 'classes')}: {self.classes} classes")
        return lines


def import_annotations(
    name: str,
    annotations: Path,
    media: Path,
    out: Path,
    *,
    split: str = "",
    fold: int = 1,
    only: Path | None = None,
) -> Imported:
    """Writes the table ``out``, and beside it the names of missing items and of all classes.

    Args:
        name: of :data:`IMPORTERS`.
        annotations: the set's own file, or folder.
        media: searched with the folders below it.
        split: default: the importer's first.
        fold: which of the set's official splits.
        only: a file whose lines begin with the names of the items to take (a list of a split).

    Raises:
        ConfigError: unknown names, annotations that cannot be read (names file and line), or no item with media.
    """
    if name not in IMPORTERS:
        raise unknown_name("importer", name, IMPORTERS)
    importer = IMPORTERS[name]
    if out.suffix != ".jsonl":
        raise ConfigError(f"--out {out}: the table is JSONL, its name must end with .jsonl")
    items, labels = _items(importer, annotations, _wanted(name, importer, split, fold))
    if only is not None:
        items = _chosen(items, only)
    if not items:
        raise ConfigError(f"{annotations}: no item of the split {split or importer.splits[0]!r}")
    files = _media_files(need_folder(media, "the folder of the media"), importer.medium)
    rows: list[dict[str, Any]] = []
    missing: list[str] = []
    doubtful: list[str] = []
    for item in items:
        found = next((files[file] for file in item.files if file in files), [])
        if found:
            rows.append(_row(item, found[0], out, split or (importer.splits or ("",))[0]))
        (missing if not found else doubtful if len(found) > 1 else []).append(item.id)
    if not rows:
        raise ConfigError(f"{media}: holds none of the {len(items)} items, such as {items[0].files[0]!r}")
    _write(out, (json.dumps(row, ensure_ascii=False) for row in rows))
    for kind, lines in (("missing", missing), ("classes", labels)):
        path = _beside(out, kind)
        if lines:
            _write(path, lines)
        else:
            path.unlink(missing_ok=True)  # of an earlier import
    return Imported(out, len(rows), tuple(missing), tuple(doubtful), len(labels))


def _wanted(name: str, importer: Importer, split: str, fold: int) -> Wanted:
    if split and split not in importer.splits:
        raise ConfigError(f"--split {split}: {name} has {', '.join(importer.splits) or 'no splits'}")
    if not 1 <= fold <= importer.folds:
        raise ConfigError(f"--fold {fold}: {name} has {importer.folds}")
    return Wanted(split or (importer.splits or ("",))[0], fold)


def _items(importer: Importer, annotations: Path, wanted: Wanted) -> tuple[list[Item], list[str]]:
    """Those of the split, and the names of all classes."""
    everything = list(importer.read(annotations, wanted))
    names = importer.classes(annotations) if importer.classes else sorted({each.label for each in everything} - {""})
    return [item for item in everything if item.split in ("", wanted.split)], names


def _chosen(items: list[Item], only: Path) -> list[Item]:
    by_name = {name: item for item in items for name in (item.id, Path(item.id).stem)}
    chosen: dict[str, Item] = {}
    unknown = []
    for line, text in lines_of(only, "a list of items"):
        first = text.replace(",", " ").split()[0]
        if first in by_name:
            chosen[first] = by_name[first]
        elif line > 1:  # the first may be a header
            unknown.append(f"{first} (line {line})")
    if unknown:
        raise ConfigError(f"--only {only}: {_some(unknown)}: not in the annotations of this split")
    return list(chosen.values())


def _media_files(folder: Path, medium: str) -> dict[str, list[Path]]:
    """By name, with and without extension: files of the wanted medium first, then by path."""
    found: dict[str, list[Path]] = {}
    paths = []
    for path in folder.rglob("*"):
        role = ROLES.get(path.suffix[1:].lower())
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if role in ("video", "audio", "image") and not hidden and path.is_file():
            paths.append((role != medium, path.as_posix(), path))
    for other, _, path in sorted(paths):
        for name in (path.name, path.stem):
            places = found.setdefault(name, [])
            if not other or not places or ROLES[places[0].suffix[1:].lower()] != medium:
                places.append(path)
    return found


def _row(item: Item, path: Path, out: Path, split: str) -> dict[str, Any]:
    row: dict[str, Any] = {"path": os.path.relpath(path, out.parent), "item": item.id, **item.facts}
    given = {
        "captions": list(item.captions),
        "label": item.label,
        "group": item.group,
        "split": split,
    }
    return row | {name: value for name, value in given.items() if value not in ("", [])}


def _beside(out: Path, kind: str) -> Path:
    return out.with_suffix(f".{kind}.txt")


def _write(path: Path, lines: Iterable[str]) -> None:
    write_file(str(path), "".join(f"{line}\n" for line in lines).encode("utf-8", "replace"))


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    more = f" and {len(listed) - _NAMED} more" if len(listed) > _NAMED else ""
    return f"{len(listed)}, {', '.join(listed[:_NAMED])}{more}" if len(listed) > 1 else listed[0]
