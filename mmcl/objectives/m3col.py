"""Contrast of mixed samples, then of soft targets, beside heads that name classes (M3CoL)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from mmcl.config import Options, unknown_name
from mmcl.distributed import Comm
from mmcl.hashing import uniform
from mmcl.layers import MLPHead
from mmcl.losses.mixup import soft_clip_rows, soft_target_contrast
from mmcl.media.augmentation_draws import BETA_TRIES, beta_share
from mmcl.media.mixing import GLOBAL, RANK, ring
from mmcl.objectives.base import Objective, Term
from mmcl.objectives.ranks import classification, related_rows
from mmcl.objectives.views import PositiveFloat, PositiveInt, unit_rows
from mmcl.objectives.weights import Share, Weight
from mmcl.types import ConfigError, Embeddings, Level, Need, TextSpec, TowerInfo, VectorSpec, View

_SHARE = 57
"""what the random numbers of mixed embeddings are for"""


class M3CoLOptions(Options):
    """Mixup contrast of modalities, then soft contrast, with labels or without (M3CoL; arXiv 2409.17777).

    A row of one modality is mixed with another sample's and should find both samples in the next modality, in the
    shares of the mix; after ``mixed_share`` of the run, rows should find those that their partner is alike. Targets are
    added where the authors' code assigns them, so a row that meets itself keeps its weight of 1; the others are drawn
    from the batch of all ranks by draw numbers, the same on any number of ranks. The contrast is of joint embeddings,
    unimodal heads and the head over all modalities read ``pooled``, zeros for a missing one.

    Needs: two or three towers in one joint space, of which one learns; with ``classes`` labels, where rows without one
    have the contrast alone. Inputs are mixed by an augmentation with ``mix: {share: [0, 1], beta: 0.15, probability:
    0.5}``.
    """

    name: Literal["m3col"] = "m3col"
    weight: Weight = 1.0
    towers: Annotated[tuple[str, ...], Field(min_length=2, max_length=3)] | None = None
    """in cyclic order: each is mixed and looks into the next; of two both ways. null: all towers"""
    inputs: dict[str, str] = Field(default_factory=dict)
    """tower: a name in ``data.augmentations`` that mixes its raw inputs, which is a second forward (also once the soft
    contrast does without it); the embeddings of towers that are not named are mixed (the paper mixes inputs but those
    of text, its code all embeddings)"""
    beta: Annotated[float, Field(gt=0, le=1)] = 0.15
    """embeddings: the share of the other one is drawn from Beta(x, x)"""
    mixed_rows: Share = 0.5
    """embeddings: chance of a row to be mixed"""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """embeddings: of the shares and of who meets whom, with the draw numbers of the rows"""
    mixed_share: Share = 0.33
    """of the run's optimizer steps, before the contrast of mixed rows gives way to the soft one; 1: never"""
    fade: Share = 0.0
    """share of the run over which it does, linearly; 0: at once, as in the paper"""
    temperature: PositiveFloat = 0.1
    """of the contrast of mixed rows"""
    soft_temperature: PositiveFloat = 0.125
    """of the soft contrast and its targets"""
    detach_targets: bool = True
    """soft targets have no gradient; the authors' code learns through them too"""
    contrast: Annotated[float, Field(ge=0)] | None = None
    """weight of the sum of both or all three directions; null: 0.1 with classes as in the paper, 1 without"""
    classes: Annotated[int, Field(ge=2)] | None = None
    """how many labels there are; null: no heads, the contrast alone"""
    hidden: PositiveInt = 256
    """width inside the heads, which have three layers"""
    mask_false_negatives: bool = True
    """mixed rows: samples of equal key, caption or group are never each other's negatives"""


@dataclass(frozen=True, eq=False)
class _Mixed:
    """Own rows of one modality after mixing: ``(1 − share) · row + share · partner's``."""

    rows: Tensor
    """``(B, D)``"""
    share: Tensor
    """``(B,)`` of the partner"""
    partners: Tensor
    """int64 ``(B,)``, global row numbers; rows without a partner name themselves"""


