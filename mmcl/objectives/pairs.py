"""Pairs of towers, as objectives between modalities take them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations

from mmcl.config import unknown_name
from mmcl.types import ConfigError, TowerInfo


def checked_pairs(
    wanted: Sequence[tuple[str, str]] | None, towers: Mapping[str, TowerInfo], path: str, objective: str
) -> list[tuple[str, str]]:
    """Names of the towers of each pair, in the order given; None: every pair of towers.

    Raises:
        ConfigError: a pair names an unknown tower, one tower twice, comes twice, or lies in spaces of different width;
            or there is no pair. Names ``path``.
    """
    if wanted is None and len(towers) < 2:
        raise ConfigError(f"{path}.pairs: {objective} needs two towers, the model has {', '.join(towers) or 'none'}")
    pairs: list[tuple[str, str]] = []
    for number, (a, b) in enumerate(combinations(towers, 2) if wanted is None else wanted):
        where = f"{path}.pairs.{number}"
        for tower in (a, b):
            if tower not in towers:
                raise unknown_name(where, tower, towers)
        if a == b:
            raise ConfigError(f"{where}: a pair needs two towers, got {a!r} twice")
        if (a, b) in pairs or (b, a) in pairs:
            raise ConfigError(f"{where}: the pair {a!r}, {b!r} is already in the list")
        widths = [towers[name].joint_width for name in (a, b)]
        if widths[0] != widths[1]:
            raise ConfigError(f"{where}: {a!r} and {b!r} lie in spaces of different width, {widths[0]} and {widths[1]}")
        pairs.append((a, b))
    return pairs
