"""Runs side by side: what their folders tell, as lines of text and as curves on one page."""

from __future__ import annotations

import fcntl
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from mmcl.config import read_yaml
from mmcl.evaluation.pages import Section, Table, page, write_atomically
from mmcl.types import ConfigError, RunError

METRICS = "metrics.jsonl"
POINTS = 400
"""of a curve, at most"""
CURVES = 24
"""drawn at most; figures of evaluations and losses come first"""
COLOURS = 6
HEAD = ("run", "state", "steps", "loss", "eval/mean_R@1", "best eval/mean_R@1", "samples/s", "data wait")


@dataclass(frozen=True)
class Run:
    """What a run folder tells."""

    name: str
    folder: Path
    records: Sequence[Mapping[str, Any]]
    """of ``metrics.jsonl``, in the order of their steps"""
    steps: int | None
    """asked for; None: no configuration says so"""
    state: str
    """``finished``, ``running``, ``unfinished``, ``empty`` or ``damaged``, and what is to be said of it"""

    def last(self, name: str) -> float | None:
        """The figure as it was logged last."""
        values = self.values(name)
        return values[-1][1] if values else None

    def values(self, name: str) -> list[tuple[int, float]]:
        """``(step, value)`` wherever it was logged and is a number."""
        return [(record["step"], float(record[name])) for record in self.records if _is_number(record.get(name))]

    def cells(self) -> tuple[str, ...]:
        """A row under :data:`HEAD`."""
        step = self.records[-1]["step"] if self.records else 0
        hits = [value for _, value in self.values("eval/mean_R@1")]
        return (
            self.name,
            self.state,
            f"{step:,}" + (f" of {self.steps:,}" if self.steps else ""),
            _shown(self.last("loss"), 4),
            _shown(self.last("eval/mean_R@1"), 4),
            _shown(max(hits, default=None), 4),
            _shown(self.last("samples_per_second"), 3),
            _shown(self.last("data_wait_fraction"), 2),
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _shown(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}g}"


def find_runs(folders: Sequence[Path]) -> list[Run]:
    """The runs that are in ``folders``: each itself, else those right below it.

    Raises:
        ConfigError: no such folder, or none with a run.
    """
    places: list[Path] = []
    for folder in folders:
        if not folder.is_dir():
            raise ConfigError(f"{folder}: no such folder")
        below = [folder] if _is_run(folder) else sorted(path for path in folder.iterdir() if _is_run(path))
        if not below:
            raise ConfigError(f"{folder}: neither a run nor a folder of runs: none has {METRICS} or config.yaml")
        places += below
    places = list(dict.fromkeys(places))
    short = [place.absolute().name for place in places]
    names = [str(place) if short.count(name) > 1 else name for place, name in zip(places, short, strict=True)]
    return [_read(place, name) for place, name in zip(places, names, strict=True)]


def _is_run(folder: Path) -> bool:
    return (folder / METRICS).is_file() or ((folder / "config.yaml").is_file() and (folder / "checkpoints").is_dir())


def _read(folder: Path, name: str) -> Run:
    try:
        lines = (folder / METRICS).read_bytes().splitlines()
    except OSError:
        lines = []
    read = [record for line in lines if (record := _record(line)) is not None]
    damaged = len(lines) - len(read)
    by_step = {record["step"]: record for record in read}
    ordered = [by_step[step] for step in sorted(by_step)]
    steps = _steps(folder)
    state = "damaged" if damaged and not ordered else "empty"
    if ordered:
        state = "finished" if steps is not None and ordered[-1]["step"] >= steps else "unfinished"
    if state in ("empty", "unfinished") and _is_written(folder):
        state = "running"
    if damaged:
        state += f", {damaged} of {len(lines)} lines of {METRICS} cannot be read"
    return Run(name, folder, ordered, steps, state)


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
        return {**record, "step": int(record["step"])}
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None


def _steps(folder: Path) -> int | None:
    try:
        return int(read_yaml(folder / "config.yaml")["train"]["steps"])
    except (ConfigError, KeyError, TypeError, ValueError):
        return None


