"""``RetrievalReport``: retrieval in every direction, in one or several lists, and its three files."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from mmcl.distributed import Comm
from mmcl.evaluation.best import ranks_by_best
from mmcl.evaluation.bootstrap import bootstrap_ci
from mmcl.evaluation.diagnostics import hubness, modality_figures, pair_figures
from mmcl.evaluation.distinct import Floats, Integers, distinct_rows
from mmcl.evaluation.gallery import Showable
from mmcl.evaluation.pages import write_files
from mmcl.evaluation.ranking import RankResult, ranks_both
from mmcl.evaluation.transductive import Method, transductive_ranks
from mmcl.types import ConfigError, Modality

COMPARED = ("R@1", "R@5", "R@10", "R@50", "mAP@10", "nDCG@10")
"""figures that a report keeps query by query"""


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
    groups: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """the same figures of the queries of each group, in the whole gallery"""
    transductive: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """by method: figures of scores that other queries changed, see ``transductive_ranks``"""

    @property
    def name(self) -> str:
        return f"{self.query}->{self.gallery}"

    def as_json(self) -> dict[str, Any]:
        further = {"groups": self.groups, "transductive": self.transductive}
        return {
            **self.metrics,
            "ci95": {name: list(bounds) for name, bounds in self.ci95.items()},
            **{name: {key: dict(value) for key, value in each.items()} for name, each in further.items() if each},
        }


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
    diagnostics: Mapping[str, Mapping[str, Mapping[str, Any]]] = field(default_factory=dict)
    """``modalities``, ``pairs`` and ``directions``: by name, their figures"""
    duplicates: Mapping[Modality, int] = field(default_factory=dict)
    """how many items have a row that equals one of another item, by modality, and under ``media`` how many have the
    same media; none where there are none"""

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
    """of protocol and gallery, see :func:`mmcl.evaluation.protocols.fingerprint`"""
    lists: tuple[ListResult, ...]
    note: str = ""
    """one or two sentences about the data, shown at the top"""
    facts: Mapping[str, str] = field(default_factory=dict)
    """further lines for people, e.g. the checkpoint: name → value"""
    keys: Sequence[str] = ()
    """of the items, by which a later report finds its queries again"""
    against: Mapping[str, Any] = field(default_factory=dict)
    """the outcome of :func:`~mmcl.evaluation.against.compare` with an older report, by list and direction"""
    asked: Mapping[str, Any] = field(default_factory=dict)
    """the protocol as data, all that figures depend on"""
    right: str = ""
    """what counts as a right answer, as the end of a sentence; default: the query's own clip, or one of its label"""
    title: str = ""
    """for people: what was searched with which checkpoint; default: the protocol"""

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
                "duplicates": dict(result.duplicates),
                "diagnostics": {name: dict(each) for name, each in result.diagnostics.items()},
                **({"queries": self._query_names(result)} if self.keys else {}),
                "ranks": {
                    name: _or_null(direction.ranks.expected_rank) for name, direction in result.directions.items()
                },
                "per_query": {
                    name: {figure: _or_null(direction.ranks.per_query[figure]) for figure in COMPARED}
                    for name, direction in result.directions.items()
                },
            }
            for result in self.lists
        }
        return {
            "title": self.title or self.protocol,
            "protocol": self.protocol,
            "fingerprint": self.fingerprint,
            **({"asked": dict(self.asked)} if self.asked else {}),
            "note": self.note,
            "facts": dict(self.facts),
            "directions": lists[self.headline.name]["directions"],
            "lists": lists,
            **({"against": dict(self.against)} if self.against else {}),
        }

    def _query_names(self, result: ListResult) -> dict[Modality, list[str]]:
        """The key of each row, and which caption it is."""
        return {
            modality: [f"{self.keys[int(item)]}#{rows.caption(row)}" for row, item in enumerate(rows.items)]
            for modality, rows in result.rows.items()
        }


def _or_null(values: Floats) -> list[float | None]:
    return [None if np.isnan(value) else round(float(value), 6) for value in values]


