"""The report of classification and probes: figures, what was taken for what, what was left out and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from mmcl.evaluation.confusion import confusion_section
from mmcl.evaluation.pages import Section, Table, markdown_page, page, plain, write_files
from mmcl.evaluation.tasks import TaskResult

TITLES = {
    "zero-shot": "Zero-shot classification",
    "k-nn": "Nearest neighbours",
    "linear": "Linear probe",
    "few-shot": "Few-shot episodes",
}
SHORT = {"zero-shot": "zero-shot", "k-nn": "k-NN", "linear": "linear", "few-shot": "few-shot"}
FIGURES = ("top-1", "top-5", "mean-per-class", "mAP")
COUNTS = ("samples", "classes", "ties", "training samples", "also in training", "classes without training samples")
WORST = 10
"""classes that the report names as the hardest"""


@dataclass(frozen=True)
class LeftOut:
    """A task that was not run."""

    task: str
    why: str


@dataclass(frozen=True, eq=False)
class TaskReport:
    """What tasks found on some shards."""

    protocol: str
    fingerprint: str
    """of what was asked, and of the samples' keys"""
    results: tuple[TaskResult, ...]
    left_out: tuple[LeftOut, ...] = ()
    facts: Mapping[str, str] = field(default_factory=dict)
    retrieval: tuple[Table, ...] = ()
    """figures of retrieval, whose own report lies in ``retrieval/``"""

    def as_json(self) -> dict[str, Any]:
        """What ``report.json`` holds."""
        return {
            "protocol": self.protocol,
            "fingerprint": self.fingerprint,
            "facts": dict(self.facts),
            "tasks": {result.name: result.as_json() for result in self.results},
            "left_out": [{"task": each.task, "why": each.why} for each in self.left_out],
            **({"retrieval": "retrieval/report.json"} if self.retrieval else {}),
        }

    def headline(self) -> Table:
        """A row per task, a column for each figure that any has."""
        figures = [name for name in FIGURES if any(name in result.metrics for result in self.results)]
        counts = [name for name in COUNTS if any(name in result.metrics for result in self.results)]
        rows = tuple(
            (
                SHORT[result.task],
                result.modality,
                *(_figure(result, name) for name in figures),
                *(str(int(result.metrics[name])) if name in result.metrics else "–" for name in counts),
            )
            for result in self.results
        )
        return Table("Figures in percent, with 95 % intervals", ("task", "of", *figures, *counts), rows)

    def write(self, out: str | Path) -> Path:
        """``report.json``, ``report.md`` and ``report.html``; returns the last. Raises ``RunError``."""
        sections = self.sections()
        title = f"{self.protocol}: classification and probes"
        return write_files(
            out,
            page(title, sections, facts=self._all_facts()),
            markdown_page(title, sections, facts=self._all_facts()),
            self.as_json(),
        )

    def _all_facts(self) -> dict[str, str]:
        return {"protocol": self.protocol, "fingerprint": self.fingerprint, **self.facts}

    def sections(self) -> list[Section]:
        """The parts of the page, in their order."""
        parts = []
        if self.results:
            table = self.headline()
            how = [(f"{SHORT[result.task]} of {result.modality}", _how(result)) for result in self.results]
            words, text = _listed(how)
            parts.append(
                Section(
                    "Classification and probes", table.html() + words, f"{table.markdown()}\n\n{text}", name="tables"
                )
            )
        if self.retrieval:
            link = '<p class="about"><a href="retrieval/report.html">The report of retrieval, with its gallery</a></p>'
            words = "".join(table.html() for table in self.retrieval)
            text = "\n\n".join(f"{plain(table.title)}\n\n{table.markdown()}" for table in self.retrieval)
            parts.append(Section("Retrieval", link + words, text, name="tables"))
        if self.left_out:
            parts.append(Section("Left out", *_listed([(each.task, each.why) for each in self.left_out])))
        for result in self.results:
            parts += _of(result)
        return parts


def _listed(pairs: Sequence[tuple[str, str]]) -> tuple[str, str]:
    """Name and words as items, in HTML and in Markdown."""
    items = "".join(f"<li><b>{escape(name)}</b>: {escape(words)}</li>" for name, words in pairs)
    return f"<ul>{items}</ul>", "\n".join(f"- {plain(name)}: {plain(words)}" for name, words in pairs)


def _of(result: TaskResult) -> list[Section]:
    """What was taken for what, and the hardest classes, of one task."""
    title = f"{TITLES[result.task]} of {result.modality}"
    parts = []
    if result.confusion is not None:
        parts.append(
            confusion_section(result.confusion.numpy(), result.class_names, heading=f"{title}: what was taken for what")
        )
    measured = [
        (value, name) for value, name in zip(result.per_class, result.class_names, strict=False) if value == value
    ]
    if measured:
        figure = "average precision" if result.confusion is None else "% right"
        rows = tuple((name, f"{value:.1f}") for value, name in sorted(measured)[:WORST])
        table = Table("Hardest classes", ("class", figure), rows)
        parts.append(Section(f"{title}: hardest classes", table.html(), table.markdown()))
    return parts


def _figure(result: TaskResult, name: str) -> str:
    if name not in result.metrics:
        return "–"
    low, high = result.ci95.get(name, (None, None))
    bounds = "" if low is None or high is None else f" ({low:.1f}–{high:.1f})"
    return f"{result.metrics[name]:.1f}{bounds}"


def _how(result: TaskResult) -> str:
    """The settings in a few words."""
    shown = {name: value for name, value in result.settings.items() if not isinstance(value, (dict, list))}
    return ", ".join(
        f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}" for name, value in shown.items()
    )


def first_lines(report: TaskReport) -> Sequence[str]:
    """The figures for a terminal, a line each."""
    lines = []
    for result in report.results:
        figures = [f"{name} {_figure(result, name)}" for name in FIGURES if name in result.metrics]
        lines.append(f"{TITLES[result.task]} of {result.modality}: {', '.join(figures)}")
    return [*lines, *(f"left out: {each.task}: {each.why}" for each in report.left_out)]
