"""An evaluation on the terminal: a table per list, and a few queries with what they find."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mmcl.evaluation.report import DirectionResult, ListResult
from mmcl.evaluation.run import Evaluation
from mmcl.evaluation.tables import COLUMNS, DIAGNOSTICS, further_tables, missing_lines, table
from mmcl.types import Modality

CAREFUL = {"not the whole set", "few captions"}
"""facts of a report without which its figures mislead"""

NOUNS = {"video": "picture", "audio": "sound", "text": "text"}


def print_evaluation(evaluation: Evaluation, *, examples: bool = False) -> None:
    """Prints every list of the report, example queries of the headline if asked for, and where the page is."""
    console = Console(soft_wrap=False, width=None if Console().is_terminal else 120)
    for result in evaluation.report.lists:
        shown = Table(title=escape(result.title), title_justify="left", title_style="bold", box=None, padding=(0, 1))
        shown.add_column("direction")
        for column in COLUMNS:
            shown.add_column(column, justify="right", no_wrap=True)
        for row in table(result):
            shown.add_row(*map(escape, row))
        console.print(shown)
        for extra in further_tables(evaluation.report, result):
            if extra.title != DIAGNOSTICS:  # of these the files tell
                more = Table(*extra.head, title=escape(extra.title), title_justify="left", box=None, padding=(0, 1))
                for cells in extra.rows:
                    more.add_row(*map(escape, cells))
                console.print(more)
        for line in missing_lines(result):
            console.print(line, markup=False)
        console.print()
    for warning in sorted(CAREFUL & evaluation.report.facts.keys()):
        console.print(f"{warning}: {evaluation.report.facts[warning]}", markup=False, highlight=False)
    if examples:
        for line in example_lines(evaluation):
            console.print(line, markup=False, highlight=False)
        console.print()
    console.print(f"report: {evaluation.page}", markup=False, highlight=False, soft_wrap=True)


def example_lines(evaluation: Evaluation, *, seed: int = 0, top: int = 3) -> Iterator[str]:
    """One query of each modality, drawn at random, with its best answers."""
    headline = evaluation.report.headline
    for query in dict.fromkeys(direction.query for direction in headline.directions.values()):
        direction = next(d for d in headline.directions.values() if d.query == query)
        row = int(np.random.default_rng(seed).choice(np.flatnonzero(direction.ranks.answerable)))
        yield f"{NOUNS.get(query, query)} of {_caption(evaluation, headline, query, row)!r} finds {direction.gallery}:"
        yield from _answers(evaluation, headline, direction, row, top)


def _answers(
    evaluation: Evaluation, headline: ListResult, direction: DirectionResult, row: int, top: int
) -> Iterator[str]:
    ranks = direction.ranks
    found = zip(ranks.top_indices[row, :top], ranks.top_scores[row, :top], strict=True)
    for place, (gallery_row, score) in enumerate(found, 1):
        right = "  (right)" if headline.is_right(direction, row, int(gallery_row)) else ""
        yield f"  {place}. {_caption(evaluation, headline, direction.gallery, int(gallery_row))}  {score:.2f}{right}"


def _caption(evaluation: Evaluation, headline: ListResult, modality: Modality, row: int) -> str:
    rows = headline.rows[modality]
    item = evaluation.embedded.items[int(rows.items[row])]
    return item.captions[rows.caption(row)] if item.captions else item.key
