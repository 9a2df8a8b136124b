"""``RetrievalReport``: retrieval in every direction, in one or several lists, and its three files."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from mmcl.evaluation.bootstrap import bootstrap_ci
from mmcl.evaluation.gallery import GalleryItem
from mmcl.evaluation.ranking import Integers, RankResult, ranks
from mmcl.types import ConfigError, Modality, RunError

COLUMNS = ("R@1", "R@5", "R@10", "MedR", "MnR", "mAP@10", "nDCG@10", "queries", "gallery", "ties")
COUNTS = ("queries", "gallery", "ties", "unanswerable")


@dataclass(frozen=True, eq=False)
class ModalityRows:
    """The embedded rows of one modality: several rows of one item are several captions (or views) of it."""

    embeddings: Tensor
    """``(n, D)``, unit rows"""
    items: Integers
    """``(n,)``: the number of the item that each row shows, into the report's sequence of items"""
    captions: Integers | None = None
    """``(n,)``: which of its captions, for rows of text; None: the first"""

    def __post_init__(self) -> None:
        rows = len(self.embeddings)
        for name, numbers in (("items", self.items), ("captions", self.captions)):
            if numbers is not None and np.shape(numbers) != (rows,):
                raise ConfigError(f"{name} has shape {np.shape(numbers)} for {rows} embedded rows")

    def caption(self, row: int) -> int:
        """Which caption of its item the row shows."""
        return 0 if self.captions is None else int(self.captions[row])


@dataclass(frozen=True, eq=False)
class DirectionResult:
    """One direction of retrieval, such as ``text->video``: text is the query, videos are searched."""

    query: Modality
    gallery: Modality
    metrics: Mapping[str, float]
    """as ``retrieval_metrics``"""
    ci95: Mapping[str, tuple[float, float]]
    ranks: RankResult

    @property
    def name(self) -> str:
        return f"{self.query}->{self.gallery}"

    def as_json(self) -> dict[str, Any]:
        return {**self.metrics, "ci95": {name: list(bounds) for name, bounds in self.ci95.items()}}


@dataclass(frozen=True, eq=False)
class ListResult:
    """One list of items (``known``, ``zero_shot``, …) searched in every direction; a list is its own gallery."""

    name: str
    rows: Mapping[Modality, ModalityRows]
    directions: Mapping[str, DirectionResult]
    items: int
    missing: Mapping[Modality, int]
    """how many of the items have no row of this modality; modalities that all items have are left out"""
    labels: Integers | None = None
    """one per item of the report: a gallery row is right where its label is the query's; None: the item itself"""
    title: str = ""
    """for people; default: the name"""

    def is_right(self, direction: DirectionResult, query_row: int, gallery_row: int) -> bool:
        """Whether the gallery row is a right answer to the query row."""
        left = self.rows[direction.query].items[query_row]
        right = self.rows[direction.gallery].items[gallery_row]
        return bool(left == right if self.labels is None else self.labels[left] == self.labels[right])


@dataclass(frozen=True, eq=False)
class RetrievalReport:
    """What an evaluation found. The first list is the headline."""

    protocol: str
    fingerprint: str
    """of protocol and gallery, see :func:`fingerprint`"""
    lists: tuple[ListResult, ...]
    note: str = ""
    """one or two sentences about the data, shown at the top"""
    facts: Mapping[str, str] = field(default_factory=dict)
    """further lines for people, e.g. the checkpoint: name → value"""
    right: str = ""
    """what counts as a right answer, as the end of a sentence; default: the query's own clip, or one of its label"""

    def __post_init__(self) -> None:
        if not self.lists:
            raise ConfigError("a report needs at least one list")
        names = [result.name for result in self.lists]
        if len(set(names)) < len(names):
            raise ConfigError(f"two lists of a report have one name: {names}")

    @property
    def headline(self) -> ListResult:
        return self.lists[0]

    def as_json(self) -> dict[str, Any]:
        """What ``report.json`` holds; ``ranks`` are the expected ranks query by query, null for unanswerable ones."""
        lists = {
            result.name: {
                "directions": {name: direction.as_json() for name, direction in result.directions.items()},
                "items": result.items,
                "missing": dict(result.missing),
                "ranks": {
                    name: [None if np.isnan(rank) else float(rank) for rank in direction.ranks.expected_rank]
                    for name, direction in result.directions.items()
                },
            }
            for result in self.lists
        }
        return {
            "protocol": self.protocol,
            "fingerprint": self.fingerprint,
            "note": self.note,
            "facts": dict(self.facts),
            "directions": lists[self.headline.name]["directions"],
            "lists": lists,
        }


