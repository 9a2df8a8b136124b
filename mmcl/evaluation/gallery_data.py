"""The gallery of a report as JSON: all queries, what they found, and the media that the page's budget has room for.

Text comes first, then stills, then clips and sounds, each in the order in which the page shows them: the worst queries
of every direction, a random draw of all, and the hubs, in turns. What finds no room is named in its item's ``left``.
"""

from __future__ import annotations

import base64
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np

from mmcl.evaluation.diagnostics import OCCURRENCE_RANKS, occurrences
from mmcl.evaluation.distinct import Integers
from mmcl.evaluation.gallery import CLIP_BYTES, PICTURE_BYTES, SOUND_BYTES, Showable
from mmcl.evaluation.pages import json_in_html
from mmcl.evaluation.report import DirectionResult, ListResult, RetrievalReport
from mmcl.progress import show_progress
from mmcl.types import Modality

GALLERY_BYTES = 12 << 20
"""all of the gallery's JSON stays below this"""
TEXT_BYTES = 4 << 20
"""what is not media of it: kept by listing fewer queries"""
STILL_BYTES = 4 << 20
"""posters and waveforms, as they stand in the page; clips and sounds have the rest"""
QUERIES = (5000, 2000, 1000, 500, 200, 50, 12, 4, 1)
"""queries listed of each direction: the first number that keeps the text small enough"""
CAPTION_LETTERS = 280
"""longer captions are cut on the page"""
HUBS = 30
HUB_QUERIES = 5
"""queries shown with a hub"""
TOP = 5
_KINDS = {"video": ("poster", "clip"), "audio": ("waveform", "sound")}
_LARGEST = {"poster": PICTURE_BYTES, "waveform": PICTURE_BYTES, "clip": CLIP_BYTES, "sound": SOUND_BYTES}

Shown: TypeAlias = tuple[int, Modality]
"""an item, as what"""


def gallery_json(report: RetrievalReport, items: Sequence[Showable]) -> str:
    """The JSON, safe inside a script element; numbers in ``ModalityRows.items`` are positions in ``items``."""
    for count in QUERIES:
        built = _Gallery(items)
        data = built.of(report, count)
        text = len(json_in_html(data))
        if text <= TEXT_BYTES:
            break
    built.add_media(text)
    return json_in_html(data)


