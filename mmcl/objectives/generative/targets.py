"""What decoders predict: a text's tokens, codes for patches of pictures and blocks of sound, or these themselves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmcl.distributed import Comm
from mmcl.media.patches import audio_patches, video_patches, wave_blocks
from mmcl.objectives.generative.options import CodesOptions, PaletteOptions, PatchOptions, PatchValuesOptions
from mmcl.types import AudioSpec, ConfigError, TextSpec, TowerInfo, VideoSpec, ViewBatch

LEVEL_STEP, WAVE_STEP = 1 / 255, 2.0**-15
"""of what runs from 0 to 1 in 8 bits, and of a wave in 16"""
START = 0.25
"""deviation that a decoder says of every number before it has learned any"""


class Targets(nn.Module):
    """Tokens of a view, and how likely a decoder thinks they are."""

    vocabulary: int = 0
    """how many there are to choose from; 0: tokens are vectors of ``dims`` numbers"""
    dims: int = 1
    """numbers of the data that a token stands for"""
    step: float = 1.0
    """of those numbers, where :meth:`nats` are of a density: times this it is a probability"""

    @property
    def outputs(self) -> int:
        """Numbers that a decoder says of each token."""
        return self.vocabulary

    @property
    def vectors(self) -> int | None:
        """Width of the tokens; None: they are ids."""
        return None if self.vocabulary else self.dims

    def forward(self, view: ViewBatch) -> tuple[Tensor, Tensor]:
        """ids int64 ``(B, L)`` in 0 … vocabulary − 1, or float vectors ``(B, L, dims)``, and bool ``(B, L)``: which are
        there; no row of an absent one.
        """
        raise NotImplementedError

    def nats(self, said: Tensor, tokens: Tensor) -> Tensor:
        """−log p of each token ``(B, L)``, by what a decoder said of it, ``(B, L, outputs)``."""
        return F.cross_entropy(said.transpose(1, 2), tokens, reduction="none")

    def pending(self, views: Sequence[ViewBatch], present: Tensor, comm: Comm) -> dict[str, Tensor]:
        """What :meth:`commit` needs of the rows that are ``present (B,)``; most targets learn nothing."""
        return {}

    def commit(self, pending: Mapping[str, Tensor]) -> None:
        """After the optimizer step."""


class TextTokens(Targets):
    """The tokenizer's own."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.vocabulary = vocabulary

    def forward(self, view: ViewBatch) -> tuple[Tensor, Tensor]:
        real = torch.ones_like(view.data, dtype=torch.bool) if view.mask is None else view.mask
        return view.data, real & view.present[:, None]


class Patches(Targets):
    """The parts of a video or of sound, in order."""

    def __init__(self, patch: tuple[int, ...], detail: int | None) -> None:
        super().__init__()
        self.patch, self.detail = patch, detail

    @property
    def width(self) -> int:
        """Numbers of a patch's features."""
        if len(self.patch) == 1:
            return self.patch[0] if self.detail is None else self.detail**2
        if self.detail is None:
            return 3 * math.prod(self.patch)
        return 3 * min(self.detail, self.patch[1]) * min(self.detail, self.patch[2])

    def features(self, view: ViewBatch) -> Tensor:
        """``(B, L, width)`` in [0, 1]; in [−1, 1] the samples of a wave, which it is without ``detail``."""
        if len(self.patch) == 3:
            return video_patches(view.data, (self.patch[0], self.patch[1], self.patch[2]), self.detail)
        if self.detail is None:
            return wave_blocks(view.data, self.patch[0])
        return audio_patches(view.data, self.patch[0], self.detail**2)


class PatchTokens(Patches):
    """Numbers for them."""

    def forward(self, view: ViewBatch) -> tuple[Tensor, Tensor]:
        ids = self.quantised(self.features(view))
        return ids, view.present[:, None].expand_as(ids)

    def quantised(self, features: Tensor) -> Tensor:
        """int64 ``(B, L)`` of ``(B, L, D)``."""
        raise NotImplementedError


