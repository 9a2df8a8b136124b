"""``report.html``: one self-contained page, made of ``page/page.html``, ``page.css`` and ``page.js``.

Tables and histograms are plain HTML and SVG. The gallery is JSON that the page's own script turns into elements, so
that each picture is embedded once and only the cards in view exist. The page forbids itself every request (its content
security policy), and nothing from a data set reaches it but escaped, or as JSON text.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from html import escape
from string import Template
from typing import Any

import numpy as np

from mmcl.evaluation.gallery import GalleryItem
from mmcl.evaluation.pages import Section, Table, json_in_html, markdown_page, page, plain
from mmcl.evaluation.report import DirectionResult, ListResult, RetrievalReport
from mmcl.evaluation.tables import COLUMNS, further_tables, missing_lines, table
from mmcl.types import Modality

GALLERY_BYTES = 8 << 20
"""the gallery of a page is kept below this: by fewer example queries, in the end by leaving pictures out"""
PICTURE_BYTES = 64 << 10
"""a larger picture is left out"""
CAPTION_LETTERS = 280
"""longer captions are cut on the page"""
EXAMPLES = (12, 8, 4, 2, 1)
"""queries shown of each kind (random, worst, best) and direction; the first number that keeps the page small enough"""
TOP = 5

_BUCKETS = (1, 2, 5, 10, 50, 500)
KIND = "Retrieval report"
_RIGHT = ("the query's own clip", "a clip with the label of the query")


_READING = Template("""<div class="columns">
<p><b>Directions.</b> <i>text → video</i>: a caption is the query, videos are searched. <b>Right</b> is $right.</p>
<p><b>R@k</b> is the share of queries, in percent, with a right answer among the first k; the small figures are its
95&nbsp;% bootstrap interval. <b>MedR</b> and <b>MnR</b> are the median and mean rank of the best right answer: 1 is
perfect. <b>mAP@10</b> and <b>nDCG@10</b> also count how early all right answers come.</p>
<p><b>Ties.</b> Where several answers have exactly the same score, every figure is its average over all orders of them,
so a model that scores everything alike gets what guessing gets. <b>ties</b> counts the queries whose best right answer
shares its score with a wrong one.</p>
</div>""")
_READING_MARKDOWN = (
    "R@k, mAP@10, nDCG@10 in percent; R@1 with its 95 % bootstrap interval. Ties: every figure is the average over all "
    "orders of equal scores. `text->video`: a caption is the query, videos are searched."
)
_GALLERY_HTML = """<noscript><p>The gallery needs JavaScript. The tables above do not.</p></noscript>
<form id="filters" class="filters"></form>
<p id="status" class="about" role="status"></p>
<div id="cards"></div>"""


def sections(report: RetrievalReport) -> list[Section]:
    """The figures of every list, how to read them, and the place of the gallery."""
    lists = [
        Section(result.title, _list_html(report, result), _list_markdown(report, result), "list")
        for result in report.lists
    ]
    right = escape(report.right or _RIGHT[report.headline.labels is not None])
    return [
        *lists,
        Section("How to read this", _READING.substitute(right=right), _READING_MARKDOWN, "reading"),
        Section("Queries and what they found", _GALLERY_HTML, name="gallery"),
    ]


def render(report: RetrievalReport, items: Sequence[GalleryItem]) -> tuple[str, str]:
    """``report.html`` and ``report.md``; numbers in ``ModalityRows.items`` are positions in ``items``."""
    title, note, parts = report.title or report.protocol, report.note, sections(report)
    facts = {"protocol": report.protocol, **report.facts, "fingerprint": report.fingerprint}
    html = page(title, parts, kind=KIND, note=note, facts=facts, data=_payload(report, items))
    return html, markdown_page(title, parts, kind=KIND, note=note, facts=facts)


def _arrow(direction: DirectionResult) -> str:
    """``text → video``, never broken over lines."""
    return f"{escape(direction.query)}\u00a0→\u00a0{escape(direction.gallery)}"


def _list_html(report: RetrievalReport, result: ListResult) -> str:
    first = next(iter(result.directions.values())).ranks
    chance = 100 * first.relevant[first.answerable].mean() / first.gallery
    charts = "".join(_histogram(each) for each in result.directions.values())
    notes = "".join(f" {escape(line)}" for line in missing_lines(result))
    return (
        f'<p class="about">{result.items} clips. Guessing would reach R@1\u00a0≈\u00a0{chance:.1f}\u00a0%.{notes}</p>'
        f'{_table(result)}<h3>Where the right answer stands</h3><div class="charts">{charts}</div>'
        f"{''.join(each.html() for each in further_tables(report, result))}"
    )


def _list_markdown(report: RetrievalReport, result: ListResult) -> str:
    lines = [Table("", ("direction", *COLUMNS), tuple(map(tuple, table(result)))).markdown(), ""]
    lines += [f"{result.items} clips. " + " ".join(map(plain, missing_lines(result)))]
    for extra in further_tables(report, result):
        lines += ["", f"### {plain(extra.title)}", "", extra.markdown()]
    return "\n".join(lines)


def _table(result: ListResult) -> str:
    head = "".join(f'<th role="columnheader" scope="col">{escape(name)}</th>' for name in ("direction", *COLUMNS))
    body = []
    for direction, cells in zip(result.directions.values(), table(result), strict=True):
        first = f'<th role="rowheader" scope="row">{_arrow(direction)}</th>{_hit_cell(direction)}'
        rest = "".join(
            f'<td role="cell" data-label="{escape(name)}">{escape(cell)}</td>'
            for name, cell in zip(COLUMNS[1:], cells[2:], strict=True)
        )
        body.append(f'<tr role="row">{first}{rest}</tr>')
    return (
        f'<table role="table" class="figures"><caption class="hidden">{escape(result.title)}: every direction</caption>'
        f'<thead role="rowgroup"><tr role="row">{head}</tr></thead>'
        f'<tbody role="rowgroup">{"".join(body)}</tbody></table>'
    )


def _hit_cell(direction: DirectionResult) -> str:
    """R@1 as number, bar and interval."""
    value = direction.metrics["R@1"]
    low, high = direction.ci95["R@1"]
    return (
        f'<td role="cell" data-label="R@1" class="hit"><span class="value">{value:.1f}</span>'
        f'<span class="interval">{low:.1f}–{high:.1f}</span>'
        f'<svg class="bar" viewBox="0 0 100 8" preserveAspectRatio="none" aria-hidden="true">'
        f'<rect class="track" width="100" height="8" rx="1"/><rect class="fill" width="{value:.2f}" height="8" rx="1"/>'
        f'<rect class="whisker" x="{low:.2f}" y="3" width="{max(high - low, 0.6):.2f}" height="2"/></svg></td>'
    )


def _histogram(direction: DirectionResult) -> str:
    """Share of queries by the rank of their best right answer, as inline SVG."""
    ranks = direction.ranks.expected_rank[direction.ranks.answerable]
    size = direction.ranks.gallery
    bounds = [*(bound for bound in _BUCKETS if bound < size), size]
    counts = np.bincount(np.searchsorted(bounds, ranks), minlength=len(bounds))[: len(bounds)]
    shares = 100 * counts / len(ranks)
    labels = [str(high) if high == low else f"{low}–{high}" for low, high in _spans(bounds)]
    step = 300 / len(bounds)
    bars = []
    for place, (share, label) in enumerate(zip(shares, labels, strict=True)):
        x, height = 10 + place * step, 0.8 * share
        bars.append(
            f'<rect class="fill" x="{x + 3:.1f}" y="{100 - height:.1f}" width="{step - 6:.1f}" height="{height:.1f}"/>'
            f'<text class="tick" x="{x + step / 2:.1f}" y="114">{label}</text>'
        )
        if share:
            text = f"{share:.0f}" if share >= 1 else "<1"
            bars.append(f'<text class="share" x="{x + step / 2:.1f}" y="{95 - height:.1f}">{escape(text)}</text>')
    spoken = ", ".join(f"rank {label}: {share:.1f} %" for label, share in zip(labels, shares, strict=True) if share)
    return (
        f'<figure><figcaption>{_arrow(direction)}</figcaption><svg class="chart" viewBox="0 0 320 120" role="img" '
        f'aria-label="{escape(direction.name)}: share of queries by rank of the right answer. {spoken}">'
        f'<path class="axis" d="M10 100.5H310"/>{"".join(bars)}</svg></figure>'
    )


def _spans(bounds: Sequence[int]) -> Iterable[tuple[int, int]]:
    return zip((1, *(bound + 1 for bound in bounds)), bounds, strict=False)


def _payload(report: RetrievalReport, items: Sequence[GalleryItem]) -> str:
    """The gallery as JSON that cannot end its script element, within the budget of the page."""
    for count, pictures in [*((count, True) for count in EXAMPLES), (EXAMPLES[-1], False)]:
        text = json_in_html(_Gallery(items, pictures).of(report, count))
        if len(text) <= GALLERY_BYTES:
            break
    return text


class _Gallery:
    """Collects the items and pictures that the chosen examples need, each once."""

    def __init__(self, items: Sequence[GalleryItem], pictures: bool) -> None:
        self.source = items
        self.with_pictures = pictures
        self.items: dict[int, dict[str, Any]] = {}

    def of(self, report: RetrievalReport, count: int) -> dict[str, Any]:
        lists = [
            {
                "title": result.title,
                "directions": [
                    {
                        "query": direction.query,
                        "gallery": direction.gallery,
                        "size": direction.ranks.gallery,
                        "examples": {
                            kind: [self._example(result, direction, int(row)) for row in rows]
                            for kind, rows in choose(direction, count).items()
                        },
                    }
                    for direction in result.directions.values()
                ],
            }
            for result in report.lists
        ]
        return {"items": self.items, "lists": lists}

    def _example(self, result: ListResult, direction: DirectionResult, row: int) -> dict[str, Any]:
        ranks = direction.ranks
        top = [
            [
                *self._show(result, direction.gallery, int(place)),
                round(float(score), 3),
                int(result.is_right(direction, row, int(place))),
            ]
            for place, score in zip(ranks.top_indices[row, :TOP], ranks.top_scores[row, :TOP], strict=True)
        ]
        example = {
            "query": self._show(result, direction.query, row),
            "rank": round(float(ranks.expected_rank[row]), 1),
            "tied": int(ranks.tied[row] - ranks.tied_relevant[row]),
            "top": top,
        }
        if not any(entry[-1] for entry in top):
            best = self._show(result, direction.gallery, int(ranks.best_index[row]))
            example["right"] = [*best, round(float(ranks.best_score[row]), 3)]
        return example

    def _show(self, result: ListResult, modality: Modality, row: int) -> list[int]:
        """``[item, caption]`` of an embedded row, the item noted with what the page shows of it."""
        number, caption = int(result.rows[modality].items[row]), result.rows[modality].caption(row)
        item = self.source[number]
        entry = self.items.setdefault(number, {"key": cut(item.key, 80), "captions": {}, "missing": list(item.missing)})
        for index in {0, caption}:
            if index < len(item.captions):
                entry["captions"][str(index)] = cut(item.captions[index], CAPTION_LETTERS)
        picture = {"video": ("poster", item.poster), "audio": ("waveform", item.waveform)}.get(modality)
        if self.with_pictures and picture is not None and picture[0] not in entry and picture[1]:
            entry[picture[0]] = _data_uri(picture[1])
        return [number, caption]


def choose(direction: DirectionResult, count: int, seed: int = 0) -> dict[str, list[int]]:
    """Query rows to show: ``random``, ``worst`` and ``best`` ones, at most ``count`` of each.

    Among queries of equal rank the score decides: how far the best right answer lies above the best other one, or,
    where it is not first, below the first.
    """
    ranks = direction.ranks
    rows = np.flatnonzero(ranks.answerable)
    first = ranks.top_scores[rows, 0]
    second = ranks.top_scores[rows, min(1, ranks.top_scores.shape[1] - 1)]
    best_score, order = ranks.best_score[rows], ranks.expected_rank[rows]
    lead = best_score - np.where(best_score == first, second, first)
    best = rows[np.lexsort((rows, -lead, order))]
    worst = rows[np.lexsort((rows, lead, -order))]
    drawn = np.random.default_rng(seed).permutation(rows)
    return {"random": drawn[:count].tolist(), "worst": worst[:count].tolist(), "best": best[:count].tolist()}


def cut(text: str, letters: int) -> str:
    """``text`` on one line and at most ``letters`` long, an ellipsis where something was cut."""
    line = " ".join(text[: 4 * letters].split())
    return line if len(line) <= letters and len(text) <= 4 * letters else line[: letters - 1] + "…"


def _data_uri(picture: bytes) -> str:
    if len(picture) > PICTURE_BYTES:
        return ""
    known = {b"\xff\xd8\xff": "jpeg", b"\x89PN": "png", b"RIF": "webp"}
    kind = known.get(picture[:3], "svg+xml")
    return f"data:image/{kind};base64,{base64.b64encode(picture).decode()}"