class M3CoL(Objective):
    """Own rows against those of all ranks, ``directions · B · N`` similarities at once."""

    def __init__(
        self,
        options: M3CoLOptions,
        towers: Sequence[TowerInfo],
        needs: Mapping[str, Need],
        mixed_needs: Mapping[str, Need],
    ) -> None:
        super().__init__()
        self.options = options
        self.clean, self.mixed = dict(needs), dict(mixed_needs)
        self.needs = (*needs.values(), *mixed_needs.values())
        self.mixing = {
            f"inputs.{name}": (need.view.modality, need.view.augmentation) for name, need in self.mixed.items()
        }
        names = list(needs)
        self.directions = list(zip(names, [*names[1:], names[0]], strict=True))
        self.heads = nn.ModuleDict()
        with_classes = options.classes is not None
        self.contrast_weight = (0.1 if with_classes else 1.0) if options.contrast is None else options.contrast
        if options.classes is not None:
            self.labels_option = "classes"
            widths = {tower.name: tower.width for tower in towers}
            for name, width in [*widths.items(), ("", sum(widths.values()))]:
                self.heads[f"of_{name}" if name else "fused"] = MLPHead(width, options.hidden, options.classes, 3)

    def forward(self, embeddings: Embeddings, comm: Comm) -> Term:
        soft = self.soft_share(embeddings.progress)
        with torch.autocast(embeddings.batch.draws.device.type, enabled=False):
            terms = []
            if soft < 1:
                each = [self._mixed_contrast(a, b, embeddings, comm) for a, b in self.directions]
                terms.append((1 - soft) * torch.stack(each).sum())
            if soft > 0:
                each = [self._soft_contrast(a, b, embeddings, comm) for a, b in self.directions]
                terms.append(soft * torch.stack(each).sum())
        contrast = torch.stack(terms).sum()
        losses = {"contrast": contrast, **self._named(embeddings, comm)}
        metrics = {f"loss/{name}": loss.detach() for name, loss in losses.items()}
        metrics["soft"] = contrast.new_tensor(soft).detach()
        total = torch.stack([self.contrast_weight * contrast, *(x for n, x in losses.items() if n != "contrast")]).sum()
        return Term(total, metrics)

    def soft_share(self, progress: float) -> float:
        """How much the soft contrast counts, in [0, 1], after this share of the run."""
        over = progress - self.options.mixed_share
        if self.options.mixed_share == 1 or over < 0:
            return 0.0
        return min(over / self.options.fade, 1.0) if self.options.fade else 1.0

    def _named(self, embeddings: Embeddings, comm: Comm) -> dict[str, Tensor]:
        """Cross-entropy of each modality's head, and of the head over all of them."""
        if not self.heads:
            return {}
        labels = embeddings.batch.labels
        pooled = {name: embeddings.get(need, "pooled") for name, need in self.clean.items()}
        here = {name: embeddings.present(need.view) for name, need in self.clean.items()}
        losses = {
            name: classification(self.heads[f"of_{name}"](rows), labels, here[name], comm)
            for name, rows in pooled.items()
        }
        fused = self.heads["fused"](torch.cat(list(pooled.values()), 1))
        return {**losses, "fused": classification(fused, labels, torch.stack(list(here.values())).any(0), comm)}

    def _mixed_contrast(self, a: str, b: str, embeddings: Embeddings, comm: Comm) -> Tensor:
        """M3Co of rows of ``a`` that are mixed and rows of ``b`` that are not, the mean over the mixed rows."""
        both = embeddings.present(self.clean[a].view, self.clean[b].view)
        everyone_both = comm.gather(both)
        mixed = self._mixed_inputs(a, embeddings, comm) if a in self.mixed else self._mix(a, both, embeddings, comm)
        # who was mixed with a sample that lacks the other modality has half of a target
        asks = both & (everyone_both[mixed.partners] | (mixed.share == 0))
        number = comm.index(len(both), both.device)
        everyone = {k: comm.gather(x) for k, x in (("asks", asks), ("share", mixed.share), ("met", mixed.partners))}
        columns = torch.arange(len(everyone_both), device=both.device)
        itself = number[:, None] == columns
        kept, given = 1 - mixed.share[:, None], mixed.share[:, None]
        forward = itself * kept + (mixed.partners[:, None] == columns) * given
        met = everyone["met"] == number[:, None]
        backward = itself * (1 - everyone["share"]) + met * everyone["share"]
        related = torch.zeros_like(itself)
        if self.options.mask_false_negatives:
            related = related_rows(embeddings.batch.groups, comm)
        rows, others = unit_rows(mixed.rows), unit_rows(embeddings.get(self.clean[b], "joint"))
        values = [
            soft_target_contrast(
                queries,
                comm.gather(candidates),
                targets.to(queries.dtype),
                ~there | (related & (targets == 0)),
                temperature=self.options.temperature,
            ).masked_fill(~takes_part, 0)
            for queries, candidates, targets, there, takes_part in (
                (rows, others, forward, everyone_both, asks),
                (others, rows, backward, everyone["asks"], both),
            )
        ]
        return comm.share(torch.stack(values).sum() / 2 / comm.sum(asks.sum()).clamp_min(1))

    def _mix(self, name: str, present: Tensor, embeddings: Embeddings, comm: Comm) -> _Mixed:
        """Embeddings mixed with those of other present rows of all ranks."""
        rows, draws = unit_rows(embeddings.get(self.clean[name], "joint")), embeddings.batch.draws
        own = comm.index(len(draws), draws.device)
        partners = ring(comm.gather(draws), comm.gather(present), self.options.seed)[own]
        # one number says whether, two for each try how much
        drawn = uniform(self.options.seed, _SHARE, draws.cpu().numpy()[:, None], np.arange(1 + 2 * BETA_TRIES))
        tries = drawn[:, 1:].reshape(len(draws), 2, BETA_TRIES).swapaxes(0, 1)
        share = beta_share(self.options.beta, tries) * (drawn[:, 0] < self.options.mixed_rows)
        wide = torch.from_numpy(share).to(rows)
        return _Mixed(torch.lerp(rows, comm.gather(rows)[partners], wide[:, None]), wide, partners)

    def _mixed_inputs(self, name: str, embeddings: Embeddings, comm: Comm) -> _Mixed:
        """Embeddings of inputs that were mixed before the tower saw them."""
        need = self.mixed[name]
        params = embeddings.batch.views[need.view].params
        share = params[RANK] if RANK in params else params[GLOBAL]
        found = params["mix_draw"][:, None] == comm.gather(embeddings.batch.draws)
        partners = comm.index(len(found), found.device)
        if found.numel():  # argmax takes no row without columns
            partners = torch.where(found.any(1), found.int().argmax(1), partners)
        rows = unit_rows(embeddings.get(need, "joint"))
        return _Mixed(rows, share.to(rows.dtype), partners)

    def _soft_contrast(self, a: str, b: str, embeddings: Embeddings, comm: Comm) -> Tensor:
        """SoftClip of rows of ``a`` and ``b``, the latter say who is alike."""
        both = embeddings.present(self.clean[a].view, self.clean[b].view)
        first, second = (unit_rows(embeddings.get(self.clean[name], "joint")) for name in (a, b))
        values = soft_clip_rows(
            (first, second),
            (comm.gather(first), comm.gather(second)),
            (~comm.gather(both)).expand(len(both), -1),
            temperature=self.options.soft_temperature,
            detach_targets=self.options.detach_targets,
        )
        return comm.mean(values, both)


