"""The page and the Markdown of a retrieval report.

Tables and charts are plain HTML and SVG. The gallery is JSON that the page's own script turns into elements, so that
each picture is embedded once and only the cards in view exist. Nothing from a data set reaches the page but escaped, or
as JSON text.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from string import Template

from mmcl.evaluation.charts import arrow, gap_picture, rank_histogram, recall_curves, similarity_histogram
from mmcl.evaluation.gallery import Showable
from mmcl.evaluation.gallery_data import gallery_json
from mmcl.evaluation.pages import Section, Table, markdown_page, page, plain
from mmcl.evaluation.report import DirectionResult, ListResult, RetrievalReport
from mmcl.evaluation.tables import COLUMNS, DIAGNOSTICS, further_tables, missing_lines, table

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
<div id="tabs" class="tabs" role="tablist" aria-label="Which queries"></div>
<div id="panel" role="tabpanel" tabindex="-1">
<form id="filters" class="filters" role="search"></form>
<p id="status" class="about" role="status"></p>
<div id="cards"></div>
<nav id="pages" class="pages" aria-label="Pages of the gallery"></nav>
</div>
<p id="budget" class="about"></p>
<audio id="sound" preload="none"></audio>"""


def sections(report: RetrievalReport) -> list[Section]:
    """The figures of every list, how to read them, and the place of the gallery."""
    lists = [
        Section(result.title, _list_html(report, result), _list_markdown(report, result), "list")
        for result in report.lists
    ]
    right = escape(report.right or _RIGHT[report.headline.labels is not None])
    return [
        *lists,
        Section("Queries and what they found", _GALLERY_HTML, name="gallery"),
        Section("How to read this", _READING.substitute(right=right), _READING_MARKDOWN, "reading"),
    ]


def render(report: RetrievalReport, items: Sequence[Showable]) -> tuple[str, str]:
    """``report.html`` and ``report.md``; numbers in ``ModalityRows.items`` are positions in ``items``."""
    title, note, parts = report.title or report.protocol, report.note, sections(report)
    facts = {"protocol": report.protocol, **report.facts, "fingerprint": report.fingerprint}
    html = page(title, parts, kind=KIND, note=note, facts=facts, data=gallery_json(report, items))
    return html, markdown_page(title, parts, kind=KIND, note=note, facts=facts)


def _list_html(report: RetrievalReport, result: ListResult) -> str:
    first = next(iter(result.directions.values())).ranks
    chance = 100 * first.relevant[first.answerable].mean() / first.gallery
    histograms = "".join(rank_histogram(each) for each in result.directions.values())
    pairs = result.diagnostics.get("pairs", {})
    alike = "".join(similarity_histogram(name, figures) for name, figures in pairs.items())
    notes = "".join(f" {escape(line)}" for line in missing_lines(result))
    return (
        f'<p class="about">{result.items} clips. Guessing would reach R@1\u00a0≈\u00a0{chance:.1f}\u00a0%.{notes}</p>'
        f"{_table(result)}{_details(report, result, wanted=False)}"
        "<h3>Recall, and where the embeddings lie</h3>"
        f'<div class="charts wide">{recall_curves(result)}{gap_picture(result)}</div>'
        f'<h3>Where the right answer stands, % of the queries</h3><div class="charts">{histograms}</div>'
        f'<h3>Similarity of right pairs (filled) and of wrong ones (line)</h3><div class="charts">{alike}</div>'
        f"{_details(report, result, wanted=True)}"
    )


def _details(report: RetrievalReport, result: ListResult, *, wanted: bool) -> str:
    """The further tables: diagnostics, many lines that few read, are folded."""
    tables = [each for each in further_tables(report, result) if (each.title == DIAGNOSTICS) == wanted]
    shown = "".join(each.html() for each in tables)
    return f"<details><summary>{DIAGNOSTICS}</summary>{shown}</details>" if wanted and shown else shown


def _list_markdown(report: RetrievalReport, result: ListResult) -> str:
    lines = [Table("", ("direction", *COLUMNS), tuple(map(tuple, table(result)))).markdown(), ""]
    lines += [f"{result.items} clips. " + " ".join(map(plain, missing_lines(result)))]
    for extra in further_tables(report, result):
        if extra.title == DIAGNOSTICS:
            lines += ["", f"<details><summary>{DIAGNOSTICS}</summary>", "", extra.markdown(), "", "</details>"]
        else:
            lines += ["", f"### {plain(extra.title)}", "", extra.markdown()]
    return "\n".join(lines)


def _table(result: ListResult) -> str:
    head = "".join(f'<th role="columnheader" scope="col">{escape(name)}</th>' for name in ("direction", *COLUMNS))
    body = []
    for direction, cells in zip(result.directions.values(), table(result), strict=True):
        first = f'<th role="rowheader" scope="row">{arrow(direction)}</th>{_hit_cell(direction)}'
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
