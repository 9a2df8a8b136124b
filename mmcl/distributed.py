"""Ranks as one: gathers in draw order, sums with gradients, and the contrastive loss of the whole batch.

Everything is the identity in a world of one, so the code of a loss is written once. Row ``i`` of rank ``r`` of ``W`` is
row ``i * W + r`` of the global batch (draw order): gathered rows come in the same order on any number of ranks.

Gradients follow one rule: averaging parameter gradients over ranks, as DDP does, gives the one-process gradient.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


class Comm:
    """One rank's view of the others. Every collective is called by all ranks, in the same order."""

    def __init__(self, rank: int = 0, world_size: int = 1, group: dist.ProcessGroup | None = None) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} does not lie in a world of {world_size}")
        self.rank = rank
        self.world_size = world_size
        self.group = group

    @classmethod
    def current(cls) -> Comm:
        """The running process group, or a world of one."""
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size())
        return cls()

    def __repr__(self) -> str:
        return f"Comm(rank={self.rank}, world_size={self.world_size})"

    def index(self, rows: int, device: torch.device | str | None = None) -> Tensor:
        """int64 ``(rows,)``: the global row number of each own row."""
        return torch.arange(rows, device=device) * self.world_size + self.rank

    def gather(self, x: Tensor, pad: bool = False) -> Tensor:
        """All rows in draw order: ``(B, …)`` of any dtype to ``(B * world_size, …)``; B is equal on all ranks.

        Differentiable: the gradient of an own row is the sum of what all ranks hand back for it; ``x`` requires grad on
        all ranks or on none. ``pad`` first pads the second axis with zeros to the longest of all ranks.
        """
        if self.world_size == 1:
            return x
        if pad:
            longest = int(self.max(torch.tensor(x.shape[1], device=x.device)))
            x = F.pad(x, [0, 0] * (x.ndim - 2) + [0, longest - x.shape[1]])
        return self.gather_by_rank(x).view(self.world_size, *x.shape).transpose(0, 1).flatten(0, 1)

    def gather_by_rank(self, x: Tensor) -> Tensor:
        """``gather`` without the interleaving: the rows of rank 0, then those of rank 1, …"""
        if self.world_size == 1:
            return x
        if x.dtype == torch.bool:
            return self.gather_by_rank(x.to(torch.uint8)).bool()
        gathered: Tensor = _Gather.apply(x, self)
        return gathered

    def sum(self, x: Tensor) -> Tensor:
        """Sum over ranks, elementwise. Differentiable: the gradient is the sum of what all ranks hand back."""
        if self.world_size == 1:
            return x
        total: Tensor = _Sum.apply(x, self)
        return total

    def max(self, x: Tensor) -> Tensor:
        """Maximum over ranks, elementwise; without gradient."""
        return self._reduced(x, dist.ReduceOp.MAX)

    def min(self, x: Tensor) -> Tensor:
        """Minimum over ranks, elementwise; without gradient."""
        return self._reduced(x, dist.ReduceOp.MIN)

    def mean(self, values: Tensor, mask: Tensor) -> Tensor:
        """Mean of ``values`` over the entries of all ranks where ``mask`` (same shape, bool) holds; 0 where none does.

        The value is global on every rank. The gradient is ``world_size`` × own sum ÷ global count, so that averaging
        over ranks is exact.
        """
        count = self.sum(mask.sum()).clamp_min(1)
        own = values.masked_fill(~mask, 0).sum() / count
        return self.sum(own.detach()) + self.world_size * (own - own.detach())

    def all_agree(self, flag: bool) -> bool:
        """Whether ``flag`` is true on every rank."""
        return bool(self.min(torch.tensor(int(flag), device=self.host_device)))

    def any(self, flag: bool) -> bool:
        """Whether ``flag`` is true on some rank."""
        return bool(self.max(torch.tensor(int(flag), device=self.host_device)))

    def gather_objects(self, value: Any) -> list[Any]:
        """A small JSON value of each rank, in rank order. Travels as JSON: nothing is unpickled."""
        text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(self.host_device)
        lengths = self.gather(torch.tensor([len(text)], device=text.device)).tolist()
        rows = self.gather(text[None], pad=True).cpu()
        return [json.loads(row[:n].numpy().tobytes()) for row, n in zip(rows, lengths, strict=True)]

    def barrier(self) -> None:
        """Returns once every rank has come here."""
        if self.world_size > 1:
            dist.barrier(self.group)

    def _reduced(self, x: Tensor, op: dist.ReduceOp.RedOpType) -> Tensor:
        x = x.detach().clone()
        if self.world_size > 1:
            dist.all_reduce(x, op, self.group)
        return x

    @property
    def host_device(self) -> torch.device:
        """Where a host value must lie to travel: NCCL alone moves nothing but CUDA tensors."""
        nccl = self.world_size > 1 and dist.get_backend(self.group) == "nccl"
        return torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")


