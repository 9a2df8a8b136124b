"""Contrast between modalities: clips of one sample attract, those of different samples repel, pair by pair."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from mmcl.config import Options
from mmcl.distributed import Comm, Form, Pair, contrastive_pairs
from mmcl.objectives.base import Objective, Term
from mmcl.objectives.pairs import Members, checked_sets
from mmcl.objectives.weights import Weight
from mmcl.types import ConfigError, Embeddings, Need, TextSpec, TowerInfo, View

SHARED = "shared"
"""the name of the temperature that all pairs share"""

OWN_OPTIONS = {"sigma": "dclw", "detach_weight": "dclw", "smoothing": "clip_label_smoothing", "start_bias": "siglip"}
"""option: the only estimator that has it"""


class CrossModalOptions(Options):
    """Symmetric contrast between pairs of towers; CLIP's by default (Radford et al. 2021, arXiv 2103.00020).

    A side of a pair may be a set of towers, such as ``video+audio``: one row of all, by a fusion that is learned with
    them (Shvetsova et al. 2022, arXiv 2112.04446, contrast sets; their fusion is a transformer over tokens). Ours adds
    an MLP of the joint rows to their sum: normalise(Σ rows + MLP(rows)). Its last layer starts at zero, so it starts as
    their mean. ``mmcl evaluate retrieval --join learned`` ranks by it, ``model.fuse`` gives its rows.

    Needs: two towers in one joint space. Samples that lack a tower of a pair take no part in that pair.
    """

    name: Literal["cross_modal"] = "cross_modal"
    weight: Weight = 1.0
    pairs: Annotated[tuple[tuple[str, str], ...], Field(min_length=1)] | None = None
    """towers to contrast, e.g. ``[[video, text], [audio, text]]``; null: every pair of towers. A side may be a set,
    ``[text, video+audio]``: the rows of its towers as one (``model.fusion``), of samples that have all of them"""
    estimator: Literal["infonce", "siglip", "dcl", "dclw", "clip_label_smoothing"] = "infonce"
    """CLIP's InfoNCE; a sigmoid per pair of rows (arXiv 2303.15343); InfoNCE without the positive in the sum, or its
    positives weighted too (arXiv 2110.06848, without the terms inside a modality); InfoNCE with smoothed targets"""
    sigma: Annotated[float, Field(gt=0)] = 0.5
    """dclw: a positive weighs 2 − N·softmax(cosine / sigma), of mean 1"""
    detach_weight: bool = True
    """dclw: the weight is a number, not something to learn through (the paper; a known implementation differs)"""
    smoothing: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """clip_label_smoothing: share of the target that is spread evenly over all candidates (arXiv 2305.08675)"""
    start_bias: float = -10.0
    """siglip: where its learned bias starts"""
    start_temperature: Annotated[float, Field(gt=0.01, le=10)] | None = None
    """where the learned temperatures start; null: at ``model.temperature``, for siglip at 0.1 as in the paper"""
    shared_temperature: bool = False
    """one temperature (and bias) for all pairs, not one per pair"""
    hard_quantile: Annotated[float, Field(gt=0, le=1)] = 1.0
    """share of the negatives that count: of the M that a row has over all ranks the ⌈share·M⌉ of highest cosine, for
    each row and direction of its own, ties included (arXiv 2012.09740); siglip: half for the row, half for the column
    """
    captions: Annotated[int, Field(ge=1, le=16)] = 1
    """captions of a sample that are positives of its clip, each against the negatives alone; the mean over them counts.
    They are different ones; a sample with fewer has fewer. In pairs of a text tower with another modality"""
    unpaired_negatives: bool = False
    """rows that have only one side of a pair are negatives of the others' pairs too"""
    mask_false_negatives: bool = True
    """samples of equal key, group or with an equal caption are never each other's negatives"""

    @model_validator(mode="after")
    def _belongs(self) -> CrossModalOptions:
        for option, estimator in OWN_OPTIONS.items():
            changed = getattr(self, option) != type(self).model_fields[option].default
            if changed and self.estimator != estimator:
                raise ValueError(f"{option} belongs to estimator {estimator!r}, this one is {self.estimator!r}")
        return self


Side = tuple[tuple[Need, ...], ...]
"""of one caption, or of each of several, the views of the towers whose rows are one"""


