"""The sides of a direction: the rows of a modality, or of a set of modalities as one."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mmcl.concatenated import AnyModel
from mmcl.evaluation.distinct import Distinct, Integers
from mmcl.evaluation.embed import EmbeddedShards
from mmcl.evaluation.protocols import ALL, Direction, parse_direction
from mmcl.evaluation.report import ModalityRows
from mmcl.types import ConfigError, Modality

Fuse: TypeAlias = Callable[[Mapping[Modality, Tensor]], Tensor]
"""rows ``(n, D)`` of several modalities, row i of each of one item, to unit rows ``(n, D)``"""
_BLOCK = 4096
"""rows that are fused at once"""


def wanted_directions(given: Sequence[str], modalities: Sequence[Modality]) -> list[Direction]:
    """What a protocol asks for, of the modalities that there are; those in their order, text first.

    Nothing given: every ordered pair of modalities; ``all``: of all sets of them that share none.

    Raises:
        ConfigError: a form that is no direction, or a modality that nothing was embedded of.
    """
    named = sorted(modalities, key=lambda name: name != "text")
    if not given or tuple(given) == (ALL,):
        sizes = range(1, 2 if not given else len(named))
        sets = [each for size in sizes for each in itertools.combinations(named, size)]
        pairs = [pair for pair in itertools.combinations(sets, 2) if not {*pair[0]} & {*pair[1]}]
        return [Direction(query=a, gallery=b) for pair in pairs for a, b in (pair, pair[::-1])]
    found = []
    for text in given:
        try:
            direction = parse_direction(text)
        except ValueError as error:
            raise ConfigError(f"--directions: {error}") from None
        unknown = [name for name in (*direction.query, *direction.gallery) if name not in modalities]
        if unknown:
            raise ConfigError(f"direction {text}: no {unknown[0]} was embedded; there are: {', '.join(named)}")
        found.append(direction)
    return found


def sides_of(
    embedded: EmbeddedShards,
    items: Integers,
    directions: Sequence[Direction],
    captions: int | None = None,
    fuse: Fuse | None = None,
) -> dict[str, ModalityRows]:
    """The rows of every side of ``directions`` by its name, of some items; ``captions``: the first so many of each;
    ``fuse``: makes one row of those of a set, default: their mean.
    """
    single = {}
    for modality, values in embedded.rows.items():
        owners = embedded.owners[modality].numpy()
        numbers = _caption_numbers(owners) if modality == "text" else np.zeros_like(owners)
        mine = np.flatnonzero(np.isin(owners, items) & (numbers < (captions or len(owners) + 1)))
        single[modality] = ModalityRows(values[mine], owners[mine], numbers[mine] if modality == "text" else None)
    sets = dict.fromkeys(side for direction in directions for side in (direction.query, direction.gallery))
    return {"+".join(each): joined(single, each, fuse or unit_mean) for each in sets}


def unit_mean(rows: Mapping[Modality, Tensor]) -> Tensor:
    """The mean of unit rows ``(n, D)`` of several modalities, scaled to unit length."""
    first, *others = rows.values()
    total = first.clone()
    for each in others:
        total += each
    return F.normalize(total, dim=1)


def sets_in(directions: Sequence[Direction]) -> list[tuple[Modality, ...]]:
    """The sides that are several modalities."""
    sides = dict.fromkeys(side for each in directions for side in (each.query, each.gallery))
    return [side for side in sides if len(side) > 1]


def learned_fusion(model: AnyModel, directions: Sequence[Direction]) -> Fuse:
    """What a model has learned to make of the sets in ``directions``.

    Raises:
        ConfigError: no direction has a set, or the model has no fusion of one of them.
    """
    sets = sets_in(directions)
    if not sets:
        raise ConfigError("learned fusion: no direction has a set of modalities, such as text->video+audio")
    towers = {name: model.tower_of(name) for side in sets for name in side}
    for side in sets:
        model.fusions.of(towers[name] for name in side)

    def fuse(rows: Mapping[Modality, Tensor]) -> Tensor:
        together = torch.cat(list(rows.values()), 1)
        if not len(together):
            return torch.zeros(0, model.joint_width)
        distinct = Distinct(together)  # a matrix product may round equal rows differently, and equal items must tie
        parts = torch.split(distinct.rows, [x.shape[1] for x in rows.values()], 1)
        given = {towers[name]: part for name, part in zip(rows, parts, strict=True)}
        blocks = [
            model.fuse({tower: part[start : start + _BLOCK] for tower, part in given.items()})
            for start in range(0, len(distinct.rows), _BLOCK)
        ]
        return torch.cat(blocks)[torch.from_numpy(distinct.place)]

    return fuse


def joined(rows: Mapping[Modality, ModalityRows], modalities: Sequence[Modality], fuse: Fuse) -> ModalityRows:
    """The rows of one modality; of several one row of an item's, by ``fuse``.

    Items that lack one of them have no row. Each caption of an item makes a row of its own with the item's others.
    """
    first, *others = sorted(modalities, key=lambda name: name != "text")
    base = rows[first]
    if not others:
        return base
    keep = np.ones(len(base.items), bool)
    places = {first: np.arange(len(base.items))}
    for name in others:
        numbers, firsts = np.unique(rows[name].items, return_index=True)
        where = np.minimum(np.searchsorted(numbers, base.items), max(0, len(numbers) - 1))
        keep &= numbers[where] == base.items if len(numbers) else False
        places[name] = firsts[where] if len(numbers) else where
    kept = np.flatnonzero(keep)
    captions = None if base.captions is None else base.captions[kept]
    values = {name: rows[name].embeddings[torch.from_numpy(place[kept])] for name, place in places.items()}
    return ModalityRows(fuse(values), base.items[kept], captions)


def _caption_numbers(owners: Integers) -> Integers:
    """0, 1, … within each run of equal owners."""
    starts = np.flatnonzero(np.r_[True, owners[1:] != owners[:-1]])
    return np.arange(len(owners)) - np.repeat(starts, np.diff(np.r_[starts, len(owners)]))