# later versions of torch renamed both; the first name is the new one
_gather_into = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter_into = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def _all_gather(x: Tensor, comm: Comm) -> Tensor:
    out = x.new_empty(comm.world_size * x.shape[0], *x.shape[1:])
    _gather_into(out, x.contiguous(), group=comm.group)
    return out


def _reduce_scatter(x: Tensor, comm: Comm) -> Tensor:
    """``(W * B, …)``, rank after rank, to the sum over ranks of this rank's ``(B, …)``. May write into ``x``."""
    if comm.world_size == 1:
        return x
    rows = x.shape[0] // comm.world_size
    if dist.get_backend(comm.group) == "nccl":
        out = x.new_empty(rows, *x.shape[1:])
        _reduce_scatter_into(out, x.contiguous(), group=comm.group)
        return out
    x = x.contiguous()  # gloo scatters no sum
    dist.all_reduce(x, group=comm.group)
    return x[comm.rank * rows : (comm.rank + 1) * rows].clone()


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, comm: Comm) -> Tensor:
        ctx.comm = comm
        return _all_gather(x, comm)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _reduce_scatter(gradient.clone(), ctx.comm), None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, comm: Comm) -> Tensor:
        ctx.comm = comm
        total = x.clone()
        dist.all_reduce(total, group=comm.group)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        total = gradient.clone()
        dist.all_reduce(total, group=ctx.comm.group)
        return total, None


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
) -> Tensor:
    """Symmetric InfoNCE (CLIP) between ``a`` and ``b`` over the rows of all ranks, without the N × N logits in memory.

    Row i takes part, as query and as candidate, only where it is present on both sides. The loss is ½ · [mean over
    these rows of −log softmax a→b + the same b→a]; 0 with zero gradients where no rank has such a row.

    Args:
        a, b: float ``(B, D)``, normalised inside; B is equal on all ranks. float64 gives float64, the rest float32,
            under autocast too. Rows that are not present may hold anything.
        scale: the multiplier of the cosine (1 / temperature), a float or a 0-d tensor.
        present_a, present_b: bool ``(B,)``; None: all.
        groups: int64 ``(B,)`` or ``(B, G)``; rows with equal numbers in any column are never each other's negatives;
            −1: none.
        tile: rows and columns of a block of logits; memory beyond the features is O(tile²).
        unpaired_negatives: rows present on one side only are candidates as well.

    Returns:
        The global loss, 0-d, on every rank. Backward leaves ``world_size`` · ∂L/∂a on a rank's rows, and for ``scale``
        a value whose mean over ranks is ∂L/∂scale, so that averaging over ranks gives the one-process gradient.

    Raises:
        ValueError: on all ranks, if the shapes are not those above or differ between ranks.

    Radford et al. 2021 (arXiv 2103.00020), figure 3.
    """
    if groups is not None and groups.ndim == 1:
        groups = groups[:, None]
    everyone = torch.ones(len(a), dtype=torch.bool, device=a.device)
    masks = [everyone if present is None else present for present in (present_a, present_b)]
    wants_gradient, b_wants_gradient = _agree([a, b, *masks, groups], scale, unpaired_negatives, comm)
    with torch.autocast(a.device.type, enabled=False):
        dtype = torch.float64 if torch.float64 in (a.dtype, b.dtype) else torch.float32
        plan = _Plan.of(masks[0], masks[1], groups, unpaired_negatives, comm)
        scale = torch.as_tensor(scale, dtype=dtype, device=a.device)
        # Ranks meet in backward as well: one whose own inputs are constants has to come too.
        anchor = torch.zeros((), dtype=dtype, device=a.device, requires_grad=wants_gradient)
        if plan.count == 0:
            return a[:0].to(dtype).sum() + b[:0].to(dtype).sum() + 0 * scale + anchor
        unit_a, unit_b = _unit(a.to(dtype), present_a), _unit(b.to(dtype), present_b)
        tile = tile or (4096 if a.is_cuda else 1024)
        loss: Tensor = _Contrastive.apply(unit_a, unit_b, scale, anchor, plan, tile, b_wants_gradient)
        return loss


