"""The sides of a direction: the rows of a modality, or of a set of modalities as one."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F

from mmcl.evaluation.distinct import Integers
from mmcl.evaluation.embed import EmbeddedShards
from mmcl.evaluation.protocols import ALL, Direction, parse_direction
from mmcl.evaluation.report import ModalityRows
from mmcl.types import ConfigError, Modality


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
    embedded: EmbeddedShards, items: Integers, directions: Sequence[Direction], captions: int | None = None
) -> dict[str, ModalityRows]:
    """The rows of every side of ``directions`` by its name, of some items; ``captions``: the first so many of each."""
    single = {}
    for modality, values in embedded.rows.items():
        owners = embedded.owners[modality].numpy()
        numbers = _caption_numbers(owners) if modality == "text" else np.zeros_like(owners)
        mine = np.flatnonzero(np.isin(owners, items) & (numbers < (captions or len(owners) + 1)))
        single[modality] = ModalityRows(values[mine], owners[mine], numbers[mine] if modality == "text" else None)
    sets = dict.fromkeys(side for direction in directions for side in (direction.query, direction.gallery))
    return {"+".join(each): joined(single, each) for each in sets}


def joined(rows: Mapping[Modality, ModalityRows], modalities: Sequence[Modality]) -> ModalityRows:
    """The rows of one modality; of several the mean of an item's rows, scaled to unit length.

    Items that lack one of them have no row. Each caption of an item makes a row of its own with the item's others.
    """
    first, *others = sorted(modalities, key=lambda name: name != "text")
    base = rows[first]
    if not others:
        return base
    keep = np.ones(len(base.items), bool)
    total = base.embeddings.clone()
    for name in others:
        numbers, places = np.unique(rows[name].items, return_index=True)
        where = np.minimum(np.searchsorted(numbers, base.items), max(0, len(numbers) - 1))
        there = numbers[where] == base.items if len(numbers) else np.zeros_like(keep)
        keep &= there
        if len(numbers):
            total += rows[name].embeddings[torch.from_numpy(places[where])]
    kept = np.flatnonzero(keep)
    captions = None if base.captions is None else base.captions[kept]
    return ModalityRows(F.normalize(total[torch.from_numpy(kept)], dim=1), base.items[kept], captions)


def _caption_numbers(owners: Integers) -> Integers:
    """0, 1, … within each run of equal owners."""
    starts = np.flatnonzero(np.r_[True, owners[1:] != owners[:-1]])
    return np.arange(len(owners)) - np.repeat(starts, np.diff(np.r_[starts, len(owners)]))
