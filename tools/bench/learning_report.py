"""How runs of a comparison are summed up: means and spreads over seeds, differences seed by seed, a table."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

Tree = dict[str, Any]
Figures = dict[str, float]
Measured = dict[tuple[str, int], Figures]
"""by arm and seed"""


def spread(values: list[float]) -> Tree:
    """Mean and standard deviation over seeds."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return {
        "values": [round(v, 2) for v in values],
        "mean": round(statistics.mean(values), 2),
        "spread": round(deviation, 2),
    }


def summary(measured: Measured, compared: Sequence[tuple[str, str]]) -> Tree:
    arms = list(dict.fromkeys(arm for arm, _ in measured))
    seeds = sorted({seed for _, seed in measured})

    def values(arm: str) -> dict[str, list[float]]:
        return {name: [measured[arm, seed][name] for seed in seeds] for name in measured[arm, seeds[0]]}

    def differences(a: str, b: str) -> dict[str, list[float]]:
        x, y = values(a), values(b)
        return {n: [u - v for u, v in zip(x[n], y[n], strict=True)] for n in x if n in y and n != "cpu_seconds"}

    pairs = {f"{a} − {b}": differences(a, b) for a, b in compared if {a, b} <= {*arms}}
    return {
        "seeds": seeds,
        "arms": {arm: {name: spread(x) for name, x in values(arm).items()} for arm in arms},
        "differences, seed by seed": {
            pair: {name: spread(x) for name, x in found.items()} for pair, found in pairs.items()
        },
    }


def table(summaries: Tree) -> str:
    """Markdown: mean ± standard deviation of the main figure of each arm, then of each direction."""
    lines = []
    for experiment, found in summaries.items():
        for kind in ("arms", "differences, seed by seed"):
            for arm, figures in found[kind].items():
                cells = [f"{name} {s['mean']:.1f} ± {s['spread']:.1f}" for name, s in figures.items()]
                lines.append(f"| {experiment} | {arm} | " + "; ".join(cells) + " |")
    return "\n".join(["| experiment | arm | mean ± standard deviation over seeds |", "| --- | --- | --- |", *lines])