def _unit(x: Tensor, present: Tensor | None) -> Tensor:
    """Rows of length 1; absent ones are 0 whatever they hold, and so is their gradient."""
    return F.normalize(x if present is None else x.masked_fill(~present[:, None], 0), dim=1)


def _agree(
    tensors: list[Tensor | None], scale: Tensor | float, unpaired_negatives: bool, comm: Comm
) -> tuple[bool, bool]:
    """Raises on all ranks if one of them cannot go on. Returns whether some rank wants a gradient, and for ``b``."""
    wants = [torch.is_grad_enabled() and isinstance(x, Tensor) and x.requires_grad for x in (*tensors[:2], scale)]
    shapes = [[-1, -1, -1] if x is None else [*x.shape, -1, -1, -1][:3] for x in tensors]
    facts = [*(size for shape in shapes for size in shape), int(unpaired_negatives), int(any(wants)), int(wants[1])]
    every = comm.gather(torch.tensor([facts], device=comm.host_device)).tolist()
    a, b, present_a, present_b, groups = shapes
    fits = a == b and a[1] >= 0 > a[2] and present_a == present_b == [a[0], -1, -1] and groups[0] in (-1, a[0])
    if not fits or any(other[:-2] != facts[:-2] for other in every):
        raise ValueError(
            "a and b must be (B, D), present_a and present_b (B,), groups (B,) or (B, G) or None, all equal on all "
            f"ranks, as unpaired_negatives; these six by rank, -1 for no axis: {[other[:-2] for other in every]}"
        )
    return any(other[-2] for other in every), any(other[-1] for other in every)


@dataclass(frozen=True, eq=False)
class _Plan:
    """Which rows meet which columns: own candidates of ``a`` × candidates of ``b`` of all ranks, rank after rank.

    Rows and columns that take no part are left out, not masked: an absent row equals a deleted one.
    """

    comm: Comm
    count: int
    """pairs of all ranks"""
    paired: Tensor
    """bool ``(B,)``: own rows that are present on both sides"""
    rows: Tensor
    """int64: the own rows of ``a`` that are candidates"""
    columns: Tensor
    """int64: the gathered rows of ``b`` that are candidates"""
    row_asks: Tensor
    """bool, for each of ``rows``: it is one of a pair, so its softmax counts"""
    column_asks: Tensor
    row_numbers: Tensor
    """int64, for each of ``rows``: its number among the gathered ones"""
    groups: Tensor | None
    """int64 ``(G, N)``; −1: of no group"""

    @classmethod
    def of(
        cls, present_a: Tensor, present_b: Tensor, groups: Tensor | None, unpaired_negatives: bool, comm: Comm
    ) -> _Plan:
        batch = len(present_a)
        own = slice(comm.rank * batch, (comm.rank + 1) * batch)
        all_a, all_b = comm.gather_by_rank(torch.stack([present_a, present_b], 1)).unbind(1)
        paired = all_a & all_b
        rows = (present_a if unpaired_negatives else paired[own]).nonzero()[:, 0]
        columns = (all_b if unpaired_negatives else paired).nonzero()[:, 0]
        numbers = rows + own.start
        return cls(
            comm=comm,
            count=int(paired.sum()),
            paired=paired[own],
            rows=rows,
            columns=columns,
            row_asks=paired[numbers],
            column_asks=paired[columns],
            row_numbers=numbers,
            groups=None if groups is None else _shared_groups(comm.gather_by_rank(groups)),
        )

    def logits(self, rows: Tensor, columns: Tensor, scale: Tensor, i: slice, j: slice) -> Tensor:
        """One tile of the block, −inf where row and column are of one group without being a pair."""
        logits = (rows[i] @ columns[j].T).mul_(scale)
        if self.groups is not None:
            row, column = self.row_numbers[i, None], self.columns[j]
            for group in self.groups:
                same = (group[row] == group[column]) & (group[column] >= 0) & (row != column)
                logits.masked_fill_(same, -torch.inf)
        return logits


def _shared_groups(groups: Tensor) -> Tensor | None:
    """``(N, G)`` to ``(G, N)`` with −1 for numbers that only one row has; None if that is all of them."""
    shared = torch.full_like(groups.T, -1, memory_format=torch.contiguous_format)
    for column, numbers in zip(groups.unbind(1), shared, strict=True):
        _, inverse, counts = torch.unique(column, return_inverse=True, return_counts=True)
        numbers.copy_(torch.where((counts[inverse] > 1) & (column >= 0), inverse, -1))
    return shared if bool((shared >= 0).any()) else None


