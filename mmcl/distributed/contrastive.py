"""Contrastive losses over the rows of all ranks, exact and without the N × N logits in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from mmcl.distributed.agreement import agree
from mmcl.distributed.candidates import Candidates, meeting
from mmcl.distributed.comm import Comm
from mmcl.distributed.few import is_few, of_all_ranks
from mmcl.distributed.pair import Form, Pair, distinct
from mmcl.distributed.tiled import LogSums, Unit, WeightedTotal, count_negatives, with_hardest

_T = TypeVar("_T")


def contrastive(
    a: Tensor,
    b: Tensor,
    *,
    scale: Tensor | float,
    comm: Comm,
    present_a: Tensor | None = None,
    present_b: Tensor | None = None,
    groups: Tensor | None = None,
    tile: int | None = None,
    unpaired_negatives: bool = False,
    form: Form | None = None,
    bias: Tensor | float = 0.0,
    groups_b: Tensor | None = None,
    pools: Tensor | None = None,
) -> Tensor:
    """The symmetric loss between ``a`` and ``b`` over the rows of all ranks; symmetric InfoNCE (CLIP) by default.

    Row i takes part, as query and as candidate, only where it is present on both sides. The loss is ½ · [mean over
    these rows of the form a→b + the same b→a]; 0 with zero gradients where no rank has such a row. With several rows of
    ``b`` to a row of ``a``, all that are present are its positives: a row's value is the mean over them, each against
    the negatives alone, and none is in the sum of another.

    Args:
        a: float ``(B, D)``, normalised inside; B is equal on all ranks. float64 gives float64, the rest float32, under
            autocast too. Rows that are not present may hold anything.
        b: float ``(B, D)`` or ``(B, K, D)``.
        scale: the multiplier of the cosine (1 / temperature), a float or a 0-d tensor.
        present_a, present_b: bool ``(B,)``, ``present_b`` ``(B, K)`` where ``b`` has K; None: all.
        groups: int64 ``(B,)`` or ``(B, G)``; rows with equal numbers in any column are never each other's negatives;
            −1: none.
        tile: rows and columns of a block of logits; memory beyond the features is O(tile²).
        unpaired_negatives: rows present on one side only are candidates as well.
        form: which loss; None: ``Form()``.
        bias: added to the logits by SigLIP, a float or a 0-d tensor; −10 at the start of training in the paper.
        groups_b: the numbers of ``b`` where they are not those of ``a``, of the same shape.
        pools: int64 ``(B,)``; only rows of an equal number are each other's negatives, −1 has none; None: all are. The
            loss is then that of each pool alone, weighed by its rows (Zhang et al. 2024, arXiv 2402.11816).

    Returns:
        The global loss, 0-d, on every rank. Backward leaves ``world_size`` · ∂L/∂a on a rank's rows, and for ``scale``
        and ``bias`` a value whose mean over ranks is the derivative, so that averaging over ranks gives the one-process
        gradient.

    Raises:
        ValueError: on all ranks, if the shapes are not those above or differ between ranks.
    """
    pair = Pair(a, b, scale, present_a, present_b, groups, groups_b, bias, pools)
    return contrastive_pairs([pair], comm=comm, tile=tile, unpaired_negatives=unpaired_negatives, form=form)[0][0]


def contrastive_pairs(
    pairs: Sequence[Pair],
    *,
    comm: Comm,
    tile: int | None = None,
    unpaired_negatives: bool = False,
    form: Form | None = None,
) -> list[tuple[Tensor, Tensor]]:
    """:func:`contrastive` of each pair, on one device, with the exchanges of one; as many pairs on all ranks.

    Pairs with the same tensor as ``groups`` share what is found of it.

    Returns:
        Of each pair the loss and, int64, the number of positives of all ranks.
    """
    form = form or Form()
    wants = agree(pairs, unpaired_negatives, form, comm)
    if is_few(pairs, comm):
        pairs, comm = of_all_ranks(pairs, comm), Comm()
    with torch.autocast(pairs[0].a.device.type, enabled=False):
        made, blocks = _met(pairs, wants, unpaired_negatives, form, tile, comm)
        if form.name == "siglip":
            own = [pair.siglip(block) for pair, block in zip(made, blocks, strict=True)]
        else:
            own = _softmax(made, blocks)
        losses = comm.share(torch.stack(own))
        return [(loss.to(pair.a.dtype), pair.everyone.sum()) for loss, pair in zip(losses.unbind(), made, strict=True)]


def _met(
    pairs: Sequence[Pair],
    wants: list[tuple[bool, bool]],
    unpaired_negatives: bool,
    form: Form,
    tile: int | None,
    comm: Comm,
) -> tuple[list[_Pairs], list[Candidates]]:
    """The pairs and who meets whom in them, after one exchange of masks and groups."""
    masks = [mask for pair in pairs for mask in pair.masks()]
    numbers, places = distinct([x for pair in pairs for x in (pair.groups, pair.groups_b)])
    everyone = comm.gather_together([*masks, *(x[:, None] if x.ndim == 1 else x for x in numbers)])
    everyone, numbers = everyone[: len(masks)], everyone[len(masks) :]
    meetings: dict[tuple[int, int], tuple[tuple[Tensor, Tensor], ...]] = {(-1, -1): ()}
    made, blocks = [], []
    for k, pair in enumerate(pairs):
        mask_a, mask_b, all_a, all_b = (x if x.ndim > 1 else x[:, None] for x in _of(masks, k) + _of(everyone, k))
        dtype = torch.float64 if torch.float64 in (pair.a.dtype, pair.b.dtype) else torch.float32
        own = _Pairs(
            a=_unit(pair.a.to(dtype)[:, None], mask_a),
            b=_unit(pair.b.to(dtype) if pair.b.ndim > 2 else pair.b.to(dtype)[:, None], mask_b),
            both=mask_a & mask_b,
            everyone=all_a & all_b,
            scale=torch.as_tensor(pair.scale, dtype=dtype, device=pair.a.device),
            bias=torch.as_tensor(pair.bias, dtype=dtype, device=pair.a.device),
            form=form,
            wants=wants[k],
        )
        x, y = _of(places, k)
        sides = (x, x if y < 0 else y)
        if sides not in meetings:
            meetings[sides] = meeting(numbers[sides[0]], numbers[sides[1]])
        takes_part = (mask_a, all_b) if unpaired_negatives else (own.both.any(1, keepdim=True), own.everyone)
        block = Candidates.of(*takes_part, meetings[sides], _tile(tile, pair.a), comm, pair.pools)
        if form.hard_quantile < 1:
            block = with_hardest(block, own.rows, own.columns, own.scale, form.hard_quantile)
        made.append(own)
        blocks.append(block)
    return made, blocks


def _of(xs: list[_T], k: int) -> list[_T]:
    """The two of pair ``k``."""
    return xs[2 * k : 2 * k + 2]


def _softmax(pairs: list[_Pairs], blocks: list[Candidates]) -> list[Tensor]:
    """What this rank adds to the mean over rows of the mean over their positives of both directions, of each pair."""
    sides = [x for pair in pairs for x in (pair.rows, pair.columns, pair.scale)]
    anchor = _anchor(sides[0], any(pair.wants[0] for pair in pairs))
    sums: tuple[Tensor, ...] = LogSums.apply(anchor, blocks, [pair.wants[1] for pair in pairs], *sides)
    return [
        pair.softmax(block, *sums[2 * k : 2 * k + 2]) for k, (pair, block) in enumerate(zip(pairs, blocks, strict=True))
    ]


def view_contrastive(
    a: Tensor,
    b: Tensor,
    *,
    scale: Tensor | float,
    comm: Comm,
    present: Tensor | None = None,
    groups: Tensor | None = None,
    tile: int | None = None,
    form: Form | None = None,
    pools: Tensor | None = None,
) -> Tensor:
    """NT-Xent (SimCLR) between two views over the rows of all ranks; DCL and DCLW by ``form``.

    Each of the 2N rows finds its other view among the rows of both views of the other samples: the mean over both
    directions and the rows present, each with the log-sum-exp of its 2(N − 1) negatives. Arguments, result and errors
    as for :func:`contrastive`; ``present``, bool ``(B,)``: rows that have both views.

    Chen et al. 2020 (arXiv 2002.05709), eq. 1.
    """
    form = form or Form()
    if form.name not in ("infonce", "dcl", "dclw"):
        raise ValueError(f"views are compared by infonce, dcl or dclw, got {form.name!r}")
    mask = torch.ones(a.shape[:1], dtype=torch.bool, device=a.device) if present is None else present
    pair = Pair(a, b, scale, mask, groups=groups, pools=pools)
    ((any_wants, _),) = agree([pair], False, form, comm, several=False)
    if is_few([pair], comm):
        (pair,), comm = of_all_ranks([pair], comm), Comm()
        a, b, mask, groups, pools = pair.a, pair.b, pair.masks()[0], pair.groups, pair.pools
    with torch.autocast(a.device.type, enabled=False):
        dtype = torch.float64 if torch.float64 in (a.dtype, b.dtype) else torch.float32
        both = mask[:, None].expand(-1, 2)
        views = _unit(torch.stack([a.to(dtype), b.to(dtype)], 1), both)
        rows = views.flatten(0, 1)
        scale = torch.as_tensor(scale, dtype=dtype, device=a.device)
        given = [] if groups is None else [groups[:, None] if groups.ndim == 1 else groups]
        everyone, *numbers = comm.gather_together([mask, *given])
        meetings = [x for each in numbers for x in meeting(each, each)]
        block = Candidates.of(both, everyone[:, None].expand(-1, 2), meetings, _tile(tile, a), comm, pools)
        if form.hard_quantile < 1:
            block = with_hardest(block, rows, None, scale, form.hard_quantile)
        sums: Tensor = LogSums.apply(_anchor(rows, any_wants), [block], [False], rows, None, scale)[0]
        cosines = (views[:, 0] * views[:, 1]).sum(1)[:, None]
        values = _softmax_values(sums.view(-1, 2), cosines, mask[:, None], everyone.sum(), scale, form, comm)
        return comm.share(values.mean(1).masked_fill(~mask, 0).sum() / everyone.sum().clamp_min(1))


@dataclass(frozen=True, eq=False)
class _Pairs:
    """Unit rows of both sides, ``a (B, 1, D)`` and ``b (B, K, D)``, and which are pairs, bool ``(B, K)``."""

    a: Tensor
    b: Tensor
    both: Tensor
    everyone: Tensor
    """``both`` of all ranks"""
    scale: Tensor
    bias: Tensor
    form: Form
    wants: tuple[bool, bool]
    """whether some rank wants a gradient, and for ``b``"""

    @property
    def rows(self) -> Tensor:
        return self.a.flatten(0, 1)

    @property
    def columns(self) -> Tensor:
        return self.b.flatten(0, 1)

    def softmax(self, block: Candidates, row_sums: Tensor, column_sums: Tensor) -> Tensor:
        """What this rank adds to the mean over rows of the mean over their positives of both directions."""
        form, rows = self.form, self.rows
        cosines = (self.a * self.b).sum(2)
        sums = torch.stack([row_sums[:, None].expand_as(cosines), column_sums.view_as(cosines)])
        values = _softmax_values(sums, cosines, self.both, self.everyone.sum(), self.scale, form, block.comm)
        per_row = self.both.to(rows.dtype) / self.both.sum(1, keepdim=True).clamp_min(1)
        queries = self.everyone.any(1).sum().clamp_min(1)
        smoothed: Tensor | float = 0.0
        if form.name == "clip_label_smoothing":
            of_rows, of_columns = (1 + x.to(rows.dtype) for x in count_negatives(block, rows, self.columns, self.scale))
            candidates = torch.stack([of_rows[:, None].expand_as(cosines), of_columns.view_as(cosines)])
            values = values + form.smoothing * (1 - 1 / candidates) * cosines * self.scale
            weights = form.smoothing * per_row / candidates / (2 * queries)
            smoothed = self._total(block, (weights[0].sum(1), weights[1].flatten()), None)
        own = (values.mean(0) * per_row).sum(1).masked_fill(~self.both.any(1), 0).sum()
        return own / queries - smoothed

    def siglip(self, block: Candidates) -> Tensor:
        """What this rank adds to the sum over questions ÷ the number of positives of all ranks."""
        logits = self.scale * (self.a * self.b).sum(2) + self.bias
        positives = F.softplus(-logits, threshold=40.0).masked_fill(~self.both, 0.0).sum()
        halves = None
        if self.form.hard_quantile < 1:
            halves = self.rows.new_full((len(self.rows),), 0.5), self.rows.new_full((len(self.columns),), 0.5)
        count = self.everyone.sum().to(positives.dtype)
        share = torch.where(count > 0, 1 / count.clamp_min(1), 0.0)  # nothing to ask where there is no pair
        return share * (positives + self._total(block, halves, self.bias))

    def _total(self, block: Candidates, weights: tuple[Tensor, Tensor] | None, bias: Tensor | None) -> Tensor:
        any_wants, b_wants = self.wants
        total: Tensor = WeightedTotal.apply(
            self.rows, self.columns, self.scale, bias, weights, block, b_wants if any_wants else None
        )
        return total


def _softmax_values(
    sums: Tensor, cosines: Tensor, both: Tensor, positives_everywhere: Tensor, scale: Tensor, form: Form, comm: Comm
) -> Tensor:
    """The form of each query, in the shape of ``sums``, from the log-sum-exps of its negatives; 0 without any."""
    positives = scale * cosines
    if form.name not in ("dcl", "dclw"):
        # log(1 + Σ exp(negative − positive)): near 0 as exact as the logits are
        return torch.logaddexp(sums - positives, sums.new_zeros(()))
    if form.name == "dclw":
        everyone = comm.gather_by_rank(cosines.masked_fill(~both, -torch.inf))
        everyone = everyone.masked_fill(everyone.isneginf().all(), 0.0)  # no positive at all: any number, but no NaN
        shares = (everyone / form.sigma).flatten().softmax(0).view_as(everyone)
        own = shares[comm.rank * len(cosines) : (comm.rank + 1) * len(cosines)]
        weight = 2 - positives_everywhere * own
        positives = (weight.detach() if form.detach_weight else weight) * positives
    alone = sums.isneginf()
    return (sums.masked_fill(alone, 0.0) - positives).masked_fill(alone, 0.0)


def _unit(x: Tensor, present: Tensor) -> Tensor:
    """Rows of length 1; absent ones are 0 whatever they hold, and so is their gradient, as that of zero rows."""
    unit: Tensor = Unit.apply(x, present)
    return unit


def _anchor(x: Tensor, wants_gradient: bool) -> Tensor:
    return torch.zeros((), dtype=x.dtype, device=x.device, requires_grad=wants_gradient)


def _tile(tile: int | None, x: Tensor) -> int:
    return tile or (4096 if x.is_cuda else 1024)