def fingerprint(protocol: Mapping[str, Any], keys: Sequence[str]) -> str:
    """Sixteen hex digits of the SHA-256 of a protocol (anything JSON can hold) and the keys of its items, in order."""
    text = json.dumps([protocol, list(keys)], sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def evaluate_list(
    name: str,
    rows: Mapping[Modality, ModalityRows],
    *,
    labels: Integers | None = None,
    items: Sequence[int] | Integers | None = None,
    title: str = "",
    seed: int = 0,
) -> ListResult:
    """Retrieval in every ordered pair of the modalities of ``rows``, in their order.

    A gallery row is right for a query row that shows the same item, or, where ``labels`` are given (one per item of the
    report), an item of the same label. A query with no right row in the gallery, such as the caption of a silent clip
    in ``text->audio``, is left out of that direction and counted as ``unanswerable``. Directions with no answerable
    query, or with an empty side, are left out.

    Args:
        items: all items of the list, where some may have no row at all; default: those that have one.
        seed: of the bootstrap.

    Raises:
        ConfigError: nothing to rank in any direction, or rows that do not fit each other.
    """
    present = {modality: np.unique(values.items) for modality, values in rows.items()}
    union = np.unique(np.concatenate([*present.values(), np.asarray([] if items is None else items, np.int64)]))
    directions: dict[str, DirectionResult] = {}
    for first, second in itertools.combinations(rows, 2):
        for query, gallery in ((first, second), (second, first)):
            if not len(rows[query].items) or not len(rows[gallery].items):
                continue
            result = ranks(rows[query].embeddings, rows[gallery].embeddings, _same(rows[query], rows[gallery], labels))
            if result.answerable.any():
                direction = DirectionResult(query, gallery, result.metrics(), bootstrap_ci(result, seed=seed), result)
                directions[direction.name] = direction
    if not directions:
        raise ConfigError(f"list {name}: no two modalities share an item, there is nothing to retrieve")
    missing = {modality: len(union) - len(have) for modality, have in present.items() if len(have) < len(union)}
    return ListResult(name, dict(rows), directions, len(union), missing, labels, title or name.replace("_", "-"))


def _same(queries: ModalityRows, gallery: ModalityRows, labels: Integers | None) -> list[Integers]:
    """For each query row the gallery rows of its item, or of its label."""
    left = np.asarray(queries.items) if labels is None else np.asarray(labels)[queries.items]
    right = np.asarray(gallery.items) if labels is None else np.asarray(labels)[gallery.items]
    order = np.argsort(right, kind="stable")
    starts = np.searchsorted(right[order], left, side="left")
    stops = np.searchsorted(right[order], left, side="right")
    return [order[start:stop] for start, stop in zip(starts, stops, strict=True)]


def table(result: ListResult) -> list[list[str]]:
    """The figures of a list for people: a row per direction, its name first, then :data:`COLUMNS`."""
    return [
        [direction.name, *(_cell(direction, column) for column in COLUMNS)] for direction in result.directions.values()
    ]


def _cell(direction: DirectionResult, column: str) -> str:
    value = direction.metrics[column]
    if column in COUNTS:
        return str(int(value))
    if column == "R@1":
        low, high = direction.ci95[column]
        return f"{value:.1f} ({low:.1f}–{high:.1f})"
    return f"{value:.1f}" if value < 1e5 else f"{value:.3g}"


def missing_lines(result: ListResult) -> list[str]:
    """A sentence for each modality that some items lack."""
    words = {"audio": "sound", "video": "picture", "text": "caption"}
    return [
        f"{count} of {result.items} clips {'has' if count == 1 else 'have'} no {words.get(modality, modality)}: "
        f"left out of {modality} directions."
        for modality, count in result.missing.items()
    ]


def markdown(report: RetrievalReport) -> str:
    """The report for a pull request: a table per list."""
    lines = [f"# Retrieval report: {_plain(report.protocol)}", ""]
    if report.note:
        lines += [_plain(report.note), ""]
    for result in report.lists:
        lines += [f"## {_plain(result.title)}", "", "| " + " | ".join(["direction", *COLUMNS]) + " |"]
        lines.append("| --- |" + " ---: |" * len(COLUMNS))
        lines += ["| " + " | ".join(_plain(cell) for cell in row) + " |" for row in table(result)]
        lines += ["", f"{result.items} clips. " + " ".join(missing_lines(result)), ""]
    facts = {"fingerprint": report.fingerprint, **report.facts}
    lines += [f"- {_plain(name)}: {_plain(value)}" for name, value in facts.items()]
    lines += ["", "R@k, mAP@10, nDCG@10 in percent; R@1 with its 95 % bootstrap interval. Ties: expected values.", ""]
    return "\n".join(lines)


def _plain(text: str) -> str:
    """One line of Markdown that means nothing but itself."""
    line = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;")
    return "".join("\\" + letter if letter in "\\|`*_[]" else letter for letter in line)


def write_report(report: RetrievalReport, items: Sequence[GalleryItem], out_folder: str | Path) -> Path:
    """Writes ``report.html``, ``report.md`` and, last, ``report.json``; returns the path of the HTML file.

    Each file appears under its name when it is complete. ``ModalityRows.items`` are positions in ``items``.

    Raises:
        RunError: the folder cannot be written.
        ConfigError: a row names an item that does not exist.
    """
    from mmcl.evaluation.template import render_html

    for result in report.lists:
        for modality, rows in result.rows.items():
            if len(rows.items) and not 0 <= np.min(rows.items) <= np.max(rows.items) < len(items):
                raise ConfigError(f"list {result.name}: rows of {modality} name items beyond the {len(items)} given")
    folder = Path(out_folder)
    files = {
        "report.html": render_html(report, items),
        "report.md": markdown(report),
        "report.json": json.dumps(report.as_json(), ensure_ascii=True, allow_nan=False) + "\n",
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            _write_atomically(folder / name, text)
    except OSError as error:
        raise RunError(f"cannot write the report to {folder}: {error.strerror or error}") from error
    return folder / "report.html"


def _write_atomically(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8", errors="replace", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
