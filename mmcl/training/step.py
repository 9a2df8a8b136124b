"""The one module that a launcher wraps."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from mmcl.distributed import Comm
from mmcl.model import MultimodalModel, Values
from mmcl.objectives.base import ObjectiveMix, Term
from mmcl.types import Batch, Embeddings


@dataclass(frozen=True, eq=False)
class CachePass:
    """One pass of the gradient cache through :class:`TrainStep`."""

    stage: Literal["features", "loss", "replay"]
    values: Values = field(default_factory=dict)
    """``loss``: the features of the whole batch; ``replay``: the gradient of those of these rows"""


class TrainStep(nn.Module):
    """What the launcher wraps: towers, heads, temperatures and objectives in one forward, so in one reducer."""

    def __init__(self, model: MultimodalModel, mix: ObjectiveMix) -> None:
        super().__init__()
        self.model, self.mix = model, mix
        self.watching = False
        """whether ``seen`` is kept and negatives are counted, for the log"""
        self.seen: Embeddings | None = None
        """what the objectives saw last, without its graph"""

    def forward(
        self, batch: Batch, cache: CachePass | None = None, optimizer_step: int | None = None
    ) -> Term | Values | Tensor:
        """The terms of a batch in this optimizer step (:class:`ObjectiveMix`); under the gradient cache what its pass
        asks for: features, terms, or a number whose gradient is that of the features pulled through the towers.
        """
        if cache is not None and cache.stage == "features":
            return self.model.encode(batch, self.mix.needs)
        if cache is not None and cache.stage == "replay":
            found = self.model.encode(batch, self.mix.needs, learning_only=True)
            pulled = [(found[key] * gradient).sum() for key, gradient in cache.values.items()]
            # every parameter takes part, so that every gradient is reduced, the objectives' of the loss pass too
            touched = [0.0 * p.sum() for p in self.parameters() if p.requires_grad]
            return torch.stack([x.float() if x.dtype != torch.float64 else x for x in (*pulled, *touched)]).sum()
        embeddings = self.model(batch, self.mix.needs) if cache is None else self.model.embeddings(cache.values, batch)
        if self.watching:
            detached = {key: value.detach() for key, value in embeddings.values.items()}
            self.seen = dataclasses.replace(embeddings, values=detached)
        term: Term = self.mix(embeddings, Comm.current(), step=optimizer_step, counted=self.watching)
        return term