def evaluate_list(
    name: str,
    rows: Mapping[Modality, ModalityRows],
    *,
    labels: Integers | None = None,
    items: Sequence[int] | Integers | None = None,
    title: str = "",
    seed: int = 0,
    groups: Sequence[str | None] | None = None,
    post: Sequence[Method] = (),
    banks: Mapping[Modality, Tensor] | None = None,
    directions: Sequence[str] | None = None,
    best_text: bool = False,
    media: Sequence[str | None] | None = None,
    comm: Comm | None = None,
) -> ListResult:
    """Retrieval between the modalities of ``rows``, or between sets of them that have a row there (``video+audio``).

    A gallery row is right for a query row that shows the same item, or, where ``labels`` are given (one per item of the
    report), an item of the same label. A query with no right row in the gallery, such as the caption of a silent clip
    in ``text->audio``, is left out of that direction and counted as ``unanswerable``. Directions with no answerable
    query, or with an empty side, are left out.

    Args:
        items: all items of the list, where some may have no row at all; default: those that have one.
        seed: of the bootstrap.
        groups: a name per item of the report: the figures of the queries of each, besides; None: of no group.
        post: transductive methods, in figures of their own.
        banks: rows of training queries by modality, for QB-norm in directions that these ask.
        directions: which, in this order; default: every ordered pair, in the order of ``rows``.
        best_text: texts are searched item by item, each scoring as the best of its captions.
        media: per item of the report what tells its media from others; equal ones are counted.
        comm: all its processes call this with the same arguments, share the work and return the same.

    Raises:
        ConfigError: nothing to rank in any direction, or rows that do not fit each other.
    """
    present = {modality: np.unique(values.items) for modality, values in rows.items()}
    union = np.unique(np.concatenate([*present.values(), np.asarray([] if items is None else items, np.int64)]))
    found: dict[str, DirectionResult] = {}
    both_ways = [f"{a}->{b}" for pair in itertools.combinations(rows, 2) for a, b in (pair, pair[::-1])]
    wanted = both_ways if directions is None else list(directions)
    pairs: dict[str, Any] = {}
    for first, second in itertools.combinations(rows, 2):
        asked = {f"{first}->{second}", f"{second}->{first}"} & {*wanted}
        if not asked or not len(rows[first].items) or not len(rows[second].items):
            continue
        right = _same(rows[first], rows[second], labels)
        both = ranks_both(rows[first].embeddings, rows[second].embeddings, right, comm=comm)
        if any(len(each) for each in right):
            pairs[f"{first}-{second}"] = pair_figures(rows[first].embeddings, rows[second].embeddings, right)
        for query, gallery, result in ((first, second, both[0]), (second, first, both[1])):
            if f"{query}->{gallery}" not in asked:
                continue
            by_best = best_text and gallery == "text"
            if by_best:
                result = _by_best(rows[query], rows[gallery], labels, comm)
            if not result.answerable.any():
                continue
            methods = () if by_best else [each for each in post if each != "qb_norm" or query in (banks or {})]
            direction = DirectionResult(
                query,
                gallery,
                result.metrics(),
                bootstrap_ci(result, seed=seed),
                result,
                _by_group(result, rows[query], groups),
                _corrected(rows[query], rows[gallery], labels, methods, (banks or {}).get(query), comm),
            )
            found[direction.name] = direction
    if not found:
        raise ConfigError(f"list {name}: no two modalities share an item, there is nothing to retrieve")
    ordered = {each: found[each] for each in wanted if each in found}
    missing = {modality: len(union) - len(have) for modality, have in present.items() if len(have) < len(union)}
    filled = {modality: values for modality, values in rows.items() if len(values.items)}
    diagnostics = {
        "modalities": {
            side: modality_figures(values.embeddings, values.items if labels is None else labels[values.items])
            for side, values in filled.items()
        },
        "pairs": pairs,
        "directions": {each.name: {"hubness": _hubness(each, rows)} for each in ordered.values()},
    }
    twice = {modality: count for modality, values in filled.items() if (count := _duplicates(values))}
    if media is not None and (same := _equal([media[item] for item in union])):
        twice["media"] = same
    title = title or name.replace("_", "-")
    return ListResult(name, dict(rows), ordered, len(union), missing, labels, title, diagnostics, twice)