def build(options: M3CoLOptions, towers: Mapping[str, TowerInfo], path: str = "objectives.0") -> M3CoL:
    """The objective for these towers.

    Raises:
        ConfigError: a tower is unknown or named twice, there are not two or three, none learns, their joint spaces are
            of different width, or inputs of a tower are to be mixed that are texts or stored; names ``path``.
    """
    names = tuple(towers) if options.towers is None else options.towers
    for number, name in enumerate(names):
        if name not in towers:
            raise unknown_name(f"{path}.towers.{number}", name, towers)
        if name in names[:number]:
            raise ConfigError(f"{path}.towers.{number}: {name!r} is already in the list")
    if not 2 <= len(names) <= 3:
        raise ConfigError(f"{path}.towers: two or three are compared, got {', '.join(names) or 'none'}")
    widths = {name: towers[name].joint_width for name in names}
    if len(set(widths.values())) > 1:
        raise ConfigError(f"{path}.towers: the towers lie in spaces of different width: {widths}")
    if not any(towers[name].trainable or towers[name].trainable_head for name in names):
        raise ConfigError(f"{path}.towers: none of {', '.join(names)} learns")
    for name in options.inputs:
        if name not in names:
            raise unknown_name(f"{path}.inputs", name, names)
        if isinstance(towers[name].spec, TextSpec | VectorSpec):
            raise ConfigError(f"{path}.inputs.{name}: only inputs of video and audio are mixed; leave it out")
    levels: tuple[Level, ...] = ("joint",) if options.classes is None else ("joint", "pooled")
    clean = {name: Need(name, View(towers[name].spec), levels) for name in names}
    mixed = {
        name: Need(name, View(towers[name].spec, augmentation=augmentation))
        for name, augmentation in options.inputs.items()
    }
    return M3CoL(options, [towers[name] for name in names], clean, mixed)
