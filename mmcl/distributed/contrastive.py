"""Contrastive losses over the rows of all ranks, exact and without the N × N logits in memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from mmcl.distributed.candidates import Candidates
from mmcl.distributed.comm import Comm
from mmcl.distributed.tiled import LogSums, Unit, WeightedTotal, count_negatives, with_hardest

FormName: TypeAlias = Literal["infonce", "siglip", "dcl", "dclw", "clip_label_smoothing"]


@dataclass(frozen=True)
class Form:
    """What is made of the logits.

    With s a logit (scale × cosine), p a positive and n_i the log-sum-exp over the negatives of query i:

    - ``infonce``: log(e^p + e^n) − p (van den Oord et al. 2018, arXiv 1807.03748; both directions: CLIP, 2103.00020);
    - ``dcl``: n − p, the positive is not in the sum (Yeh et al. 2021, arXiv 2110.06848); 0 without negatives;
    - ``dclw``: n − w·p, w = 2 − P·softmax over all P positives (cosine / ``sigma``), of mean 1;
    - ``clip_label_smoothing``: infonce against targets 1 − ε on the positive and ε/M more on each of the query's M
      candidates, itself included; ε is ``smoothing`` (Fini et al. 2023, arXiv 2305.08675, use 0.1);
    - ``siglip``: Σ over positives softplus(−s − bias) + Σ over negatives softplus(s + bias), ÷ the number of positives
      (Zhai et al. 2023, arXiv 2303.15343).
    """

    name: FormName = "infonce"
    sigma: float = 0.5
    detach_weight: bool = True
    """DCLW's weight is a number, not something to learn through"""
    smoothing: float = 0.1
    hard_quantile: float = 1.0
    """share of negatives that count, the hardest: each query keeps ⌈share · M⌉ of the M negatives it has on all ranks,
    those of highest cosine, ties included; a query is a row in one direction, a column in the other. SigLIP has no
    direction: a negative weighs ½ for its row and ½ for its column. 1: all (Wang & Liu 2021, arXiv 2012.09740)"""


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
    form = form or Form()
    groups, groups_b = (x[:, None] if x is not None and x.ndim == 1 else x for x in (groups, groups_b))
    masks = [
        torch.ones(a.shape[:1], dtype=torch.bool, device=a.device) if present_a is None else present_a,
        torch.ones(b.shape[:-1], dtype=torch.bool, device=b.device) if present_b is None else present_b,
    ]
    wants = _agree([a, b, *masks, groups, groups_b, pools], (scale, bias), unpaired_negatives, form, comm)
    with torch.autocast(a.device.type, enabled=False):
        dtype = torch.float64 if torch.float64 in (a.dtype, b.dtype) else torch.float32
        mask_a, mask_b = masks[0][:, None], masks[1] if b.ndim > 2 else masks[1][:, None]
        both = mask_a & mask_b
        pairs = _Pairs(
            a=_unit(a.to(dtype)[:, None], mask_a),
            b=_unit(b.to(dtype) if b.ndim > 2 else b.to(dtype)[:, None], mask_b),
            both=both,
            scale=torch.as_tensor(scale, dtype=dtype, device=a.device),
            bias=torch.as_tensor(bias, dtype=dtype, device=a.device),
            form=form,
            wants=wants,
        )
        takes_part = (mask_a, mask_b) if unpaired_negatives else (both.any(1, keepdim=True), both)
        numbers = None if groups is None else (groups, groups if groups_b is None else groups_b)
        block = Candidates.of(*takes_part, numbers, _tile(tile, a), comm, pools)
        if form.hard_quantile < 1:
            block = with_hardest(block, pairs.rows, pairs.columns, pairs.scale, form.hard_quantile)
        return pairs.siglip(block) if form.name == "siglip" else pairs.softmax(block)


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
    groups = groups[:, None] if groups is not None and groups.ndim == 1 else groups
    mask = torch.ones(a.shape[:1], dtype=torch.bool, device=a.device) if present is None else present
    any_wants, _ = _agree([a, b, mask, mask, groups, None, pools], (scale, 0.0), False, form, comm, several=False)
    with torch.autocast(a.device.type, enabled=False):
        dtype = torch.float64 if torch.float64 in (a.dtype, b.dtype) else torch.float32
        both = mask[:, None].expand(-1, 2)
        views = _unit(torch.stack([a.to(dtype), b.to(dtype)], 1), both)
        rows = views.flatten(0, 1)
        scale = torch.as_tensor(scale, dtype=dtype, device=a.device)
        block = Candidates.of(both, both, None if groups is None else (groups, groups), _tile(tile, a), comm, pools)
        if form.hard_quantile < 1:
            block = with_hardest(block, rows, None, scale, form.hard_quantile)
        sums: Tensor = LogSums.apply(rows, None, scale, _anchor(rows, any_wants), block, False)
        cosines = (views[:, 0] * views[:, 1]).sum(1)[:, None]
        values = _softmax_values(sums.view(-1, 2), cosines, mask[:, None], scale, form, comm)
        return comm.mean(values.mean(1), mask)


