"""Spatiotemporal persistency: clips of one recording, far apart in time, agree (Feichtenhofer et al. 2021)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal, TypeAlias

from pydantic import Field

from mmcl.config import Options
from mmcl.objectives.base import Objective
from mmcl.objectives.persistency import byol, moco, simclr, swav
from mmcl.objectives.persistency.byol import PersistencyBYOLOptions
from mmcl.objectives.persistency.moco import PersistencyMoCoOptions
from mmcl.objectives.persistency.simclr import PersistencySimCLROptions
from mmcl.objectives.persistency.swav import PersistencySwAVOptions
from mmcl.objectives.views import EraseViewsOptions, Reduction, ViewSet, erased, learning_tower
from mmcl.objectives.weights import Weight
from mmcl.types import TIMED, ConfigError, TowerInfo, View

PersistencyMethod: TypeAlias = Annotated[
    PersistencySimCLROptions | PersistencyMoCoOptions | PersistencyBYOLOptions | PersistencySwAVOptions,
    Field(discriminator="name"),
]


class PersistencyOptions(Options):
    """ρSimCLR, ρMoCo, ρBYOL or ρSwAV over ρ clips of each sample (arXiv 2104.14558).

    Needs: one tower of video or audio that learns, and samples longer than a clip; ``data.sampling`` says how far apart
    clips may lie. Methods moco and byol keep a momentum copy of the tower. With ``other`` a second tower that learns.

    ``erase`` adds background erasing (Wang et al. 2021, arXiv 2009.05769): asking clips are erased, their targets not.
    """

    name: Literal["persistency"] = "persistency"
    weight: Weight = 1.0
    tower: str
    method: PersistencyMethod
    rho: Annotated[int, Field(ge=1, le=4)] = 2
    """clips of a sample at different times; 1: one clip, augmented twice"""
    augmentation: str = "none"
    """a name in ``data.augmentations``; each clip is a draw of its own"""
    other: str | None = None
    """our addition: a second tower that learns with the first. A clip's positives are then the second tower's rows of
    other times, and the reverse; text lies in no time, so a caption goes with all clips. null: clips of ``tower`` alone
    """
    own_clips: bool = True
    """with ``other``: clips of the same tower attract each other as well"""
    erase: EraseViewsOptions | None = None
    """background erasing, of clips of ``tower`` alone"""
    reduction: Reduction = "sum"
    """over asking clips (simclr: neighbours); ``sum``, the authors', makes gradients grow with ρ"""


def build(options: PersistencyOptions, towers: Mapping[str, TowerInfo], path: str = "objectives.0") -> Objective:
    """The objective for these towers.

    Raises:
        ConfigError: an unknown or frozen tower, one whose modality has no time, one clip alone where two towers are
            to meet at different times, or erasing of what is no clip.
    """
    tower = learning_tower(options.tower, towers, f"{path}.tower")
    if not isinstance(tower.spec, TIMED):
        raise ConfigError(
            f"{path}.tower: {tower.name!r} is a {tower.modality} tower; clips at several times need video or audio"
        )
    clips = [(0, 0), (0, 1)] if options.rho == 1 else [(i, 0) for i in range(options.rho)]
    own = erased(_views(tower, clips, options), options.erase, tower, f"{path}.erase")
    chosen = ViewSet(tower, own, options.reduction)
    if options.other is not None:
        other = _other(options, towers, path)
        others = clips if isinstance(other.spec, TIMED) else [(0, 0)]
        chosen = ViewSet(tower, own, options.reduction, other, _views(other, others, options), options.own_clips)
    match options.method:
        case PersistencySimCLROptions():
            return simclr.build(chosen, options.method)
        case PersistencyMoCoOptions():
            return moco.build(chosen, options.method)
        case PersistencyBYOLOptions():
            return byol.build(chosen, options.method)
        case PersistencySwAVOptions():
            return swav.build(chosen, options.method)


def _other(options: PersistencyOptions, towers: Mapping[str, TowerInfo], path: str) -> TowerInfo:
    assert options.other is not None
    other = learning_tower(options.other, towers, f"{path}.other")
    if other.name == options.tower:
        raise ConfigError(f"{path}.other: {other.name!r} is the tower itself; its own clips are positives anyway")
    if options.rho == 1 and isinstance(other.spec, TIMED):
        raise ConfigError(f"{path}.rho: 1, but {other.modality} of another time needs at least 2 clips")
    return other


def _views(tower: TowerInfo, clips: Sequence[tuple[int, int]], options: PersistencyOptions) -> tuple[View, ...]:
    return tuple(View(tower.spec, clip=i, augmentation=options.augmentation, copy=j) for i, j in clips)