class _Gallery:
    """Collects the items that the listed queries need, each once."""

    def __init__(self, items: Sequence[Showable]) -> None:
        self._source = items
        self._items: dict[int, dict[str, Any]] = {}
        self._orders: list[list[Shown]] = []

    def of(self, report: RetrievalReport, count: int) -> dict[str, Any]:
        """All but the media, with at most ``count`` queries of each direction."""
        lists = []
        for result in report.lists:
            rows = _Rows(self, result)
            directions = [self._direction(result, direction, rows, count) for direction in result.directions.values()]
            lists.append({"title": result.title, "rows": rows.shown, "directions": directions})
        limits = {"gallery": GALLERY_BYTES, "clip": CLIP_BYTES, "sound": SOUND_BYTES}
        return {"items": self._items, "lists": lists, "k": OCCURRENCE_RANKS, "limits": limits}

    def _direction(self, result: ListResult, direction: DirectionResult, rows: _Rows, count: int) -> dict[str, Any]:
        worst = worst_first(direction)
        answerable = len(worst)
        if answerable > count:  # half of them the worst, the others drawn from the rest
            rest = np.random.default_rng(0).permutation(worst[count // 2 :])[: count - count // 2]
            worst = worst[np.isin(worst, np.r_[worst[: count // 2], rest])]
        queries = [_query(result, direction, int(row), rows) for row in worst]
        shuffled = np.random.default_rng(0).permutation(len(worst)).tolist()
        hubs = _hubs(result, direction, rows)
        seen = [rows.seen(direction, query) for query in queries]
        found_by = [[(hub[0], direction.gallery), *((row, direction.query) for row in hub[2])] for hub in hubs]
        turns = itertools.zip_longest(
            seen, [seen[place] for place in shuffled], [rows.items(each) for each in found_by]
        )
        self._orders.append([shown for turn in turns for each in turn if each for shown in each])
        return {
            "query": direction.query,
            "gallery": direction.gallery,
            "size": direction.ranks.gallery,
            "asked": answerable,
            "queries": queries,
            "shuffled": shuffled,
            "hubs": hubs,
        }

    def note(self, number: int, caption: int) -> None:
        """Takes an item up, with what the page says of it."""
        item = self._source[number]
        entry = self._items.setdefault(
            number, {"key": cut(item.key, 80), "captions": {}, "missing": list(item.missing)}
        )
        for index in {0, caption}:
            if index < len(item.captions):
                entry["captions"][str(index)] = cut(item.captions[index], CAPTION_LETTERS)

    def add_media(self, text: int) -> None:
        """Stills, then clips and sounds, as long as there is room; ``text`` letters of the page are taken."""
        order = list(dict.fromkeys(self._in_turn()))
        # whatever is left out is named: twenty letters for each of an item's four media at most
        room = GALLERY_BYTES - text - 20 * 4 * len(self._items)
        used = self._fill([(number, _KINDS[modality][0]) for number, modality in order], min(STILL_BYTES, room))
        moving = [(number, kind) for number, modality in order for kind in _moving(modality)]
        self._fill(list(dict.fromkeys(moving)), room - used)

    def _in_turn(self) -> Iterator[Shown]:
        for turn in itertools.zip_longest(*self._orders):
            for each in turn:
                if each is not None and each[1] in _KINDS:
                    yield each

    def _fill(self, wanted: Sequence[tuple[int, str]], room: int) -> int:
        """Puts media into their items until one finds no room: those after it are not even made."""
        used, full = 0, False
        with show_progress("report", "pictures and sounds") as show:
            for done, (number, kind) in enumerate(wanted, 1):
                entry = self._items[number]
                made = None if full else getattr(self._source[number], kind)
                show(done, len(wanted), "")
                if made is None and not full:
                    continue
                uri = "" if made is None or len(made) > _LARGEST[kind] else data_uri(made, kind)
                full = full or used + len(uri) > room
                if uri and not full:
                    entry[kind] = uri
                    used += len(uri) + len(kind) + 6
                else:
                    entry.setdefault("left", []).append(kind)
        return used


class _Rows:
    """Rows of one list under short numbers: ``shown[modality][number]`` is ``[item, caption]``."""

    def __init__(self, gallery: _Gallery, result: ListResult) -> None:
        self._gallery, self._result = gallery, result
        self._numbers: dict[tuple[Modality, int], int] = {}
        self.shown: dict[Modality, list[list[int]]] = {modality: [] for modality in result.rows}

    def number(self, modality: Modality, row: int) -> int:
        known = self._numbers.get((modality, row))
        if known is None:
            rows = self._result.rows[modality]
            item, caption = int(rows.items[row]), rows.caption(row)
            self._gallery.note(item, caption)
            known = self._numbers[modality, row] = len(self.shown[modality])
            self.shown[modality].append([item, caption])
        return known

    def items(self, numbers: Sequence[tuple[int, Modality]]) -> list[Shown]:
        return [(self.shown[modality][number][0], modality) for number, modality in numbers]

    def seen(self, direction: DirectionResult, query: list[Any]) -> list[Shown]:
        """Everything that is shown with a query."""
        found = [*query[4], *query[6:7]]
        return self.items([(query[0], direction.query), *((number, direction.gallery) for number in found)])


def _query(result: ListResult, direction: DirectionResult, row: int, rows: _Rows) -> list[Any]:
    """``[query, rank, tied wrong ones, bits of right answers, [found], [score × 100], right one, its score]``.

    The last two only where no right answer is among those found.
    """
    ranks = direction.ranks
    found = ranks.top_indices[row, :TOP].tolist()
    right = [result.is_right(direction, row, place) for place in found]
    query = [
        rows.number(direction.query, row),
        round(float(ranks.expected_rank[row]), 1),
        int(ranks.tied[row] - ranks.tied_relevant[row]),
        sum(1 << place for place, each in enumerate(right) if each),
        [rows.number(direction.gallery, place) for place in found],
        [round(100 * float(score)) for score in ranks.top_scores[row, :TOP]],
    ]
    if not any(right):
        query += [rows.number(direction.gallery, int(ranks.best_index[row])), round(100 * float(ranks.best_score[row]))]
    return query


def _hubs(result: ListResult, direction: DirectionResult, rows: _Rows) -> list[list[Any]]:
    """``[row, how often found, [queries that found it], bits of those it answers]``, the most found first."""
    ranks = direction.ranks
    counts = occurrences(ranks)
    order: Integers = np.argsort(-counts, kind="stable")[:HUBS]
    hubs = []
    for hub in order[counts[order] > 0].tolist():
        asked, place = np.nonzero(ranks.top_indices[:, :OCCURRENCE_RANKS] == hub)
        first = asked[np.lexsort((asked, place))][:HUB_QUERIES]
        queries = [rows.number(direction.query, int(row)) for row in first]
        bits = sum(1 << at for at, row in enumerate(first) if result.is_right(direction, int(row), hub))
        hubs.append([rows.number(direction.gallery, hub), int(counts[hub]), queries, bits])
    return hubs


def _moving(modality: Modality) -> tuple[str, ...]:
    """A frame moves and sounds; a waveform sounds."""
    return ("clip", "sound") if modality == "video" else ("sound",)


def worst_first(direction: DirectionResult) -> Integers:
    """The answerable queries, the worst first.

    Among queries of equal rank the score decides: how far the best right answer lies above the best other one, or,
    where it is not first, below the first.
    """
    ranks = direction.ranks
    rows = np.flatnonzero(ranks.answerable)
    first = ranks.top_scores[rows, 0]
    second = ranks.top_scores[rows, min(1, ranks.top_scores.shape[1] - 1)]
    best_score = ranks.best_score[rows]
    lead = best_score - np.where(best_score == first, second, first)
    return rows[np.lexsort((rows, lead, -ranks.expected_rank[rows]))]


def cut(text: str, letters: int) -> str:
    """``text`` on one line and at most ``letters`` long, an ellipsis where something was cut."""
    line = " ".join(text[: 4 * letters].split())
    return line if len(line) <= letters and len(text) <= 4 * letters else line[: letters - 1] + "…"


def data_uri(content: bytes, kind: str) -> str:
    """``data:`` with the type that the first bytes tell."""
    return f"data:{media_type(content, kind)};base64,{base64.b64encode(content).decode()}"


def media_type(content: bytes, kind: str) -> str:
    """The type that the first bytes tell."""
    known = {b"\xff\xd8\xff": "image/jpeg", b"\x89PN": "image/png", b"RIF": "image/webp", b"\x1a\x45\xdf": "audio/webm"}
    return known.get(content[:3], "audio/ogg" if kind == "sound" else "image/svg+xml")
