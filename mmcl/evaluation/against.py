"""A report against an older one: what got better or worse, by a paired bootstrap over the queries of both."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from mmcl.evaluation.bootstrap import paired_bootstrap
from mmcl.evaluation.distinct import Floats
from mmcl.types import ConfigError

MOVED = 5
"""queries named that rose, and that fell, most"""


def compare(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """``{list: {direction: …}}`` for what both have, from what two ``report.json`` hold.

    Of each direction: ``queries`` that both answered, ``same_gallery``, per figure ``old``, ``new``, ``ci95`` of new −
    old and a ``verdict`` (``better``, ``worse``, or ``unclear`` where the interval holds 0), and the queries that
    ``rose`` and ``fell`` most, with both ranks.

    Raises:
        ConfigError: the reports share no query.
    """
    found: dict[str, dict[str, Any]] = {}
    for name, result in new["lists"].items():
        before = old["lists"].get(name)
        for direction in result["directions"] if before else ():
            if direction in before["directions"]:
                compared = _direction(before, result, direction)
                if compared is not None:
                    found.setdefault(name, {})[direction] = compared
    if not found:
        raise ConfigError("--against: the two reports share no query of a list and direction")
    return found


def _direction(old: Mapping[str, Any], new: Mapping[str, Any], direction: str) -> dict[str, Any] | None:
    query, gallery = direction.split("->")
    before, after = _by_query(old, direction, query), _by_query(new, direction, query)
    shared = [name for name in after if name in before]
    if not shared:
        return None
    columns = [
        {figure: np.array([side[name][figure] for name in shared], np.float64) for figure in after[shared[0]]}
        for side in (before, after)
    ]
    bounds = paired_bootstrap(columns[0], columns[1])
    values = [_values(side) for side in columns]
    figures = {
        name: {
            "old": values[0][name],
            "new": values[1][name],
            "ci95": list(interval),
            "verdict": _verdict(interval, lower_is_better=name in ("MedR", "MnR")),
        }
        for name, interval in bounds.items()
    }
    moved = columns[0]["rank"] - columns[1]["rank"]
    order = np.argsort(-moved, kind="stable")
    named = [{"query": shared[i], "old": columns[0]["rank"][i], "new": columns[1]["rank"][i]} for i in order]
    rose, fell = int((moved > 0).sum()), int((moved < 0).sum())
    return {
        "queries": len(shared),
        "same_gallery": sorted(old["queries"][gallery]) == sorted(new["queries"][gallery]),
        "figures": figures,
        "rose_count": rose,
        "fell_count": fell,
        "rose": named[: min(MOVED, rose)],
        "fell": named[::-1][: min(MOVED, fell)],
    }


def _by_query(result: Mapping[str, Any], direction: str, query: str) -> dict[str, dict[str, float]]:
    """What each answered query reached, by its name."""
    columns = {"rank": result["ranks"][direction], **result["per_query"][direction]}
    return {
        name: {figure: column[place] for figure, column in columns.items()}
        for place, name in enumerate(result["queries"][query])
        if columns["rank"][place] is not None
    }


def _values(columns: Mapping[str, Floats]) -> dict[str, float]:
    means = {name: float(values.mean()) for name, values in columns.items() if name != "rank"}
    return {**means, "MnR": float(columns["rank"].mean()), "MedR": float(np.median(columns["rank"]))}


def _verdict(interval: tuple[float, float], *, lower_is_better: bool) -> str:
    low, high = interval
    if low <= 0 <= high:
        return "unclear"
    return "better" if (low > 0) != lower_is_better else "worse"
