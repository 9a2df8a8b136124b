"""What a classifier takes for what, as a picture and as a section of a report."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import numpy as np
import numpy.typing as npt

from mmcl.evaluation.pages import Section, Table

SHOWN_CLASSES = 40
"""of more classes the picture shows those with the most mistakes"""
NAME_LETTERS = 22
PAIRS = 10
_NUMBERED = 12
"""up to so many classes, cells have their percentage in them"""


def confusion_picture(
    matrix: npt.NDArray[np.integer] | Sequence[Sequence[int]], class_names: Sequence[str], *, shown: int = SHOWN_CLASSES
) -> str:
    """An SVG of a confusion matrix: a row per true class, a column per answer, darker the larger the row's share.

    Args:
        matrix: int ``(C, C)``, counts ≥ 0; ``matrix[t, p]`` samples of class t were taken for p.
        class_names: C names; they are escaped here.
        shown: of more classes, so many: those with most mistakes made in them or for them, in their own order.

    Raises:
        ValueError: not square, empty, counts below 0, or another number of names.
    """
    counts = _checked(matrix, class_names)
    wrong = counts - np.diag(np.diag(counts))
    kept = np.sort(np.argsort(-(wrong.sum(0) + wrong.sum(1)), kind="stable")[:shown])
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    size, left, top = len(kept), 150, 110
    step = max(12.0, min(44.0, 520 / size))
    cells = []
    for y, true in enumerate(kept):
        for x, answer in enumerate(kept):
            share = float(shares[true, answer])
            if not counts[true, answer]:
                continue
            place = f'x="{left + x * step:.1f}" y="{top + y * step:.1f}" width="{step:.1f}" height="{step:.1f}"'
            words = f"{class_names[true]} taken for {class_names[answer]}: {counts[true, answer]} ({100 * share:.1f} %)"
            kind = "cell own" if true == answer else "cell"
            cells.append(
                f'<rect class="{kind}" {place} fill-opacity="{0.08 + 0.92 * share:.3f}">'
                f"<title>{escape(words)}</title></rect>"
            )
            if size <= _NUMBERED:
                middle = f'x="{left + (x + 0.5) * step:.1f}" y="{top + (y + 0.5) * step + 4:.1f}"'
                dark = " over" if share > 0.55 else ""
                cells.append(f'<text class="amount{dark}" {middle}>{100 * share:.0f}</text>')
    names = "".join(
        f'<text class="row" x="{left - 6}" y="{top + (place + 0.5) * step + 4:.1f}">{_name(class_names[each])}</text>'
        f'<text class="column" transform="translate({left + (place + 0.5) * step + 3:.1f} {top - 6}) rotate(-55)">'
        f"{_name(class_names[each])}</text>"
        for place, each in enumerate(kept)
    )
    right = 100 * np.trace(counts) / max(counts.sum(), 1)
    some = "" if size == len(counts) else f", the {size} of {len(counts)} classes with most mistakes"
    width, height = left + size * step + 60, top + size * step + 4
    return (
        f'<svg class="confusion" style="max-width:{width:.0f}px" viewBox="0 0 {width:.0f} {height:.0f}" role="img" '
        f'aria-label="Confusion: true classes down, answers across{some}; {right:.1f} % right">'
        f'<rect class="ground" x="{left}" y="{top}" width="{size * step:.1f}" height="{size * step:.1f}"/>'
        f"{''.join(cells)}{names}</svg>"
    )


def confusion_section(
    matrix: npt.NDArray[np.integer] | Sequence[Sequence[int]],
    class_names: Sequence[str],
    *,
    heading: str = "What was taken for what",
) -> Section:
    """The picture, and a table of the commonest mistakes, which is what ``report.md`` shows."""
    counts = _checked(matrix, class_names)
    pairs = [
        (int(counts[true, answer]), int(true), int(answer))
        for true, answer in np.argwhere(counts > 0)
        if true != answer
    ]
    rows = tuple(
        (class_names[true], class_names[answer], str(count), f"{100 * count / counts[true].sum():.1f}")
        for count, true, answer in sorted(pairs, key=lambda pair: (-pair[0], pair[1:]))[:PAIRS]
    )
    table = Table("Commonest mistakes", ("true class", "taken for", "samples", "% of the class"), rows)
    some = "" if len(counts) <= SHOWN_CLASSES else f" The {SHOWN_CLASSES} of {len(counts)} classes with most mistakes."
    about = f'<p class="about">Each row is a true class, each column an answer; numbers are % of the row.{some}</p>'
    picture = f"<figure>{confusion_picture(counts, class_names)}</figure>"
    return Section(
        heading, about + picture + (table.html() if rows else ""), table.markdown() if rows else "No mistakes."
    )


def _checked(matrix: npt.NDArray[np.integer] | Sequence[Sequence[int]], names: Sequence[str]) -> npt.NDArray[np.int64]:
    counts = np.asarray(matrix)
    if counts.ndim != 2 or counts.shape[0] != counts.shape[1] or not counts.size:
        raise ValueError(f"a confusion matrix must be (C, C), got {counts.shape}")
    if counts.dtype.kind not in "iu" or int(counts.min()) < 0:
        raise ValueError("a confusion matrix holds integer counts of at least 0")
    if len(names) != len(counts):
        raise ValueError(f"{len(counts)} classes have {len(names)} names")
    return counts.astype(np.int64)


def _name(name: str) -> str:
    line = " ".join(name.split())
    return escape(line if len(line) <= NAME_LETTERS else line[: NAME_LETTERS - 1] + "…")
