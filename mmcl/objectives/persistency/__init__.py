"""Spatiotemporal persistency: clips of one recording, far apart in time, agree (Feichtenhofer et al. 2021)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal, TypeAlias

from pydantic import Field

from mmcl.config import Options
from mmcl.objectives.base import Objective
from mmcl.objectives.persistency import byol, moco, simclr, swav
from mmcl.objectives.persistency.byol import PersistencyBYOLOptions
from mmcl.objectives.persistency.moco import PersistencyMoCoOptions
from mmcl.objectives.persistency.simclr import PersistencySimCLROptions
from mmcl.objectives.persistency.swav import PersistencySwAVOptions
from mmcl.objectives.views import Reduction, ViewSet, learning_tower
from mmcl.objectives.weights import Weight
from mmcl.types import ConfigError, TextSpec, TowerInfo, View

PersistencyMethod: TypeAlias = Annotated[
    PersistencySimCLROptions | PersistencyMoCoOptions | PersistencyBYOLOptions | PersistencySwAVOptions,
    Field(discriminator="name"),
]


class PersistencyOptions(Options):
    """ρSimCLR, ρMoCo, ρBYOL or ρSwAV over ρ clips of each sample (arXiv 2104.14558)."""

    name: Literal["persistency"] = "persistency"
    weight: Weight = 1.0
    tower: str
    method: PersistencyMethod
    rho: Annotated[int, Field(ge=1, le=4)] = 2
    """clips of a sample at different times; 1: one clip, augmented twice"""
    augmentation: str = "none"
    """a name in ``data.augmentations``; each clip is a draw of its own"""
    reduction: Reduction = "sum"
    """over asking clips (simclr: neighbours); ``sum``, the authors', makes gradients grow with ρ"""


def build(options: PersistencyOptions, towers: Mapping[str, TowerInfo], path: str = "objectives.0") -> Objective:
    """The objective for these towers.

    Raises:
        ConfigError: an unknown or frozen tower, or one whose modality has no time.
    """
    tower = learning_tower(options.tower, towers, f"{path}.tower")
    if isinstance(tower.spec, TextSpec):
        raise ConfigError(f"{path}.tower: {tower.name!r} is a text tower; clips at several times need video or audio")
    clips = [(0, 0), (0, 1)] if options.rho == 1 else [(i, 0) for i in range(options.rho)]
    views = tuple(View(tower.spec, clip=i, augmentation=options.augmentation, copy=j) for i, j in clips)
    chosen = ViewSet(tower, views, options.reduction)
    match options.method:
        case PersistencySimCLROptions():
            return simclr.build(chosen, options.method)
        case PersistencyMoCoOptions():
            return moco.build(chosen, options.method)
        case PersistencyBYOLOptions():
            return byol.build(chosen, options.method)
        case PersistencySwAVOptions():
            return swav.build(chosen, options.method)