class Palette(PatchTokens):
    """Each of a patch's few numbers rounded down to one of ``levels``."""

    def __init__(self, patch: tuple[int, ...], levels: int) -> None:
        super().__init__(patch, detail=1)
        self.levels, self.dims = levels, 1 if len(patch) == 1 else 3
        self.vocabulary = levels**self.dims

    def quantised(self, features: Tensor) -> Tensor:
        steps = (features * self.levels).long().clamp(0, self.levels - 1)
        ids: Tensor = (steps * self.levels ** torch.arange(self.dims, device=steps.device)).sum(-1)
        return ids


class Codebook(PatchTokens):
    """The nearest of K vectors, each the moving average of the patches that were nearest to it on all ranks."""

    codes: Tensor
    """``(K, D)``"""
    counts: Tensor
    """``(K,)``: moving average of how many patches of a step were nearest"""
    sums: Tensor
    """``(K, D)``: of their sum"""

    def __init__(self, patch: tuple[int, ...], options: CodesOptions) -> None:
        super().__init__(patch, options.detail)
        self.vocabulary, self.momentum = options.count, options.momentum
        self.register_buffer("codes", torch.rand(options.count, self.width))
        self.register_buffer("counts", torch.zeros(options.count))
        self.register_buffer("sums", torch.zeros(options.count, self.width))

    @torch.no_grad()
    def quantised(self, features: Tensor) -> Tensor:
        return self._distances(features).argmin(-1)

    def _distances(self, features: Tensor) -> Tensor:
        """``(B, L, K)``: squared distance from each code, less the patch's own square."""
        with torch.autocast(features.device.type, enabled=False):
            return self.codes.square().sum(1) - 2 * features.to(self.codes.dtype) @ self.codes.T

    @torch.no_grad()
    def pending(self, views: Sequence[ViewBatch], present: Tensor, comm: Comm) -> dict[str, Tensor]:
        """Sums over all ranks, and of each row the patch that fits worst, the worst of all first."""
        features = torch.cat([self.features(view) for view in views], 1).to(self.codes.dtype)
        distance, ids = (self._distances(features) + features.square().sum(-1, keepdim=True)).min(-1)
        own, rows = ids[present].flatten(), features[present].flatten(0, 1)
        counts = comm.sum(torch.bincount(own, minlength=self.vocabulary).to(self.codes.dtype))
        sums = comm.sum(torch.zeros_like(self.sums).index_add_(0, own, rows))
        error, place = distance.max(1)
        worst = features[torch.arange(len(features), device=place.device), place]
        here = comm.gather(present)
        error, worst = comm.gather(error)[here], comm.gather(worst)[here]
        return {"counts": counts, "sums": sums, "worst": worst[error.argsort(descending=True, stable=True)]}

    @torch.no_grad()
    def commit(self, pending: Mapping[str, Tensor]) -> None:
        if not pending["counts"].any():
            return
        share = 1 - self.momentum
        self.counts.mul_(self.momentum).add_(pending["counts"], alpha=share)
        self.sums.mul_(self.momentum).add_(pending["sums"], alpha=share)
        # of less than half a patch of one step: nothing came for long
        unused = (self.counts < share / 2).nonzero()[:, 0][: len(pending["worst"])]
        self.counts[unused] = share
        self.sums[unused] = share * pending["worst"][: len(unused)]
        used = self.counts >= share / 2
        self.codes[used] = self.sums[used] / self.counts[used, None]