@dataclass(frozen=True, eq=False)
class _Pairs:
    """Unit rows of both sides, ``a (B, 1, D)`` and ``b (B, K, D)``, and which are pairs, bool ``(B, K)``."""

    a: Tensor
    b: Tensor
    both: Tensor
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

    def softmax(self, block: Candidates) -> Tensor:
        """The mean over rows of the mean over their positives of both directions."""
        comm, form = block.comm, self.form
        rows, columns = self.rows, self.columns
        any_wants, b_wants = self.wants
        row_sums, column_sums = LogSums.apply(rows, columns, self.scale, _anchor(rows, any_wants), block, b_wants)
        cosines = (self.a * self.b).sum(2)
        sums = torch.stack([row_sums[:, None].expand_as(cosines), column_sums.view_as(cosines)])
        values = _softmax_values(sums, cosines, self.both, self.scale, form, comm)
        per_row = self.both.to(rows.dtype) / self.both.sum(1, keepdim=True).clamp_min(1)
        smoothed = torch.zeros_like(self.scale)
        if form.name == "clip_label_smoothing":
            of_rows, of_columns = (1 + x.to(rows.dtype) for x in count_negatives(block, rows, columns, self.scale))
            candidates = torch.stack([of_rows[:, None].expand_as(cosines), of_columns.view_as(cosines)])
            values = values + form.smoothing * (1 - 1 / candidates) * cosines * self.scale
            pairs = comm.sum(self.both.any(1).sum()).clamp_min(1)
            weights = form.smoothing * per_row / candidates / (2 * pairs)
            smoothed = self._total(block, (weights[0].sum(1), weights[1].flatten()), None)
        return comm.mean((values.mean(0) * per_row).sum(1), self.both.any(1)) - comm.share(smoothed)

    def siglip(self, block: Candidates) -> Tensor:
        """The sum over questions ÷ the number of positives of all ranks."""
        comm = block.comm
        logits = self.scale * (self.a * self.b).sum(2) + self.bias
        positives = F.softplus(-logits, threshold=40.0).masked_fill(~self.both, 0.0).sum()
        halves = None
        if self.form.hard_quantile < 1:
            halves = self.rows.new_full((len(self.rows),), 0.5), self.rows.new_full((len(self.columns),), 0.5)
        count = comm.sum(self.both.sum()).to(positives.dtype)
        share = torch.where(count > 0, 1 / count.clamp_min(1), 0.0)  # nothing to ask where there is no pair
        return comm.share(share * (positives + self._total(block, halves, self.bias)))

    def _total(self, block: Candidates, weights: tuple[Tensor, Tensor] | None, bias: Tensor | None) -> Tensor:
        any_wants, b_wants = self.wants
        total: Tensor = WeightedTotal.apply(
            self.rows, self.columns, self.scale, bias, weights, block, b_wants if any_wants else None
        )
        return total


def _softmax_values(sums: Tensor, cosines: Tensor, both: Tensor, scale: Tensor, form: Form, comm: Comm) -> Tensor:
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
        weight = 2 - comm.sum(both.sum()) * own
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


def _agree(
    tensors: list[Tensor | None],
    learned: tuple[Tensor | float, ...],
    unpaired_negatives: bool,
    form: Form,
    comm: Comm,
    several: bool = True,
) -> tuple[bool, bool]:
    """Raises on all ranks if one of them cannot go on. Returns whether some rank wants a gradient, and for ``b``."""
    wants = [torch.is_grad_enabled() and isinstance(x, Tensor) and x.requires_grad for x in (*tensors[:2], *learned)]
    shapes = [[-1, -1, -1] if x is None else [*x.shape, -1, -1, -1][:3] for x in tensors]
    settings = [int(unpaired_negatives), *form.name.encode().ljust(24), *_bits(form)]
    facts = [*(size for shape in shapes for size in shape), *settings, int(any(wants)), int(wants[1])]
    every = comm.gather(torch.tensor([facts], device=comm.host_device)).tolist()
    a, b, present_a, present_b, groups, groups_b, pools = shapes
    width = b[2] if b[2] >= 0 and several else b[1]
    fits = (
        a == [b[0], width, -1]
        and width >= 0
        and present_a == [a[0], -1, -1]
        and present_b == ([*b[:2], -1] if width == b[2] else [b[0], -1, -1])
        and groups[0] in (-1, a[0])
        and groups_b in ([-1, -1, -1], groups)
        and pools in ([-1, -1, -1], [a[0], -1, -1])
    )
    if not fits or any(other[:-2] != facts[:-2] for other in every):
        raise ValueError(
            "a must be (B, D), b (B, D) or (B, K, D), present_a (B,), present_b as b without D, groups and groups_b "
            "(B,) or (B, G) or None, pools (B,) or None, all equal on all ranks, as unpaired_negatives and form; these "
            f"by rank, -1 for no axis: {[other[: 3 * len(shapes) + 1] for other in every]}"
        )
    return any(other[-2] for other in every), any(other[-1] for other in every)


def _bits(form: Form) -> list[int]:
    """The numbers of a form as whole ones."""
    values = (form.sigma, form.smoothing, form.hard_quantile, float(form.detach_weight))
    return [int(x) for x in torch.tensor(values, dtype=torch.float64).view(torch.int64)]
