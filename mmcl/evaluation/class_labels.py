"""Classes of samples: their names, as shards carry them, and as sentences speak of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmcl.evaluation.embedding_store import EmbeddedItem, EmbeddedShards
from mmcl.types import ConfigError, Modality

COLUMN = "label_name"
"""where ``mmcl shards make`` notes labels that are words"""


def item_classes(item: EmbeddedItem, column: str = COLUMN) -> tuple[str, ...]:
    """The classes of a sample: its metadata ``column``, a name or a list of them, else its label as a number."""
    value: Any = item.metadata.get(column)
    if value is None and column == COLUMN and item.label >= 0:
        value = item.label
    values = value if isinstance(value, list) else [value]
    return tuple(dict.fromkeys(str(each) for each in values if isinstance(each, (str, int)) and str(each).strip()))


@dataclass(frozen=True, eq=False)
class Labelled:
    """The rows of a modality whose samples have classes."""

    rows: Tensor
    """float32 ``(n, D)`` or ``(n, views, D)``"""
    items: tuple[EmbeddedItem, ...]
    """one per row"""
    classes: tuple[tuple[str, ...], ...]
    """names, one or several per row"""

    def to(self, device: torch.device) -> Labelled:
        """The same with its rows on a device."""
        return replace(self, rows=self.rows.to(device))

    @property
    def several(self) -> bool:
        """Whether a sample has more than one class."""
        return any(len(each) > 1 for each in self.classes)

    def names(self) -> list[str]:
        """All classes, numbers in their order before words in theirs."""
        return sorted({name for each in self.classes for name in each}, key=_order)

    def labels(self, names: Sequence[str]) -> Tensor:
        """int64 ``(n,)``: the number of each row's first class among ``names``."""
        number = {name: place for place, name in enumerate(names)}
        return torch.tensor([number[each[0]] for each in self.classes], dtype=torch.int64, device=self.rows.device)

    def relevant(self, names: Sequence[str]) -> Tensor:
        """bool ``(n, C)``: all classes of each row."""
        number = {name: place for place, name in enumerate(names)}
        found = torch.zeros(len(self.classes), len(names), dtype=torch.bool)
        for row, each in enumerate(self.classes):
            found[row, [number[name] for name in each]] = True
        return found.to(self.rows.device)


def _order(name: str) -> tuple[bool, int, str]:
    number = name.isascii() and name.isdigit() and len(name) < 20
    return not number, int(name) if number else 0, name


def labelled(embedded: EmbeddedShards, modality: Modality, shards: str, column: str = COLUMN) -> Labelled:
    """The labelled rows of a modality, or of a set such as ``video+audio`` of the samples that have all of it.

    Raises:
        ConfigError: no sample has a label, or none of those has the modality.
    """
    classes = [item_classes(item, column) for item in embedded.items]
    if not any(classes):
        known = sorted({name for item in embedded.items for name in item.metadata})
        raise ConfigError(
            f"{shards}: no sample has a class: neither a label nor {column!r} in its metadata, which has: "
            f"{', '.join(known) or 'nothing'}"
        )
    parts = modality.split("+")
    for part in parts:
        if part not in embedded.rows or part == "text":
            known = [name for name in embedded.rows if name != "text"]
            raise ConfigError(f"modality {part}: the model embeds {', '.join(known)}")
    places = [
        dict(zip(embedded.owners[part].tolist(), range(len(embedded.owners[part])), strict=True)) for part in parts
    ]
    wanted = [number for number, each in enumerate(classes) if each and all(number in place for place in places)]
    if not wanted:
        raise ConfigError(f"{shards}: no sample with a class has {modality}")
    rows = [
        embedded.rows[part][[place[number] for number in wanted]] for part, place in zip(parts, places, strict=True)
    ]
    return Labelled(
        _together(rows), tuple(embedded.items[number] for number in wanted), tuple(classes[number] for number in wanted)
    )


def _together(rows: list[Tensor]) -> Tensor:
    """Several modalities as one: the unit mean of unit rows, each of its views first; else side by side."""
    if len(rows) == 1:
        return rows[0]
    flat = [each if each.ndim == 2 else each.mean(1) for each in rows]
    unit = [torch.nn.functional.normalize(each, dim=-1) for each in flat]
    if len({each.shape[1] for each in flat}) > 1:
        return torch.cat(unit, 1)
    return torch.nn.functional.normalize(torch.stack(unit).mean(0), dim=-1)


def check_classes(found: Labelled, shards: str) -> None:
    """Raises ``ConfigError`` where all samples are of one class."""
    names = found.names()
    if len(names) < 2:
        raise ConfigError(f"{shards}: all {len(found.items)} labelled samples are of one class, {names[0][:80]!r}")


def read_class_names(path: Path) -> list[str]:
    """Class names of a file: a line each, or ``{"classes": […]}`` as ``labels.json`` of ``mmcl shards make`` has it.

    Raises:
        ConfigError: it cannot be read, holds fewer than two names, or one twice.
    """
    text = _read(path, "--classes")
    if path.suffix == ".json":
        try:
            found = json.loads(text)["classes"]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise ConfigError(f'--classes {path}: not {{"classes": […]}}') from None
    else:
        found = [line.strip() for line in text.splitlines() if line.strip()]
    if not isinstance(found, list) or not all(isinstance(name, str) and name for name in found) or len(found) < 2:
        raise ConfigError(f"--classes {path}: at least two names are needed, a line each")
    twice = next((name for place, name in enumerate(found) if name in found[:place]), None)
    if twice is not None:
        raise ConfigError(f"--classes {path}: {twice[:80]!r} stands there twice")
    return found


def read_prompts(given: Sequence[str]) -> list[str]:
    """Prompts as they are, or of files, a line each.

    Raises:
        ConfigError: a file cannot be read, or a prompt does not hold ``{}`` exactly once.
    """
    prompts: list[str] = []
    for text in given:
        inline = "{}" in text
        lines = [text] if inline else _read(Path(text), "--prompts").splitlines()
        prompts += [line.strip() for line in lines if line.strip()]
    wrong = next((prompt for prompt in prompts if prompt.count("{}") != 1), None)
    if wrong is not None or not prompts:
        raise ConfigError(
            f"--prompts: {(wrong or '')[:80]!r} does not hold {{}}, where the class name goes, exactly once"
        )
    return prompts


def _read(path: Path, option: str) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{option} {path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None


def spoken_names(names: Sequence[str], given: Sequence[str], shards: str) -> tuple[list[str], list[str]]:
    """(all classes as shards name them, the same as sentences speak of them).

    Without ``given`` these are the classes that occur, ``_`` read as a blank. Numbers are places in ``given``.

    Raises:
        ConfigError: a class that ``given`` does not have, or numbers that nothing names.
    """
    numbers = all(name.isascii() and name.isdigit() for name in names)
    if not given:
        if numbers:
            raise ConfigError(f"{shards}: labels are numbers; name them: --classes FILE, line i for label i, from 0 on")
        return list(names), [name.replace("_", " ") for name in names]
    labels = list(given)
    if numbers and not set(names) <= set(given):
        labels = [str(place) for place in range(len(given))]
    unknown = sorted(set(names) - set(labels))
    if unknown:
        raise ConfigError(f"{shards}: class {unknown[0][:80]!r} is none of the {len(given)} classes that are named")
    return labels, [name.replace("_", " ") for name in given]
