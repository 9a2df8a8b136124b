"""Contrast of two views of one tower, and a decoder of each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mmcl.distributed import Comm, contrastive
from mmcl.layers import MLPHead
from mmcl.objectives.base import Objective, Term
from mmcl.objectives.generative.decoders import Bottleneck, Decoder, Likelihood, likelihood, token_mask
from mmcl.objectives.generative.options import GenerativeContrastiveOptions
from mmcl.objectives.generative.targets import Targets, build_targets
from mmcl.objectives.views import learning_tower
from mmcl.types import TIMED, ConfigError, Embeddings, Need, TowerInfo, View


class GenerativeContrastive(Objective):
    """Rows count where both views are present."""

    watched = ("contrast", "generation")

    def __init__(self, options: GenerativeContrastiveOptions, tower: TowerInfo, targets: Targets) -> None:
        super().__init__()
        self.options, self.tower, self.targets = options, tower, targets
        decoder, augmented = options.decoder, options.augmentation != "none"
        self.pair = tuple(Need(tower.name, self._view(number), ("pooled", "tokens")) for number in range(2))
        self.plain = Need(tower.name, View(tower.spec), ("tokens",)) if augmented and options.plain else None
        self.needs = (*self.pair, self.plain) if self.plain else self.pair
        self.projector = MLPHead(tower.width, options.hidden, options.out, options.layers)
        self.bottleneck: Bottleneck | None = None
        if options.layout == "cross":
            self.bottleneck = Bottleneck(tower.width, decoder.width, decoder.heads, options.latents)
            self.decoder = Decoder(targets.outputs, decoder, memory=decoder.width, vectors=targets.vectors)
        else:
            self.decoder = Decoder(targets.outputs, decoder, vectors=tower.width)

    def _view(self, number: int) -> View:
        spec, augmentation = self.tower.spec, self.options.augmentation
        if self.options.windows == "different" and isinstance(spec, TIMED):
            return View(spec, clip=number, augmentation=augmentation)
        return View(spec, augmentation=augmentation, copy=number)

    def forward(self, embeddings: Embeddings, comm: Comm) -> Term:
        options = self.options
        present = embeddings.present(*(need.view for need in self.pair))
        rows = [self.projector(embeddings.get(need, "pooled")) for need in self.pair]
        contrast = contrastive(
            rows[0],
            rows[1],
            scale=1 / options.temperature,
            comm=comm,
            present_a=present,
            present_b=present,
            groups=embeddings.batch.groups if options.mask_false_negatives else None,
        )
        found = [self.likelihood(embeddings, need, present) for need in self.pair]
        per_row = torch.stack([x.per_token for x in found]).mean(0)
        generation = comm.mean(per_row, present)
        both = Likelihood(self.targets, torch.cat([x.nats for x in found]), torch.cat([x.tokens for x in found]))
        bits = both.bits_per_dim(comm)
        metrics = {"contrast": contrast.detach(), "generation": generation.detach()}
        metrics["bits_per_dim" if options.augmentation == "none" else "bits_per_dim_augmented"] = bits
        if self.plain is not None:
            with torch.no_grad():
                plain = self.likelihood(embeddings, self.plain, embeddings.present(self.plain.view))
            metrics["bits_per_dim"] = plain.bits_per_dim(comm)
        views = [embeddings.batch.views[need.view] for need in self.pair]
        pending = self.targets.pending(views, present, comm)
        return Term(options.contrast * contrast + options.generation * generation, metrics, pending)

    def commit(self, pending: Mapping[str, Any]) -> None:
        if pending:
            self.targets.commit(pending)

    def likelihood(self, embeddings: Embeddings, need: Need, present: Tensor) -> Likelihood:
        """Of one view of the rows that are ``present (B,)``, from what the tower saw of the same view."""
        view, tokens = embeddings.batch.views[need.view], embeddings.get(need, "tokens")
        seen = token_mask(self.tower, view.mask, tokens)
        return likelihood(self.targets, self.logits, view, present, self.options.decoder.chunk, tokens, seen)

    def logits(self, ids: Tensor, real: Tensor, tokens: Tensor, seen: Tensor) -> Tensor:
        """``(b, L, outputs)`` of ``ids (b, L)``, or vectors, where they are ``real``, of a view of which the tower gave
        ``tokens``, float ``(b, L', D)``, those that are ``seen (b, L')``.
        """
        if self.bottleneck is None:
            return self.decoder.logits(tokens, real)
        return self.decoder.logits(ids, real, self.bottleneck(tokens, seen))


def build(
    options: GenerativeContrastiveOptions, towers: Mapping[str, TowerInfo], path: str = "objectives.0"
) -> GenerativeContrastive:
    """The objective for these towers.

    Raises:
        ConfigError: an unknown or a frozen tower, one that is not causal under layout ``prefix``, both weights 0, or
            targets that cannot be; names ``path``.
    """
    tower = learning_tower(options.tower, towers, f"{path}.tower")
    prefix = options.layout == "prefix"
    if prefix and tower.causal_patch is None:
        causal = ", ".join(name for name, info in towers.items() if info.causal_patch is not None) or "none here"
        raise ConfigError(
            f"{path}.layout: prefix needs a causal tower (causal_text, causal_video, causal_audio); {tower.name!r} "
            f"sees what comes later; causal: {causal}"
        )
    if options.contrast == 0 and options.generation == 0:
        raise ConfigError(f"{path}: contrast and generation are both 0")
    targets = build_targets(options.targets, tower, path, of_tower=prefix)
    return GenerativeContrastive(options, tower, targets)
