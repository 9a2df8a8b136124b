"""Few-shot episodes: how well the mean of a few examples of a class stands for it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mmcl.hashing import hash64

_CLASSES, _ROWS = 34, 35
"""what random numbers are for"""


@dataclass(frozen=True)
class FewShotResult:
    """Accuracies of episodes, in percent."""

    mean: float
    half_width: float
    """of the 95 % interval of the mean over episodes"""
    episodes: int
    ways: int
    shots: int
    queries: int
    """of each class in an episode"""
    usable_classes: int
    """classes with enough rows"""


def few_shot(
    rows: Tensor,
    labels: Tensor,
    *,
    ways: int = 5,
    shots: int = 1,
    queries: int = 15,
    episodes: int = 600,
    seed: int = 0,
) -> FewShotResult:
    """Draws ``ways`` classes with ``shots`` examples each, and asks for the class of ``queries`` other rows of each.

    The answer is the nearest prototype, the unit mean of the examples' unit rows, by cosine; classes at the same cosine
    share the point. Episodes are a pure function of ``seed`` and the labels.

    Args:
        rows: float ``(n, D)``, normalised inside.
        labels: int64 ``(n,)``.

    Raises:
        ValueError: fewer than ``ways`` classes have ``shots + 1`` rows, or a number is below what it must be.

    Source: Snell et al. 2017 (arXiv 1703.05175), with cosines as Wang et al. 2019 (arXiv 1911.04623).
    """
    if ways < 2 or min(shots, queries, episodes) < 1:
        raise ValueError(f"need ways >= 2 and shots, queries, episodes >= 1, got {(ways, shots, queries, episodes)}")
    known = labels.cpu().numpy()
    members = [np.flatnonzero(known == label) for label in np.unique(known)]
    usable = [rows_of for rows_of in members if len(rows_of) > shots]
    if len(usable) < ways:
        raise ValueError(f"{len(usable)} classes have at least {shots + 1} rows; {ways} are needed")
    queries = min(queries, min(map(len, usable)) - shots)
    unit = F.normalize(rows, dim=1)
    accuracies = [_episode(unit, usable, ways, shots, queries, seed, number) for number in range(episodes)]
    spread = float(np.std(accuracies, ddof=1)) if episodes > 1 else math.nan
    half = 1.959963984540054 * spread / math.sqrt(episodes)
    return FewShotResult(float(np.mean(accuracies)), half, episodes, ways, shots, queries, len(usable))


def _episode(
    unit: Tensor, usable: list[np.ndarray], ways: int, shots: int, queries: int, seed: int, number: int
) -> float:
    classes = np.argsort(hash64(seed, number, _CLASSES, np.arange(len(usable))), kind="stable")[:ways]
    drawn = np.stack(
        [
            usable[each][np.argsort(hash64(seed, number, _ROWS, usable[each]), kind="stable")[: shots + queries]]
            for each in classes.tolist()
        ]
    )
    found = unit[torch.from_numpy(drawn).to(unit.device)]
    prototypes = F.normalize(found[:, :shots].mean(1), dim=1)
    cosines = found[:, shots:] @ prototypes.T  # (ways, queries, ways)
    own = cosines.diagonal(dim1=0, dim2=2).T[..., None]
    better, equal = (cosines > own).sum(-1), (cosines == own).sum(-1)
    return 100 * float(torch.where(better == 0, 1 / equal, 0).mean())
