"""The figures of a retrieval report for people, as tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmcl.evaluation.pages import Table
from mmcl.evaluation.report import DirectionResult, ListResult, RetrievalReport

COLUMNS = ("R@1", "R@5", "R@10", "R@50", "MedR", "MnR", "mAP@10", "nDCG@10", "queries", "gallery", "ties")
COUNTS = ("queries", "gallery", "ties", "unanswerable")
COMPARED_SHOWN = ("R@1", "R@5", "R@10", "MedR", "MnR", "mAP@10", "nDCG@10")


def table(result: ListResult) -> list[list[str]]:
    """The figures of a list for people: a row per direction, its name first, then :data:`COLUMNS`."""
    return [
        [direction.name, *(_cell(direction, column) for column in COLUMNS)] for direction in result.directions.values()
    ]


def _cell(direction: DirectionResult, column: str) -> str:
    if column == "R@1":
        low, high = direction.ci95[column]
        return f"{direction.metrics[column]:.1f} ({low:.1f}–{high:.1f})"
    return _number(direction.metrics, column)


def _number(metrics: Mapping[str, float], column: str) -> str:
    value = metrics[column]
    if column in COUNTS:
        return str(int(value))
    return f"{value:.1f}" if value < 1e5 else f"{value:.3g}"


def missing_lines(result: ListResult) -> list[str]:
    """A sentence for each modality that some items lack, or that some share."""
    words = {"audio": "sound", "video": "picture", "text": "caption"}
    lines = [
        f"{count} of {result.items} clips {'has' if count == 1 else 'have'} no {words.get(modality, modality)}: "
        f"left out of {modality} directions."
        for modality, count in result.missing.items()
    ]
    return lines + [
        f"{count} clips share their {words.get(modality, modality)} with another: scores tie, or answers are doubtful."
        for modality, count in result.duplicates.items()
    ]


def further_tables(report: RetrievalReport, result: ListResult) -> list[Table]:
    """What an older report said, groups, transductive figures and diagnostics: those that there are."""
    tables = [_against(report.against.get(result.name, {}))]
    groups = {name: each.groups for name, each in result.directions.items()}
    corrected = {name: each.transductive for name, each in result.directions.items()}
    for title, kind, found in (
        ("Groups", "group", groups),
        ("Transductive: answers depend on other queries", "method", corrected),
    ):
        rows = [
            (direction, name, *(_number(metrics, column) for column in COLUMNS))
            for direction, each in found.items()
            for name, metrics in each.items()
        ]
        tables.append(Table(title, ("direction", kind, *COLUMNS), tuple(rows)))
    tables.append(_diagnostics(result))
    return [each for each in tables if each.rows]


def _against(directions: Mapping[str, Any]) -> Table:
    rows = []
    for direction, compared in directions.items():
        for name, figure in compared["figures"].items():
            if name not in COMPARED_SHOWN:
                continue
            low, high = figure["ci95"]
            values = (f"{figure['old']:.1f}", f"{figure['new']:.1f}", f"{low:+.1f} to {high:+.1f}", figure["verdict"])
            gallery = "" if compared["same_gallery"] else " (another gallery)"
            rows.append((direction + gallery, name, *values))
    return Table(
        "Against the older report", ("direction", "figure", "old", "new", "difference", "verdict"), tuple(rows)
    )


def _diagnostics(result: ListResult) -> Table:
    rows = []
    for each in result.diagnostics.values():
        for name, figures in each.items():
            flat = {key: value["mean"] if isinstance(value, Mapping) else value for key, value in figures.items()}
            shown = [
                (name, f"mean similarity, {key}" if key in ("positives", "negatives") else key.replace("_", " "), value)
                for key, value in flat.items()
                if value is not None and key != "rows"
            ]
            rows += [(where, key, f"{value:.3f}") for where, key, value in shown]
    return Table("Diagnostics", ("of", "figure", "value"), tuple(rows))