class CrossModal(Objective):
    """The mean over pairs of the contrastive loss of their joint embeddings, exact over all ranks."""

    pools = True

    def __init__(self, options: CrossModalOptions, pairs: Mapping[str, tuple[Side, Side]]) -> None:
        super().__init__()
        self.options = options
        self.pairs = dict(pairs)
        rows = [needs for pair in self.pairs.values() for side in pair for needs in side]
        self.needs = tuple(dict.fromkeys(need for needs in rows for need in needs))
        self.fusions = tuple(dict.fromkeys(_name([need.tower for need in needs]) for needs in rows if len(needs) > 1))
        self.watched = tuple(f"loss/{name}" for name in self.pairs)
        self.form = Form(
            options.estimator,
            sigma=options.sigma,
            detach_weight=options.detach_weight,
            smoothing=options.smoothing,
            hard_quantile=options.hard_quantile,
        )
        siglip = options.estimator == "siglip"
        # a sigmoid wants another temperature than a softmax of the same pair
        own = {name: SHARED if options.shared_temperature else name for name in self.pairs}
        self.scale_of = {name: f"{scale}-siglip" if siglip else scale for name, scale in own.items()}
        self.scales = tuple(dict.fromkeys(self.scale_of.values()))
        start = 0.1 if siglip and options.start_temperature is None else options.start_temperature
        self.start_temperatures = {} if start is None else dict.fromkeys(self.scales, start)
        self.biases = nn.ParameterDict({name: torch.tensor(options.start_bias) for name in self.scales if siglip})

    def forward(self, embeddings: Embeddings, comm: Comm) -> Term:
        found = contrastive_pairs(
            [self._pair(embeddings, name) for name in self.pairs],
            comm=comm,
            unpaired_negatives=self.options.unpaired_negatives,
            form=self.form,
        )
        metrics = {}
        for name, (loss, pairs) in zip(self.pairs, found, strict=True):
            metrics[f"loss/{name}"] = loss.detach()
            metrics[f"pairs/{name}"] = pairs
        for name, bias in self.biases.items():
            metrics[f"bias/{name}"] = bias.detach()
        return Term(torch.stack([loss for loss, _ in found]).mean(), metrics)

    def _pair(self, embeddings: Embeddings, name: str) -> Pair:
        a, b = self.pairs[name]
        groups, groups_b = self._groups(embeddings, b)
        scale = self.scale_of[name]
        return Pair(
            embeddings.fused(a[0]),
            _stack([embeddings.fused(needs) for needs in b]),
            embeddings.scales[scale],
            present_a=_present(embeddings, a[0]),
            present_b=_stack([_present(embeddings, needs) for needs in b]),
            groups=groups,
            groups_b=groups_b,
            bias=self.biases.get(scale, 0.0),
            pools=embeddings.batch.pools,
        )

    def _groups(self, embeddings: Embeddings, captions: Side) -> tuple[Tensor | None, Tensor | None]:
        """Numbers of both sides: those of the batch, and every caption of one sample beside every one of the other."""
        if not self.options.mask_false_negatives:
            return None, None
        groups = embeddings.batch.groups
        params = [embeddings.batch.views[need.view].params for needs in captions for need in needs]
        numbers = [found["caption_number"] for found in params if "caption_number" in found]
        if len(captions) == 1 or not numbers:
            return groups, None
        sides = zip(*product(numbers, numbers), strict=True)
        a, b = (torch.cat([groups, torch.stack(side, 1)], 1) for side in sides)
        return a, b


def _present(embeddings: Embeddings, needs: Sequence[Need]) -> Tensor:
    return embeddings.present(*(need.view for need in needs))


def _name(towers: Sequence[str]) -> str:
    """Of a side, in the model's order."""
    return "+".join(towers)


def _stack(values: list[Tensor]) -> Tensor:
    """``(B, …)`` of one, ``(B, K, …)`` of several."""
    return values[0] if len(values) == 1 else torch.stack(values, 1)


def build(options: CrossModalOptions, towers: Mapping[str, TowerInfo], path: str = "objectives.0") -> CrossModal:
    """The objective for these towers.

    Raises:
        ConfigError: pairs that cannot be, see :func:`checked_sets`; or several captions are asked for and no pair has
            a text tower and another.
    """
    pairs = {
        f"{_name(a)}-{_name(b)}": _sides(a, b, towers, options.captions)
        for a, b in checked_sets(options.pairs, towers, path, options.name)
    }
    if options.captions > 1 and all(len(b) == 1 for _, b in pairs.values()):
        raise ConfigError(f"{path}.captions: {options.captions}, but no pair is of a text tower and another modality")
    return CrossModal(options, pairs)


def _sides(a: Members, b: Members, towers: Mapping[str, TowerInfo], captions: int) -> tuple[Side, Side]:
    """What a pair needs, its captions on the second side; the loss is the same from either."""
    texts = [[isinstance(towers[name].spec, TextSpec) for name in side] for side in (a, b)]
    if any(texts[0]) and not any(texts[1]):
        a, b, texts = b, a, texts[::-1]
    several = any(texts[1]) and not any(texts[0])
    return (_needs(a, towers, 0),), tuple(_needs(b, towers, k) for k in range(captions if several else 1))


def _needs(members: Members, towers: Mapping[str, TowerInfo], caption: int) -> tuple[Need, ...]:
    """The first clip of each tower; of texts this caption."""
    infos = [towers[name] for name in members]
    clips = [caption if isinstance(info.spec, TextSpec) else 0 for info in infos]
    return tuple(
        Need(info.name, View(info.spec, clip=clip), ("joint",)) for info, clip in zip(infos, clips, strict=True)
    )
