"""Ranks as one: gathers in draw order and sums, with gradients.

Everything is the identity in a world of one, so the code of a loss is written once. Row ``i`` of rank ``r`` of ``W`` is
row ``i * W + r`` of the global batch (draw order): gathered rows come in the same order on any number of ranks.

Gradients follow one rule: averaging parameter gradients over ranks, as DDP does, gives the one-process gradient.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
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

    def gather_together(self, xs: Sequence[Tensor]) -> list[Tensor]:
        """:meth:`gather_by_rank` of each, in one exchange where they are small: that one takes as long as any.

        Their dtypes are one of floats, or of whole numbers and bool. Without gradient.
        """
        if self.world_size == 1 or not _small(xs):
            return [self.gather_by_rank(x.detach()) for x in xs]
        packed = self.gather_by_rank(torch.cat([x.detach().flatten() for x in xs]))
        parts = torch.split(packed.view(self.world_size, len(packed) // self.world_size), [x.numel() for x in xs], 1)
        return [
            part.reshape(self.world_size * len(x), *x.shape[1:]).to(x.dtype) for part, x in zip(parts, xs, strict=True)
        ]

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
        own = values.masked_fill(~mask, 0).sum()
        if self.world_size == 1:
            return own / mask.sum().clamp_min(1)
        both = torch.stack([own.detach().double(), mask.sum().double()])  # one exchange, and the count stays exact
        total, count = self.sum(both).to(own.dtype).unbind()
        count = count.clamp_min(1)
        return total / count + self.world_size * (own - own.detach()) / count

    def share(self, own: Tensor) -> Tensor:
        """Sum over ranks of what each adds to one loss, with the gradient of :meth:`mean`: ``world_size`` × own."""
        return self.sum(own.detach()) + self.world_size * (own - own.detach())

    def all_agree(self, flag: bool) -> bool:
        """Whether ``flag`` is true on every rank."""
        return bool(self.min(torch.tensor(int(flag), device=self.host_device)))

    def any(self, flag: bool) -> bool:
        """Whether ``flag`` is true on some rank."""
        return bool(self.max(torch.tensor(int(flag), device=self.host_device)))

    def any_of(self, flags: Sequence[bool]) -> list[bool]:
        """:meth:`any` of several flags, in one exchange."""
        return [
            bool(flag) for flag in self.max(torch.tensor([int(x) for x in flags], device=self.host_device)).tolist()
        ]

    def gather_objects(self, value: Any) -> list[Any]:
        """A small JSON value of each rank, in rank order. Travels as JSON: nothing is unpickled."""
        text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(self.host_device)
        lengths = self.gather(torch.tensor([len(text)], device=text.device)).tolist()
        rows = self.gather(F.pad(text, [0, max(lengths) - len(text)])[None]).cpu()
        return [json.loads(row[:n].numpy().tobytes()) for row, n in zip(rows, lengths, strict=True)]

    def barrier(self) -> None:
        """Returns once every rank has come here."""
        if self.world_size > 1:
            dist.barrier(self.group)

    def _reduced(self, x: Tensor, op: dist.ReduceOp.RedOpType) -> Tensor:
        return x.detach().clone() if self.world_size == 1 else _all_reduce(x.detach(), self, op)

    @property
    def host_device(self) -> torch.device:
        """Where a host value must lie to travel: NCCL alone moves nothing but CUDA tensors."""
        nccl = self.world_size > 1 and dist.get_backend(self.group) == "nccl"
        return torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")


# later versions of torch renamed both; the first name is the new one
_gather_into = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter_into = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


DIRECT_BYTES = 2**18
"""on CPUs, what a rank sends to each other one at once; above it more bytes cost more than more rounds do"""


def _direct(x: Tensor) -> bool:
    """Whether ``x`` travels from each rank to each at once: gloo's rings take as many rounds as there are ranks."""
    return x.is_cpu and x.nbytes <= DIRECT_BYTES


def _all_gather(x: Tensor, comm: Comm) -> Tensor:
    out = x.new_empty(comm.world_size * x.shape[0], *x.shape[1:])
    if _direct(x):
        dist.all_to_all_single(out, x.repeat(comm.world_size, *[1] * (x.ndim - 1)), group=comm.group)
    else:
        _gather_into(out, x.contiguous(), group=comm.group)
    return out


def _all_reduce(x: Tensor, comm: Comm, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
    """A new tensor."""
    if not _direct(x):
        x = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(x, op, comm.group)
        return x
    everyone = _all_gather(x[None], comm)
    if op == dist.ReduceOp.SUM:
        return everyone.sum(0, dtype=x.dtype)
    return everyone.amax(0) if op == dist.ReduceOp.MAX else everyone.amin(0)


def reduce_scatter(x: Tensor, comm: Comm) -> Tensor:
    """``(W * B, …)``, rank after rank, to the sum over ranks of this rank's ``(B, …)``. May write into ``x``."""
    if comm.world_size == 1:
        return x
    rows = x.shape[0] // comm.world_size
    if dist.get_backend(comm.group) == "nccl":
        out = x.new_empty(rows, *x.shape[1:])
        _reduce_scatter_into(out, x.contiguous(), group=comm.group)
        return out
    x = x.contiguous()  # gloo scatters no sum
    if x.is_cpu and x.nbytes <= SMALL_BYTES:
        parts = torch.empty_like(x)
        dist.all_to_all_single(parts, x, group=comm.group)
        return parts.view(comm.world_size, rows, *x.shape[1:]).sum(0, dtype=x.dtype)
    dist.all_reduce(x, group=comm.group)  # takes no more memory
    return x[comm.rank * rows : (comm.rank + 1) * rows].clone()


def reduce_scatter_together(xs: Sequence[Tensor], comm: Comm) -> list[Tensor]:
    """:func:`reduce_scatter` of each, in one exchange where they are small. May write into them."""
    if comm.world_size == 1 or not _small(xs):
        return [reduce_scatter(x, comm) for x in xs]
    packed = torch.cat([x.reshape(comm.world_size, x.numel() // comm.world_size) for x in xs], 1)
    own = reduce_scatter(packed, comm)[0]
    parts = torch.split(own, [x.numel() // comm.world_size for x in xs])
    return [part.view(len(x) // comm.world_size, *x.shape[1:]).to(x.dtype) for part, x in zip(parts, xs, strict=True)]


SMALL_BYTES = 2**24
"""tensors that travel together; above it the copy costs more than an exchange of its own"""


def _small(xs: Sequence[Tensor]) -> bool:
    return len(xs) > 1 and sum(x.nbytes for x in xs) <= SMALL_BYTES


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, comm: Comm) -> Tensor:
        ctx.comm = comm
        return _all_gather(x, comm)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return reduce_scatter(gradient.clone(), ctx.comm), None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, comm: Comm) -> Tensor:
        ctx.comm = comm
        return _all_reduce(x, comm)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _all_reduce(gradient, ctx.comm), None
