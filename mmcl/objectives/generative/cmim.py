"""Contrastive mutual information machine: a Gaussian latent, its decoder, and a contrast between draws."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mmcl.distributed import Comm
from mmcl.hashing import text_hash
from mmcl.losses.cmim import cmim_contrast_rows, mim_latent
from mmcl.media.device_hash import device_normal
from mmcl.objectives.base import Objective, Term
from mmcl.objectives.generative.decoders import Decoder, likelihood, over_rows
from mmcl.objectives.generative.options import CMIMOptions
from mmcl.objectives.generative.targets import Targets, build_targets
from mmcl.objectives.views import learning_tower
from mmcl.types import Embeddings, Need, TowerInfo, View, ViewBatch

_DRAWS = text_hash("cmim first draw"), text_hash("cmim second draw")
"""what the random numbers are for"""


class CMIM(Objective):
    """Own rows, a decoder each; their latents against those of all ranks, ``B · N`` similarities at once."""

    watched = ("reconstruction", "contrast")

    def __init__(self, options: CMIMOptions, tower: TowerInfo, targets: Targets) -> None:
        super().__init__()
        self.options, self.tower, self.targets = options, tower, targets
        self.need = Need(tower.name, View(tower.spec), ("pooled",))
        self.needs = (self.need,)
        self.mean, self.log_scale = (nn.Linear(tower.width, options.latent) for _ in range(2))
        self.expand = nn.Linear(options.latent, options.latents * options.latent)
        self.decoder = Decoder(targets.outputs, options.decoder, memory=options.latent, vectors=targets.vectors)

    def posterior(self, pooled: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and clamped logarithm of the deviation, ``(B, latent)`` each, float32 or float64."""
        with torch.autocast(pooled.device.type, enabled=False):
            pooled = pooled.to(self.mean.weight.dtype)
            return self.mean(pooled), self.log_scale(pooled).clamp(*self.options.log_scale)

    def noise(self, draws: Tensor, number: int) -> Tensor:
        """float64 ``(B, latent)``, standard normal: a function of the seed, each row's draw number (int64 ``(B,)``,
        never the same in two steps), and which of the row's latents it is for.
        """
        places = torch.arange(self.options.latent, device=draws.device)
        return device_normal(self.options.seed, _DRAWS[number], draws[:, None], places)

    def forward(self, embeddings: Embeddings, comm: Comm) -> Term:
        options, batch = self.options, embeddings.batch
        present = embeddings.present(self.need.view)
        mean, log_scale = self.posterior(embeddings.get(self.need))
        z = mean + log_scale.exp() * self.noise(batch.draws, 0).to(mean.dtype)
        other = mean
        if options.other == "draw":
            other = mean + log_scale.exp() * self.noise(batch.draws, 1).to(mean.dtype)
        view = batch.views[self.need.view]
        found = likelihood(self.targets, self.logits, view, present, options.decoder.chunk, z)
        with torch.autocast(z.device.type, enabled=False):
            latent = mim_latent(z, mean, log_scale)
            contrast, similar = self._contrast(z, other, present, batch.groups, comm)
        reconstruction = comm.mean(found.nats if options.likelihood == "sum" else found.per_token, present)
        information = comm.mean(latent, present)
        metrics = {
            "reconstruction": reconstruction.detach(),
            "latent": information.detach(),
            "contrast": contrast.detach(),
            "similarity": similar,
            "bits_per_dim": found.bits_per_dim(comm),
        }
        loss = reconstruction + information + options.contrast * contrast
        return Term(loss, metrics, self.targets.pending([view], present, comm))

    def _contrast(self, z: Tensor, other: Tensor, present: Tensor, groups: Tensor, comm: Comm) -> tuple[Tensor, Tensor]:
        """The contrast over the rows of all ranks that have a negative, and the mean cosine of a row's two latents."""
        everyone, there = comm.gather(other), comm.gather(present)
        itself = comm.index(len(z), z.device)
        others = there & (torch.arange(len(everyone), device=z.device) != itself[:, None])
        if self.options.mask_false_negatives:
            all_groups = comm.gather(groups)
            others = others & ~((groups[:, None] == all_groups) & (groups[:, None] >= 0)).any(2)
        values = cmim_contrast_rows(
            z, everyone, itself, others, temperature=self.options.temperature, critic=self.options.critic
        )
        cosine = torch.cosine_similarity(z.detach(), other.detach(), dim=1)
        return comm.mean(values, present & others.any(1)), comm.mean(cosine, present)

    def commit(self, pending: Mapping[str, Any]) -> None:
        if pending:
            self.targets.commit(pending)

    def logits(self, ids: Tensor, real: Tensor, z: Tensor) -> Tensor:
        """``(b, L, outputs)`` of tokens, ids ``(b, L)`` or vectors, ``real`` ones, with latents ``z`` in view."""
        return self.decoder.logits(ids, real, self.memory(z))

    def memory(self, z: Tensor) -> Tensor:
        """``(b, latent)`` to what the decoder sees, ``(b, latents, latent)``."""
        expanded: Tensor = self.expand(z)
        return expanded.view(len(z), self.options.latents, self.options.latent)

    @torch.no_grad()
    def informative(self, pooled: Tensor, view: ViewBatch) -> Tensor:
        """Informative embeddings ``(B, width of the decoder)``: its states before the last linear map, given the true
        tokens and the mean of the posterior, averaged over a row's tokens; 0 for absent rows.

        ``pooled`` ``(B, D)`` is the tower's of this view.
        """
        ids, real = self.targets(view)

        def states(ids: Tensor, real: Tensor, z: Tensor) -> Tensor:
            hidden = self.decoder.hidden(ids, real, self.memory(z)).masked_fill(~real[..., None], 0)
            return hidden.sum(1) / real.sum(1, keepdim=True).clamp_min(1)

        mean, _ = self.posterior(pooled)
        return over_rows(states, view.present, self.options.decoder.chunk, ids, real, mean)


def build(options: CMIMOptions, towers: Mapping[str, TowerInfo], path: str = "objectives.0") -> CMIM:
    """The objective for these towers.

    Raises:
        ConfigError: an unknown or a frozen tower, or targets that cannot be; names ``path``.
    """
    tower = learning_tower(options.tower, towers, f"{path}.tower")
    return CMIM(options, tower, build_targets(options.targets, tower, path))
