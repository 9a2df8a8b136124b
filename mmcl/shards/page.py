"""Self-contained pages: one file, no script, no request (their own policy forbids them), all text escaped."""

from __future__ import annotations

import base64
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_STYLE = """
:root { color-scheme: light dark; --ink: #1d2429; --dim: #5d6b75; --paper: #fff; --line: #d9e0e5; --fill: #3a8fb7; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6ecf0; --dim: #9aa8b2; --paper: #14191d; --line: #2f3a42; --fill: #5fb0d6; }
}
body { margin: 0 auto; max-width: 75rem; padding: 1.5rem 1rem 3rem; background: var(--paper); color: var(--ink);
  font: 15px/1.45 system-ui, sans-serif; }
h1 { font-size: 1.4rem; margin: 0 0 .2rem; overflow-wrap: anywhere; }
p { margin: .2rem 0 1rem; color: var(--dim); }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(11rem, 1fr)); gap: .75rem; margin: 1rem 0 1.5rem; }
dl .long { grid-column: 1 / -1; }
dt { color: var(--dim); font-size: .85rem; } dd { margin: 0; font-size: 1.1rem; overflow-wrap: anywhere; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(20rem, 1fr)); gap: 1rem; }
figure { margin: 0; border: 1px solid var(--line); border-radius: 6px; padding: .75rem; min-width: 0; }
figcaption { font-weight: 600; margin-bottom: .4rem; overflow-wrap: anywhere; }
svg, img { display: block; width: 100%; height: auto; }
svg rect { fill: var(--fill); } svg path { stroke: var(--fill); } svg text { fill: var(--ink); font-size: 11px; }
svg text.dim { fill: var(--dim); font-size: 11px; }
ul { margin: .5rem 0 0; padding-left: 1.1rem; overflow-wrap: anywhere; }
.dim { color: var(--dim); font-size: .85rem; overflow-wrap: anywhere; } .bad { color: #c0392b; }
"""


_FEW = 6
_LONG = 60
"""letters of a fact that gets a row of its own"""


def render_page(title: str, about: str, facts: Mapping[str, str], cards: Sequence[str]) -> str:
    """A page of facts and cards; ``cards`` are HTML already, everything else is escaped here."""
    listed = "".join(
        f"<div{' class=long' if len(value) > _LONG else ''}><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>"
        for name, value in facts.items()
    )
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_STYLE}</style></head>'
        f"<body><h1>{escape(title)}</h1><p>{escape(about)}</p><dl>{listed}</dl>"
        f'<div class="grid">{"".join(cards)}</div></body></html>\n'
    )


def bars(title: str, counts: Mapping[str, int]) -> str:
    """A card with one horizontal bar per label, as inline SVG; empty where there is nothing to count."""
    if not counts:
        return ""
    most, rows = max([*counts.values(), 1]), []
    for place, (label, count) in enumerate(counts.items()):
        y, width = 20 * place, 170 * count / most
        rows.append(
            f'<text x="112" y="{y + 13}" text-anchor="end">{escape(cut(label, 18))}</text>'
            f'<rect x="118" y="{y + 3}" width="{max(width, 0.5 if count else 0):.1f}" height="13" rx="1"/>'
            f'<text class="dim" x="{122 + width:.1f}" y="{y + 13}">{count}</text>'
        )
    spoken = ", ".join(f"{label}: {count}" for label, count in counts.items())
    return (
        f'<figure><figcaption>{escape(title)}</figcaption><svg viewBox="0 0 340 {20 * len(counts)}" role="img" '
        f'aria-label="{escape(title)}. {escape(spoken)}">{"".join(rows)}</svg></figure>'
    )


def histogram(values: Sequence[float], most_bins: int = 12) -> dict[str, int]:
    """Counts of values in at most ``most_bins`` ranges of one round width; what lies far above goes into the last.

    A handful of different values are counted one by one.

    >>> histogram([2.5, 3, 2.5])
    {'2.5': 2, '3': 1}
    >>> list(histogram([*range(200), 100_000]).items())[-2:]
    [('160–179', 20), ('180 and more', 21)]
    """
    distinct = Counter(values)
    if len(distinct) <= _FEW:
        return {f"{value:g}": distinct[value] for value in sorted(distinct)}
    ordered = sorted(values)
    low, high = ordered[0], ordered[min(len(ordered) - 1, math.floor(0.99 * len(ordered)))]
    whole = all(float(value).is_integer() for value in values)
    width = _round_width((high - low) / (most_bins - 1), whole)
    first = math.floor(low / width + 1e-9)
    last = max(math.floor(high / width + 1e-9), first)
    counts = [0] * (last - first + 1)
    for value in values:
        counts[min(math.floor(value / width + 1e-9), last) - first] += 1
    labels = [_label(width * (first + place), width, whole) for place in range(len(counts))]
    if ordered[-1] >= width * (last + 1) - 1e-9:
        labels[-1] = f"{width * last:g} and more"
    return dict(zip(labels, counts, strict=True))


def _round_width(width: float, whole: bool) -> float:
    """The next of 1, 2, 5, 10, … (0.1, 0.2, 0.5, …) from ``width`` up."""
    if width <= 0:
        return 1.0 if whole else 0.1
    scale = 10.0 ** math.floor(math.log10(width))
    rounded = next(scale * step for step in (1, 2, 5, 10) if scale * step >= width * (1 - 1e-9))
    return max(rounded, 1.0) if whole else rounded


def _label(start: float, width: float, whole: bool) -> str:
    if whole:
        return f"{start:g}" if width == 1 else f"{start:g}–{start + width - 1:g}"
    return f"{start:g}–{start + width:g}"


def cut(text: str, letters: int) -> str:
    """``text`` on one line and at most ``letters`` long, an ellipsis where something was cut."""
    line = " ".join(text[: 4 * letters].split())
    return line if len(line) <= letters and len(text) <= 4 * letters else line[: letters - 1] + "…"


def data_uri(picture: bytes, kind: str = "image/jpeg") -> str:
    return f"data:{kind};base64,{base64.b64encode(picture).decode()}"
