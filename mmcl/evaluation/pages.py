"""The page, the Markdown and the JSON that every evaluation writes: a title, sections, facts.

``report.html`` is one file that opens from disk and forbids itself every request (its content security policy).
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

from mmcl.types import RunError

KIND = "Evaluation report"
MEDIA_SOURCES = "img-src data:; media-src data:"


@dataclass(frozen=True)
class Section:
    """A part of a report under a heading of its own."""

    heading: str
    """plain text"""
    html: str
    """markup that is put in as it is: whatever comes from a data set must be escaped in it"""
    markdown: str = ""
    """the same for ``report.md``; sections without any are left out there"""
    name: str = "part"
    """the class that the page's style knows it by"""


@dataclass(frozen=True)
class Table:
    """Plain text in rows and columns; a column with words stands left, one of numbers right."""

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def html(self) -> str:
        """The table under its title."""
        kinds = ["phrase" if any(cell[:1].isalpha() for cell in cells) else "number" for cells in self._columns()]
        head = "".join(
            f'<th role="columnheader" scope="col" class="{kind}">{escape(name)}</th>'
            for name, kind in zip(self.head, kinds, strict=True)
        )
        body = "".join(
            '<tr role="row">'
            + "".join(
                f'<td role="cell" class="{kind}" dir="auto" data-label="{escape(name)}">{escape(cell)}</td>'
                for name, kind, cell in zip(self.head, kinds, row, strict=True)
            )
            + "</tr>"
            for row in self.rows
        )
        return (
            f'<h3>{escape(self.title)}</h3><table role="table" class="figures"><thead role="rowgroup">'
            f'<tr role="row">{head}</tr></thead><tbody role="rowgroup">{body}</tbody></table>'
        )

    def markdown(self) -> str:
        """The table alone, without its title."""
        kinds = ["---" if any(cell[:1].isalpha() for cell in cells) else "---:" for cells in self._columns()]
        lines = (self.head, *self.rows)
        shown = ["| " + " | ".join(plain(cell) for cell in line) + " |" for line in lines]
        return "\n".join([shown[0], "| " + " | ".join(kinds) + " |", *shown[1:]])

    def _columns(self) -> list[tuple[str, ...]]:
        return list(zip(*self.rows, strict=True)) if self.rows else [()] * len(self.head)


def page(
    title: str,
    sections: Sequence[Section],
    *,
    kind: str = KIND,
    note: str = "",
    facts: Mapping[str, str] | None = None,
    data: str = "",
) -> str:
    """``report.html`` as text.

    Args:
        title: plain text, as all but ``Section.html`` is.
        sections: in their order.
        kind: what sort of report it is, above the title.
        note: one or two sentences under the title.
        facts: name → value, at the foot.
        data: JSON that cannot end its script element, for the gallery's script; without it the page runs none.
    """
    script = page_file("media.js") + page_file("page.js") if data else ""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    allowed = f"; script-src 'sha256-{digest}'" if data else ""
    parts = "\n".join(
        f'<section class="{escape(part.name)}"><h2 dir="auto">{escape(part.heading)}</h2>{part.html}</section>'
        for part in sections
    )
    shown = "".join(
        f'<div><dt>{escape(name)}</dt><dd dir="auto">{escape(value)}</dd></div>'
        for name, value in (facts or {}).items()
    )
    return Template(page_file("page.html")).substitute(
        kind=escape(kind),
        title=escape(title),
        policy=f"default-src 'none'; {MEDIA_SOURCES}; style-src 'unsafe-inline'{allowed}",
        style=page_file("page.css"),
        note=f'<p class="note" dir="auto">{escape(note)}</p>' if note else "",
        sections=parts,
        facts=shown,
        scripts=f'<script type="application/json" id="data">{data}</script>\n<script>{script}</script>' if data else "",
    )


def markdown_page(
    title: str,
    sections: Sequence[Section],
    *,
    kind: str = KIND,
    note: str = "",
    facts: Mapping[str, str] | None = None,
) -> str:
    """``report.md`` as text, for a pull request: the sections that have Markdown."""
    lines = [f"# {plain(kind)}: {plain(title)}", ""]
    lines += [plain(note), ""] if note else []
    for part in sections:
        lines += [f"## {plain(part.heading)}", "", part.markdown, ""] if part.markdown else []
    lines += [f"- {plain(name)}: {plain(value)}" for name, value in (facts or {}).items()]
    return "\n".join(lines).rstrip() + "\n"


def plain(text: str) -> str:
    """One line of Markdown that means nothing but itself."""
    line = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;")
    return "".join("\\" + letter if letter in "\\|`*_[]" else letter for letter in line)


def json_in_html(value: Any) -> str:
    """``value`` as JSON that cannot end the script element that it stands in."""
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def write_files(out_folder: str | Path, html: str, markdown: str, figures: Mapping[str, Any]) -> Path:
    """Writes ``report.html``, ``report.md`` and, last, ``report.json``; returns the path of the HTML file.

    Each file appears under its name when it is complete.

    Raises:
        RunError: the folder cannot be written.
    """
    folder = Path(out_folder)
    files = {
        "report.html": html,
        "report.md": markdown,
        "report.json": json.dumps(figures, ensure_ascii=True, allow_nan=False) + "\n",
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


def page_file(name: str) -> str:
    """The text of a part of every page: ``page.html``, ``page.css``, ``media.js``, ``page.js``."""
    return resources.files("mmcl.evaluation").joinpath("page").joinpath(name).read_text(encoding="utf-8")