class PatchValues(Patches):
    """The numbers of each patch themselves: independent Gaussians, given what the decoder has seen.

    :meth:`nats` are of the density of numbers in [0, 1] (a wave's: [−1, 1]). Data come in steps: times ``step`` the
    density is the probability of a step's value up to 10⁻⁸, as no deviation is below a step.
    """

    def __init__(self, patch: tuple[int, ...], options: PatchValuesOptions) -> None:
        super().__init__(patch, options.detail)
        wave = len(patch) == 1 and options.detail is None
        self.dims, self.step, self.centre = self.width, WAVE_STEP if wave else LEVEL_STEP, 0.0 if wave else 0.5
        self.deviation, self.floor = options.deviation, options.floor

    @property
    def outputs(self) -> int:
        """A mean of each number, then, where they are learned, what its deviation is made of."""
        return self.dims * (2 if self.deviation == "learned" else 1)

    def forward(self, view: ViewBatch) -> tuple[Tensor, Tensor]:
        values = self.features(view)
        return values, view.present[:, None].expand(values.shape[:2])

    def gaussian(self, said: Tensor) -> tuple[Tensor, Tensor]:
        """Means, from the centre of the range, and logarithms of deviations, ``(B, L, dims)`` each."""
        mean = self.centre + said[..., : self.dims]
        if self.deviation != "learned":
            return mean, torch.full_like(mean, math.log(self.deviation))
        # softplus rather than a clamp: at the floor there is still a gradient that leads away from it
        start = math.log(math.expm1(math.log(START / self.floor)))
        return mean, math.log(self.floor) + F.softplus(said[..., self.dims :] + start)

    def nats(self, said: Tensor, tokens: Tensor) -> Tensor:
        mean, log_deviation = self.gaussian(said)
        off = (tokens.to(mean.dtype) - mean) * (-log_deviation).exp()
        return (0.5 * off.square() + log_deviation + 0.5 * math.log(2 * math.pi)).sum(-1)


def build_targets(options: PatchOptions, tower: TowerInfo, path: str, *, of_tower: bool = False) -> Targets:
    """The tokens of what a tower sees; ``of_tower``: one for each token of a causal tower.

    Raises:
        ConfigError: its tokenizer does not say its vocabulary, patches do not divide what it sees, or deviations are
            finer than the data; names ``path``.
    """
    spec = tower.spec
    if isinstance(spec, TextSpec):
        vocabulary: Any = getattr(spec.tokenizer, "vocabulary", None)
        if vocabulary is None:
            raise ConfigError(
                f"{path}.tower: the tokenizer of {tower.name!r}, {spec.tokenizer!r}, does not say how large it is"
            )
        return TextTokens(int(vocabulary))
    if of_tower:
        assert tower.causal_patch is not None
        patch = tower.causal_patch
    elif isinstance(spec, AudioSpec):
        patch = (options.samples,)
        _fits(f"{path}.targets.samples", options.samples, spec.samples, "samples")
    else:
        assert isinstance(spec, VideoSpec)
        patch = (options.frames, options.pixels, options.pixels)
        _fits(f"{path}.targets.frames", options.frames, spec.frames, "frames", whole=True)
        _fits(f"{path}.targets.pixels", options.pixels, spec.size, "pixels", whole=True)
    if isinstance(options, PaletteOptions):
        return Palette(patch, options.levels)
    assert isinstance(options, CodesOptions | PatchValuesOptions)
    if len(patch) == 1 and options.detail is not None and options.detail**2 > patch[0] // 2 + 1:
        raise ConfigError(
            f"{path}.targets.detail: {options.detail} makes {options.detail**2} bands; a block of {patch[0]} samples "
            f"has {patch[0] // 2 + 1} frequencies"
        )
    if isinstance(options, CodesOptions):
        return Codebook(patch, options)
    values = PatchValues(patch, options)
    place, least = ("floor", options.floor) if options.deviation == "learned" else ("deviation", options.deviation)
    if least < values.step:
        raise ConfigError(
            f"{path}.targets.{place}: {least} is finer than the data, whose numbers are steps of {values.step:.3g}"
        )
    return values


def _fits(place: str, part: int, whole_of_it: int, unit: str, *, whole: bool = False) -> None:
    if part > whole_of_it or (whole and whole_of_it % part):
        raise ConfigError(f"{place}: patches of {part} do not divide the tower's {whole_of_it} {unit}")