def _slices(size: int, tile: int) -> list[slice]:
    return [slice(start, min(start + tile, size)) for start in range(0, size, tile)]


def _pick(x: Tensor, index: Tensor) -> Tensor:
    return x if len(index) == len(x) else x[index]


def _put_back(x: Tensor, index: Tensor, size: int) -> Tensor:
    """The inverse of ``_pick``, with zeros where nothing was picked."""
    return x if len(x) == size else x.new_zeros(size, x.shape[1]).index_copy_(0, index, x)


class _Contrastive(torch.autograd.Function):
    """One block of logits, own rows × all columns, serves both directions.

    Forward keeps only log-sum-exps: those of own rows are whole, those of columns are partial and joined over ranks.
    Backward makes each tile again. Four matrix products, where a block for each direction takes six.
    """

    @staticmethod
    def forward(
        ctx: Any, a: Tensor, b: Tensor, scale: Tensor, anchor: Tensor, plan: _Plan, tile: int, b_wants_gradient: bool
    ) -> Tensor:
        comm = plan.comm
        rows, columns = _pick(a, plan.rows), _pick(comm.gather_by_rank(b), plan.columns)
        row_sums = a.new_full((len(rows),), -torch.inf)  # log Σ exp of each row
        column_sums = a.new_full((len(columns),), -torch.inf)
        for j in _slices(len(columns), tile):
            for i in _slices(len(rows), tile):
                logits = plan.logits(rows, columns, scale, i, j)
                row_sums[i] = torch.logaddexp(row_sums[i], logits.logsumexp(1))
                column_sums[j] = torch.logaddexp(column_sums[j], logits.logsumexp(0))
        top = comm.max(column_sums)  # −inf, and NaN below, only for columns that do not ask
        column_sums = top + comm.sum((column_sums - top).exp()).log()
        positives = ((a * b).sum(1) * scale)[plan.paired]
        own = (row_sums[plan.row_asks] - positives).sum() - positives.sum()
        loss = (comm.sum(own) + column_sums[plan.column_asks].sum()) / (2 * plan.count)
        # +inf: the softmax of a row that does not ask is 0 everywhere, also if nothing is left of it
        row_sums.masked_fill_(~plan.row_asks, torch.inf)
        column_sums.masked_fill_(~plan.column_asks, torch.inf)
        ctx.save_for_backward(a, b, scale, columns, row_sums, column_sums)
        ctx.plan, ctx.tile, ctx.b_wants_gradient = plan, tile, b_wants_gradient
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        a, b, scale, columns, row_sums, column_sums = ctx.saved_tensors
        plan: _Plan = ctx.plan
        comm = plan.comm
        weight = gradient * comm.world_size / (2 * plan.count)
        pull = -2 * weight * plan.paired[:, None]  # what the positives take off both softmaxes
        with torch.autocast(a.device.type, enabled=False):
            d_rows, d_columns = _softmax_products(ctx, _pick(a, plan.rows), columns, scale, row_sums, column_sums)
            # d_rows is the gradient by a·scale until the last line, so that Σ a·d_rows is the gradient by scale
            d_a = _put_back(d_rows, plan.rows, len(a)).mul_(weight).addcmul_(pull, b)
            d_scale = (d_a * a).sum()
            d_b = None
            if ctx.b_wants_gradient:
                d_b = _reduce_scatter(_put_back(d_columns, plan.columns, len(b) * comm.world_size), comm)
                d_b = d_b.mul_(weight).addcmul_(pull, a).mul_(scale)
            return d_a.mul_(scale), d_b, d_scale, None, None, None, None


def _softmax_products(
    ctx: Any, rows: Tensor, columns: Tensor, scale: Tensor, row_sums: Tensor, column_sums: Tensor
) -> tuple[Tensor, Tensor]:
    """G @ columns and Gᵀ @ rows, tile by tile, where G is the sum of the softmaxes of both directions."""
    d_rows, d_columns = torch.zeros_like(rows), torch.zeros_like(columns)
    for j in _slices(len(columns), ctx.tile):
        for i in _slices(len(rows), ctx.tile):
            logits = ctx.plan.logits(rows, columns, scale, i, j)
            softmax = (logits - row_sums[i, None]).exp_()
            softmax += logits.sub_(column_sums[j]).exp_()
            d_rows[i].addmm_(softmax, columns[j])
            if ctx.b_wants_gradient:
                d_columns[j].addmm_(softmax.T, rows[i])
    return d_rows, d_columns
