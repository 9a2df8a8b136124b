"""Pairs of towers, or of sets of them, as objectives between modalities take them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations, product

from mmcl.config import unknown_name
from mmcl.types import ConfigError, TowerInfo

Members = tuple[str, ...]
"""the towers of one side of a pair, in the model's order"""


def checked_pairs(
    wanted: Sequence[tuple[str, str]] | None, towers: Mapping[str, TowerInfo], path: str, objective: str
) -> list[tuple[str, str]]:
    """Names of the towers of each pair, in the order given; None: every pair of towers.

    Raises:
        ConfigError: a pair names an unknown tower, one tower twice, comes twice, or lies in spaces of different width;
            or there is no pair. Names ``path``.
    """
    for number, pair in enumerate(wanted or ()):
        for side in pair:
            if side not in towers:
                raise unknown_name(f"{path}.pairs.{number}", side, towers)
    return [(a[0], b[0]) for a, b in checked_sets(wanted, towers, path, objective)]


def checked_sets(
    wanted: Sequence[tuple[str, str]] | None, towers: Mapping[str, TowerInfo], path: str, objective: str
) -> list[tuple[Members, Members]]:
    """As :func:`checked_pairs`, of sides that may be sets such as ``video+audio``; each side's towers, at least one.

    Raises:
        ConfigError: also where a set has one tower twice or alone, or a tower stands on both sides.
    """
    if wanted is None and len(towers) < 2:
        raise ConfigError(f"{path}.pairs: {objective} needs two towers, the model has {', '.join(towers) or 'none'}")
    pairs: list[tuple[Members, Members]] = []
    for number, pair in enumerate(combinations(towers, 2) if wanted is None else wanted):
        where = f"{path}.pairs.{number}"
        a, b = (_members(side, towers, where) for side in pair)
        for tower in (name for name in a if name in b):
            what = "a pair needs two towers, got" if a == b else f"{'+'.join(a)!r} and {'+'.join(b)!r} both have"
            raise ConfigError(f"{where}: {what} {tower!r}" + " twice" * (a == b))
        if (a, b) in pairs or (b, a) in pairs:
            raise ConfigError(f"{where}: the pair {'+'.join(a)!r}, {'+'.join(b)!r} is already in the list")
        for one, other in product(a + b, repeat=2):
            widths = [towers[name].joint_width for name in (one, other)]
            if widths[0] != widths[1]:
                raise ConfigError(
                    f"{where}: {one!r} and {other!r} lie in spaces of different width, {widths[0]} and {widths[1]}"
                )
        pairs.append((a, b))
    return pairs


def _members(side: str, towers: Mapping[str, TowerInfo], where: str) -> Members:
    """The towers of a side: itself, or those of a set, in the model's order."""
    if side in towers or "+" not in side:
        names = [side]
    else:
        names = [name.strip() for name in side.split("+") if name.strip()]
        if len(names) < 2:
            raise ConfigError(f"{where}: {side!r}: a set needs two towers, such as {'+'.join([*towers][:2])}")
    for tower in names:
        if tower not in towers:
            raise unknown_name(where, tower, towers)
        if names.count(tower) > 1:
            raise ConfigError(f"{where}: {side!r}: a set has {tower!r} once")
    return tuple(name for name in towers if name in names)