def _by_group(
    result: RankResult, rows: ModalityRows, groups: Sequence[str | None] | None
) -> dict[str, dict[str, float]]:
    members: dict[str, list[int]] = {}
    for row in np.flatnonzero(result.answerable) if groups is not None else ():
        group = groups[int(rows.items[row])] if groups is not None else None
        if group is not None:
            members.setdefault(group, []).append(int(row))
    return {group: result.of(np.array(members[group])).metrics() for group in sorted(members)}


def _corrected(
    queries: ModalityRows,
    gallery: ModalityRows,
    labels: Integers | None,
    methods: Sequence[Method],
    bank: Tensor | None,
    comm: Comm | None,
) -> dict[str, dict[str, float]]:
    """The figures of each transductive method that was asked for."""
    right = _same(queries, gallery, labels) if methods else []
    return {
        method: transductive_ranks(
            queries.embeddings,
            gallery.embeddings,
            right,
            method=method,
            bank=bank if method == "qb_norm" else None,
            comm=comm,
        ).metrics()
        for method in methods
    }


def _by_best(queries: ModalityRows, gallery: ModalityRows, labels: Integers | None, comm: Comm | None) -> RankResult:
    right = _same(queries, gallery, labels)
    return ranks_by_best(queries.embeddings, gallery.embeddings, right, gallery.items, comm=comm)


def _hubness(direction: DirectionResult, rows: Mapping[Modality, ModalityRows]) -> float:
    """Of items, where each is one answer by the best of its rows."""
    result, shown = direction.ranks, rows[direction.gallery].items
    if result.gallery < len(shown):
        result = replace(result, top_indices=np.unique(shown, return_inverse=True)[1][result.top_indices])
    return hubness(result)


def _equal(names: Sequence[str | None]) -> int:
    """How many of the names come more than once; None is equal to nothing."""
    counts = Counter(name for name in names if name is not None)
    return sum(count for count in counts.values() if count > 1)


def _duplicates(rows: ModalityRows) -> int:
    """Items with a row that equals a row of another item, bit for bit."""
    kinds = distinct_rows(rows.embeddings)[1].cpu().numpy()
    shown = np.unique(np.stack([kinds, np.asarray(rows.items)], 1), axis=0)
    _, place, counts = np.unique(shown[:, 0], return_inverse=True, return_counts=True)
    return len(np.unique(shown[counts[place] > 1, 1]))


def _same(queries: ModalityRows, gallery: ModalityRows, labels: Integers | None) -> list[Integers]:
    """For each query row the gallery rows of its item, or of its label."""
    left = np.asarray(queries.items) if labels is None else np.asarray(labels)[queries.items]
    right = np.asarray(gallery.items) if labels is None else np.asarray(labels)[gallery.items]
    order = np.argsort(right, kind="stable")
    starts = np.searchsorted(right[order], left, side="left")
    stops = np.searchsorted(right[order], left, side="right")
    return [order[start:stop] for start, stop in zip(starts, stops, strict=True)]


def write_report(report: RetrievalReport, items: Sequence[Showable], out_folder: str | Path) -> Path:
    """Writes ``report.html``, ``report.md`` and, last, ``report.json``; returns the path of the HTML file.

    Each file appears under its name when it is complete. ``ModalityRows.items`` are positions in ``items``.

    Raises:
        RunError: the folder cannot be written.
        ConfigError: a row names an item that does not exist.
    """
    from mmcl.evaluation.template import render

    for result in report.lists:
        for modality, rows in result.rows.items():
            if len(rows.items) and not 0 <= np.min(rows.items) <= np.max(rows.items) < len(items):
                raise ConfigError(f"list {result.name}: rows of {modality} name items beyond the {len(items)} given")
    html, markdown = render(report, items)
    return write_files(out_folder, html, markdown, report.as_json())
