"""One pair of towers under triple contrastive learning: what it asks for, what it owns, what it says of a batch."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mmcl.distributed import Comm
from mmcl.objectives.tcl.contrast import Keys, contrast, local_information, pooled_locals
from mmcl.objectives.tcl.fusion import Fusion, Tokens
from mmcl.objectives.tcl.masked import Reader, VocabularyHead, masked_tokens
from mmcl.objectives.tcl.matching import Matching
from mmcl.objectives.tcl.options import TCLOptions
from mmcl.objectives.tcl.rows import PairQueue, Rows
from mmcl.types import Embeddings, Kind, Level, Need, TextSpec, TowerInfo, View


@dataclass(frozen=True)
class Side:
    """One tower of a pair and its views."""

    tower: TowerInfo
    query: View
    """for the online tower"""
    key: View
    """for the momentum tower"""
    masked: View | None = None
    """the text with masked tokens, for both"""

    @property
    def reads_text(self) -> bool:
        return isinstance(self.tower.spec, TextSpec)


class PairTCL(nn.Module):
    """The terms that are switched on, for two towers: the reading one (a text, where there is one) and the context."""

    def __init__(self, name: str, reading: Side, context: Side, options: TCLOptions) -> None:
        super().__init__()
        self.name, self.options = name, options
        self.sides = (reading, context)
        self.mlm = options.mlm if reading.masked is not None else None
        queued = (options.cma or options.imc) and options.queue
        self.queue = PairQueue(options.queue, reading.tower.joint_width) if queued else None
        self.fusion, self.matching, self.vocabulary_head = None, None, None
        if options.itm or self.mlm:
            self.fusion = Fusion(reading.tower.width, context.tower.width, options.fusion)
        if options.itm:
            self.matching = Matching(options.fusion.width, options.itm.seed)
        if self.mlm:
            assert isinstance(reading.tower.spec, TextSpec)
            vocabulary = int(getattr(reading.tower.spec.tokenizer, "vocabulary", 0))
            self.vocabulary_head = VocabularyHead(options.fusion.width, vocabulary)
        taught = self.mlm is not None and self.mlm.alpha > 0
        self.momentum_fusion = copy.deepcopy(self.fusion).requires_grad_(False) if self.fusion and taught else None
        self.momentum_head = copy.deepcopy(self.vocabulary_head).requires_grad_(False) if taught else None  # type: ignore[union-attr]

    @property
    def terms(self) -> tuple[str, ...]:
        """Names of those that are on here."""
        options = self.options
        on = {"cma": options.cma, "imc": options.imc, "lmi": options.lmi, "itm": options.itm, "mlm": self.mlm}
        return tuple(name for name, term in on.items() if term is not None)

    @property
    def compares(self) -> bool:
        """Whether a term takes the pair's temperature."""
        return any(term != "mlm" for term in self.terms)

    @property
    def needs(self) -> list[Need]:
        """What the terms that are on ask for, and no more."""
        o, taught = self.options, self.momentum_fusion is not None
        online: list[Level] = ["joint"] * self.compares + ["tokens"] * bool(o.itm)
        momentum: list[Level] = ["joint"] * bool(o.cma or o.imc) + ["joint_tokens"] * bool(o.lmi)
        reading, context = self.sides
        wanted: list[tuple[Side, View | None, list[Level], Kind]] = [
            (reading, reading.query, online, "online"),
            (reading, reading.key, momentum, "momentum"),
            (reading, reading.masked, ["tokens"], "online"),
            (reading, reading.masked, ["tokens"] * taught, "momentum"),
            (context, context.query, online + ["tokens"] * (self.mlm is not None and not o.itm), "online"),
            (context, context.key, momentum + ["tokens"] * taught, "momentum"),
        ]
        return [
            Need(side.tower.name, view, tuple(levels), kind)
            for side, view, levels, kind in wanted
            if view is not None and levels
        ]

    def ema_pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        pairs = ((self.fusion, self.momentum_fusion), (self.vocabulary_head, self.momentum_head))
        return [(online, copied) for online, copied in pairs if online is not None and copied is not None]

    def forward(
        self, embeddings: Embeddings, comm: Comm, ramp: Tensor
    ) -> tuple[dict[str, Tensor], dict[str, Tensor], Mapping[str, Any]]:
        """The loss of each term, what else to log, and the keys for the queue; ``ramp``: share of the alphas now."""
        options = self.options
        present = embeddings.present(*dict.fromkeys(need.view for need in self.needs))
        rows = Rows.of(embeddings.batch, present, comm, mask_false_negatives=options.mask_false_negatives)
        losses: dict[str, Tensor] = {}
        metrics = {"rows": comm.sum(present.sum())}
        pending: dict[str, Any] = {}
        if options.cma or options.imc:
            losses.update(self._contrasts(embeddings, rows, ramp))
        if options.lmi:
            losses["lmi"] = self._local(embeddings, rows)
        if self.queue is not None:
            keys = tuple(rows.all(self._joint(embeddings, number, "momentum")) for number in range(2))
            pending = {"keys": keys, "groups": rows.groups}
        if self.matching is not None:
            assert self.fusion is not None
            joint = (self._joint(embeddings, 0), self._joint(embeddings, 1))
            losses["itm"], metrics["itm_accuracy"] = self.matching(
                self.fusion,
                tuple(self._tokens(embeddings, side, side.query) for side in self.sides),
                joint,
                rows,
                embeddings.scales[self.name],
                options.fusion.chunk,
            )
            # pairs are drawn by them without a gradient, but ranks wait for one
            losses["itm"] = losses["itm"] + 0.0 * sum(x.sum() for x in (*joint, embeddings.scales[self.name]))
        if self.mlm is not None:
            losses["mlm"], metrics["mlm_tokens"] = self._masked(embeddings, rows, self.mlm.alpha * ramp)
        return losses, metrics, pending

    def commit(self, pending: Mapping[str, Any]) -> None:
        if self.queue is not None:
            self.queue.push(pending["keys"], pending["groups"])

    def _joint(self, embeddings: Embeddings, number: int, kind: Kind = "online") -> Tensor:
        side = self.sides[number]
        return embeddings.values[side.tower.name, side.query if kind == "online" else side.key, "joint", kind]

    def _tokens(self, embeddings: Embeddings, side: Side, view: View, kind: Kind = "online") -> Tokens:
        values = embeddings.values[side.tower.name, view, "tokens", kind]
        return Tokens(values, _mask(embeddings, view, values))

    def _contrasts(self, embeddings: Embeddings, rows: Rows, ramp: Tensor) -> dict[str, Tensor]:
        """Both directions of each term, averaged; side 0 searches the keys of side 1 (cma) or its own (imc)."""
        scale, options = embeddings.scales[self.name], self.options
        queries, teachers = (
            [self._joint(embeddings, number, kind) for number in range(2)] for kind in ("online", "momentum")
        )
        keys = [Keys.of(number, teachers[number], self.queue, rows) for number in range(2)]
        losses = {}
        if options.cma is not None:
            alpha = options.cma.alpha * ramp
            across = [contrast(queries[n], keys[1 - n], rows, scale, teachers[n], alpha) for n in range(2)]
            losses["cma"] = (across[0] + across[1]) / 2
        if options.imc is not None:
            within = [contrast(queries[n], keys[n], rows, scale) for n in range(2)]
            losses["imc"] = (within[0] + within[1]) / 2
        return losses

    def _local(self, embeddings: Embeddings, rows: Rows) -> Tensor:
        assert self.options.lmi is not None
        parts = []
        for number, side in enumerate(self.sides):
            tokens = embeddings.values[side.tower.name, side.key, "joint_tokens", "momentum"]
            pool = 1 if side.reads_text else self.options.lmi.pool
            locals_, mask = pooled_locals(tokens, _mask(embeddings, side.key, tokens), pool)
            joint = self._joint(embeddings, number)
            parts.append(local_information(joint, locals_, mask, rows, embeddings.scales[self.name]))
        return (parts[0] + parts[1]) / 2

    def _masked(self, embeddings: Embeddings, rows: Rows, alpha: Tensor) -> tuple[Tensor, Tensor]:
        reading, context = self.sides
        assert reading.masked is not None and self.fusion is not None and self.vocabulary_head is not None
        targets = embeddings.batch.views[reading.masked].params["token_targets"]

        def reader(fusion: nn.Module, head: nn.Module, view: View, kind: Kind) -> Reader:
            assert reading.masked is not None
            text = self._tokens(embeddings, reading, reading.masked, kind)
            return Reader(fusion, head, text, self._tokens(embeddings, context, view, kind))

        online = reader(self.fusion, self.vocabulary_head, context.query, "online")
        teacher = None
        if self.momentum_fusion is not None and self.momentum_head is not None:
            teacher = reader(self.momentum_fusion, self.momentum_head, context.key, "momentum")
        return masked_tokens(online, teacher, targets, rows, alpha, self.options.fusion.chunk)


def _mask(embeddings: Embeddings, view: View, tokens: Tensor) -> Tensor:
    """Which of a view's tokens ``(B, L, D)`` are real: a text's as its tokenizer says, all of picture and sound."""
    mask = embeddings.batch.views[view].mask
    return torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device) if mask is None else mask