def _is_written(folder: Path) -> bool:
    """Whether a process holds the lock of a run folder."""
    try:
        with (folder / ".lock").open("r") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def run_lines(runs: Sequence[Run]) -> list[str]:
    """The table, aligned; control characters of names cannot reach the terminal."""
    rows = [HEAD, *(run.cells() for run in runs)]
    safe = [["".join(c if c.isprintable() else "?" for c in cell) for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in safe) for column in range(len(HEAD))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in safe]


def write_runs(runs: Sequence[Run], out: Path) -> Path:
    """One HTML file with the table and a chart for each figure; opens from disk and asks for nothing.

    Raises:
        RunError: it cannot be written.
    """
    names = sorted(
        {name for run in runs for record in run.records for name, value in record.items() if _is_number(value)}
        - {"step", "samples"},
        key=lambda name: (_place(name), name),
    )
    charts = [chart for name in names[:CURVES] if (chart := _chart(name, runs))]
    drawn = f'<div class="charts wide">{"".join(charts)}</div>' if charts else "<p>None has logged a step.</p>"
    sections = [
        Section("Side by side", Table("All runs", HEAD, tuple(run.cells() for run in runs)).html()),
        Section("Curves over optimizer steps", _keys(runs) + drawn),
    ]
    left = f"{len(names) - CURVES} more figures are in {METRICS}." if len(names) > CURVES else ""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(out, page("Runs", sections, kind="Training runs", note=left))
    except OSError as error:
        raise RunError(f"cannot write {out}: {error.strerror or error}") from None
    return out


def _place(name: str) -> int:
    """Where a figure stands among others: what is most looked at first."""
    first = ("loss", "eval/", "learning_rate", "temperature", "effective_rank/", "std/", "grad_norm", "samples_per")
    return next((place for place, start in enumerate(first) if name.startswith(start)), len(first))


def _keys(runs: Sequence[Run]) -> str:
    items = "".join(
        f'<li><svg class="key" viewBox="0 0 28 12" aria-hidden="true"><path class="{_style(n)}" d="M1 6H27"/></svg>'
        f'<span dir="auto">{escape(run.name)}</span></li>'
        for n, run in enumerate(runs)
    )
    return f'<ul class="keys">{items}</ul>'


def _style(number: int) -> str:
    return f"line c{number % COLOURS}" + (" second" if number // COLOURS % 2 else "")


def _chart(name: str, runs: Sequence[Run]) -> str:
    """The curves of one figure as inline SVG; "" where there is nothing to draw."""
    curves = {number: _thinned(run.values(name)) for number, run in enumerate(runs)}
    points = [point for curve in curves.values() for point in curve]
    if not points:
        return ""
    last = max(step for step, _ in points) or 1
    low, high = min(value for _, value in points), max(value for _, value in points)
    span = (high - low) or abs(high) or 1.0
    if not math.isfinite(span):
        return ""

    def place(step: int, value: float) -> str:
        return f"{60 + 450 * step / last:.1f} {240 - 220 * (value - low) / span:.1f}"

    lines = "".join(
        f'<path class="{_style(number)}" d="M{"L".join(place(*point) for point in curve)}'
        + ('h3"/>' if len(curve) == 1 else '"/>')
        for number, curve in curves.items()
        if curve
    )
    grid = "".join(
        f'<path class="axis" d="M60 {240 - 220 * share:.1f}H510"/>'
        f'<text class="left" x="54" y="{244 - 220 * share:.1f}">{low + share * span:.3g}</text>'
        for share in (0, 0.5, 1)
    )
    ticks = "".join(
        f'<text class="tick" x="{60 + 450 * share:.0f}" y="262">{share * last:,.0f}</text>' for share in (0, 0.5, 1)
    )
    spoken = ", ".join(f"{run.name} {_shown(run.last(name), 3)}" for run in runs if run.values(name))
    return (
        f'<figure><figcaption dir="auto">{escape(name)}</figcaption><svg class="chart" viewBox="0 0 520 270" '
        f'role="img" aria-label="{escape(f"{name} at the end: {spoken}")}">{grid}{ticks}{lines}</svg></figure>'
    )


def _thinned(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """Every so-manieth, and the last."""
    stride = -(-len(points) // POINTS) or 1
    return [*points[:-1:stride], *points[-1:]]
