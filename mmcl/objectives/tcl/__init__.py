"""Triple contrastive learning (TCL; Yang et al. 2022, arXiv 2202.10401) between towers of any two modalities.

For a pair with online unit rows v, t, momentum keys v̂, t̂, queues Q and K_v = [v̂ | Q_v], K_t = [t̂ | Q_t], temperature τ:

- **cma**: ½ CE(v·K_t/τ, α softmax(v̂·K_t/τ) + (1 − α) I), and ½ of the same from t to K_v.
- **imc**: ½ CE(v·K_v/τ, I) + ½ CE(t·K_t/τ, I); v is of view a, v̂ of view b.
- **lmi**: for both modalities, ½ −mean over a sample's real tokens k, then over samples i, of
  log exp(⟨g_i, l̂_ik⟩/τ) / (exp(⟨g_i, l̂_ik⟩/τ) + Σ_{j≠i,m} exp(⟨g_i, l̂_jm⟩/τ)); g is the online global row, l̂ are the
  tokens of the momentum tower on the other view through its joint head: space-time, time-frequency or text.
- **itm**: two-way CE on 3 N pairs: N true ones, N with a hard negative on each side, drawn ∝ softmax(v·t/τ).
- **mlm**: CE of masked tokens with the other modality in view, against (1 − α) truth + α the momentum copies' beliefs.

L = Σ weight · term; weights of ⅓, ⅓, ⅓, 1, 1 make it the sum of the authors' code, (six contrastive terms)/6 + ITM +
MLM. The formulas are those of that code (github.com/uta-smile/TCL); what differs from it is our decision, and an option
where one can see it otherwise:

- view b of a video is another clip (``key_clip``; 0 and an augmentation: the paper's two draws of one picture).
- Keys of the batch and candidates for matching are those of all ranks (the authors': one rank's; only their queue is
  global), so that the loss does not depend on how many ranks there are. Queues start empty instead of with noise.
- Samples of equal key, group or caption are never each other's negatives (``mask_false_negatives``). A row without any
  other candidate has no matching negatives, where the authors draw uniformly.
- Hard negatives come by the similarity of the online towers, keyed by (seed, draws), never by rank or order of rows.
- Hidden columns are left out of the sums by −inf; the authors add ±10000.
- Locals are pooled over runs of tokens (``lmi.pool``), not over squares of patches, so that any grid will do.
- The fusion tower is a transformer of its own on the towers' tokens, not the upper half of the text tower; it has a
  learned token in place of [CLS]. A pair without a text is fused the same way: the second tower reads.
- Temperatures are the model's, τ ≥ 0.01 (the authors': in [0.001, 0.5], one for all); momentum copies move after the
  optimizer's step, once, where the authors move them in each forward.

Momentum towers are in training mode as the others are: dropout makes the two views of a text differ. Without it, and
without a ``text_augmentation``, a text's key is what its query was some steps ago, and imc learns little from texts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mmcl.distributed import Comm
from mmcl.objectives.base import Objective, Term
from mmcl.objectives.pairs import checked_pairs
from mmcl.objectives.tcl.options import TCLOptions
from mmcl.objectives.tcl.pair import PairTCL, Side
from mmcl.types import ConfigError, Embeddings, TextSpec, TowerInfo, View

__all__ = ["TCL", "TCLOptions", "build"]


class TCL(Objective):
    """The mean over pairs of the weighted terms that are switched on; equal on any number of ranks."""

    seen: Tensor
    """batches so far"""

    def __init__(self, options: TCLOptions, pairs: Mapping[str, PairTCL]) -> None:
        super().__init__()
        self.options = options
        self.pairs = nn.ModuleDict(pairs)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.needs = tuple(dict.fromkeys(need for pair in pairs.values() for need in pair.needs))
        self.scales = tuple(name for name, pair in pairs.items() if pair.compares)
        self.watched = tuple(f"loss/{term}/{name}" for name, pair in pairs.items() for term in pair.terms)
        if options.mlm is not None:
            self.masking = {"mlm.augmentation": options.mlm.augmentation}

    def forward(self, embeddings: Embeddings, comm: Comm) -> Term:
        ramp = (self.seen.float() / max(self.options.ramp_batches, 1)).clamp(max=1.0)
        ramp = ramp if self.options.ramp_batches else torch.ones_like(ramp)
        losses, metrics, pending = [], {}, {}
        for name, pair in self._each().items():
            terms, more, pending[name] = pair(embeddings, comm, ramp)
            weights = {term: getattr(self.options, term).weight for term in terms}
            losses.append(torch.stack([weights[term] * loss for term, loss in terms.items()]).sum())
            metrics.update({f"loss/{term}/{name}": loss.detach() for term, loss in terms.items()})
            metrics.update({f"{key}/{name}": value for key, value in more.items()})
        return Term(torch.stack(losses).mean(), metrics, pending)

    def commit(self, pending: Mapping[str, Any]) -> None:
        for name, pair in self._each().items():
            pair.commit(pending[name])
        self.seen += 1

    def ema_pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        return [both for pair in self._each().values() for both in pair.ema_pairs()]

    def _each(self) -> dict[str, PairTCL]:
        return {name: pair for name, pair in self.pairs.items() if isinstance(pair, PairTCL)}


def build(options: TCLOptions, towers: Mapping[str, TowerInfo], path: str = "objectives.0") -> TCL:
    """The objective for these towers.

    Raises:
        ConfigError: every term is off; pairs that cannot be, see :func:`checked_pairs`; masked tokens are asked for,
            but no pair has a text tower or its tokenizer has no mask token or does not say its vocabulary.
    """
    alike = {term: getattr(options, term) for term in ("cma", "imc", "lmi", "itm")}
    if options.mlm is None and all(term is None for term in alike.values()):
        raise ConfigError(f"{path}: every term is off; give one of {', '.join(alike)}, mlm")
    pairs: dict[str, PairTCL] = {}
    for number, (a, b) in enumerate(checked_pairs(options.pairs, towers, path, options.name)):
        first, second = (_side(towers[name], options) for name in (a, b))
        reading, context = (first, second) if first.reads_text else (second, first)
        if options.mlm is not None and reading.reads_text:
            _check_tokenizer(reading.tower, path)
        pair = PairTCL(f"{a}-{b}", reading, context, options)
        if not pair.needs:
            raise ConfigError(
                f"{path}.pairs.{number}: mlm, the one term that is on, needs a text tower; {a}-{b} has none"
            )
        pairs[f"{a}-{b}"] = pair
    if options.mlm is not None and not any(pair.mlm for pair in pairs.values()):
        raise ConfigError(f"{path}.mlm: no pair has a text tower ({', '.join(pairs)}); set it to null")
    return TCL(options, pairs)


def _check_tokenizer(tower: TowerInfo, path: str) -> None:
    assert isinstance(tower.spec, TextSpec)
    for attribute, what in (("mask_id", "has no mask token"), ("vocabulary", "does not say how large it is")):
        if getattr(tower.spec.tokenizer, attribute, None) is None:
            raise ConfigError(
                f"{path}.mlm: the tokenizer of {tower.name!r}, {tower.spec.tokenizer!r}, {what}; set it to null"
            )


def _side(tower: TowerInfo, options: TCLOptions) -> Side:
    spec = tower.spec
    if isinstance(spec, TextSpec):
        own = options.text_augmentation
        masked = None if options.mlm is None else View(spec, augmentation=options.mlm.augmentation)
        return Side(tower, View(spec, augmentation=own), View(spec, augmentation=own, copy=int(own != "none")), masked)
    own, clip = options.augmentation, options.key_clip
    key = View(spec, clip, own, copy=int(clip == 0 and own != "none"))
    return Side(tower, View(spec, 0, own), key)
