"""Contrast of any number of views and modalities at once: all views of a sample are one positive."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

import torch
from pydantic import Field

from mmcl.config import Options, unknown_name
from mmcl.distributed import Comm
from mmcl.losses._math import unit
from mmcl.losses.multi_view import mv_dhel_rows, mv_info_nce_rows
from mmcl.objectives.base import Objective, Term
from mmcl.objectives.ranks import related_rows
from mmcl.objectives.weights import Weight
from mmcl.types import TIMED, ConfigError, Embeddings, Need, TowerInfo, View


class MultiViewOptions(Options):
    """MV-DHEL and MV-InfoNCE over views of one or of several towers (Koromilas et al. 2025, arXiv 2507.06979).

    Needs: two views at least, of one tower or of several in one joint space. A sample with two of the views takes part;
    the sums over those that it has stand for the missing ones by their mean.
    """

    name: Literal["multi_view"] = "multi_view"
    weight: Weight = 1.0
    method: Literal["mv_dhel", "mv_info_nce"] = "mv_dhel"
    views: Annotated[dict[str, Annotated[int, Field(ge=1, le=32)]], Field(min_length=1)] | None = None
    """tower: number of its views, e.g. ``{video: 2, text: 1}``; null: one of every tower"""
    augmentation: dict[str, str] = Field(default_factory=dict)
    """tower: a name in ``data.augmentations``; each view is a draw of its own"""
    windows: Literal["same", "different"] = "same"
    """all views of one time window, or each of a tower's views of its own"""
    temperature: Annotated[float, Field(gt=0)] = 0.1
    """0.5 for CIFAR and 0.1 for ImageNet in the paper"""
    negatives: Literal["cross", "all"] = "cross"
    """mv_info_nce: others in other views, as the paper has it, or in the same view too, as its code does"""
    mask_false_negatives: bool = True
    """samples of equal key, group or with an equal caption are never each other's negatives"""


class MultiViewContrast(Objective):
    """Own samples against those of all ranks, ``views² · B · N`` similarities at once."""

    def __init__(self, options: MultiViewOptions, needs: tuple[Need, ...]) -> None:
        super().__init__()
        self.options, self.needs = options, needs

    def forward(self, embeddings: Embeddings, comm: Comm) -> Term:
        rows = torch.stack([embeddings.get(need) for need in self.needs])
        own = unit(rows if rows.dtype == torch.float64 else rows.float())  # (V, B, D)
        has = torch.stack([embeddings.present(need.view) for need in self.needs])  # (V, B)
        has = has & (has.sum(0) >= 2)
        everyone = comm.gather(own.transpose(0, 1)).transpose(0, 1)
        everyone_has = comm.gather(has.T).T
        itself = comm.index(has.shape[1], own.device)
        others = everyone_has.any(0) & (torch.arange(everyone.shape[1], device=own.device) != itself[:, None])
        if self.options.mask_false_negatives:
            others &= ~related_rows(embeddings.batch.groups, comm)
        known = (own, has, everyone, everyone_has, itself, others)
        takes_part = has.any(0)
        with torch.autocast(own.device.type, enabled=False):
            if self.options.method == "mv_info_nce":
                values = mv_info_nce_rows(
                    *known, temperature=self.options.temperature, within=self.options.negatives == "all"
                )
            else:
                values = mv_dhel_rows(*known, temperature=self.options.temperature)
                takes_part = takes_part & (has & (others[None] & everyone_has[:, None]).any(2)).any(0)
        views = comm.mean(has.sum(0).to(own.dtype), has.any(0)).detach()
        return Term(comm.mean(values, takes_part), {"views": views})


def build(options: MultiViewOptions, towers: Mapping[str, TowerInfo], path: str = "objectives.0") -> MultiViewContrast:
    """The objective for these towers.

    Raises:
        ConfigError: an unknown tower, fewer than two views, or joint spaces of different width; names ``path``.
    """
    wanted = dict.fromkeys(towers, 1) if options.views is None else options.views
    for option, names in (("views", wanted), ("augmentation", options.augmentation)):
        for name in names:
            if name not in towers:
                raise unknown_name(f"{path}.{option}", name, towers)
    if sum(wanted.values()) < 2:
        raise ConfigError(f"{path}.views: two views at least are compared, got {wanted}")
    widths = {name: towers[name].joint_width for name in wanted}
    if len(set(widths.values())) > 1:
        raise ConfigError(f"{path}.views: the towers lie in spaces of different width: {widths}")
    if not any(towers[name].trainable for name in wanted):
        raise ConfigError(f"{path}.views: none of {', '.join(wanted)} learns")
    needs = tuple(
        Need(name, _view(towers[name], number, options)) for name, count in wanted.items() for number in range(count)
    )
    return MultiViewContrast(options, needs)


def _view(tower: TowerInfo, number: int, options: MultiViewOptions) -> View:
    augmentation = options.augmentation.get(tower.name, "none")
    if options.windows == "different" and isinstance(tower.spec, TIMED):
        return View(tower.spec, clip=number, augmentation=augmentation)
    return View(tower.spec, augmentation=augmentation, copy=number)
