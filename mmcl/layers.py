"""Parts of heads and decoders: MLPs, causal layers, a batch norm that does not depend on how rows lie on ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import pairwise
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


class _SumOverRanks(torch.autograd.Function):
    """All-reduce whose gradient is all-reduced as well; the identity without a process group."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.clone()
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(total)
        return total


class RankBatchNorm(nn.Module):
    """Batch norm over the present rows of all ranks (Ioffe & Szegedy 2015, algorithm 1), also on CPUs.

    With all rows present, on one rank, it is torch's ``BatchNorm1d``, ``2d`` and ``3d``. Fewer than two values of a
    channel define no variance: they come out as ``bias``, and the running statistics stay. In training every rank calls
    it equally often.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, width: int, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))
        self.register_buffer("running_mean", torch.zeros(width))
        self.register_buffer("running_var", torch.ones(width))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """float ``(B, D)`` or ``(B, D, …)`` to the same; ``mask`` bool ``(B,)``: rows present (None: all; inside
        :func:`absent_rows` none are), the others become 0.
        """
        if _ABSENT.get():
            mask = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        absent = None if mask is None else ~mask.view(-1, *[1] * (x.ndim - 1))
        shape = (1, -1, *[1] * (x.ndim - 2))
        with torch.autocast(x.device.type, enabled=False):
            rows = x if x.dtype == torch.float64 else x.float()
            rows = rows if absent is None else rows.masked_fill(absent, 0)
            mean, variance = self.running_mean.view(shape), self.running_var.view(shape)
            if self.training:
                mean, variance = self._batch_statistics(rows, mask, absent)
            scale = (variance + self.eps).rsqrt() * self.weight.view(shape)
            out = (rows - mean) * scale + self.bias.view(shape)
            return (out if absent is None else out.masked_fill(absent, 0)).to(x.dtype)

    def _batch_statistics(self, rows: Tensor, mask: Tensor | None, absent: Tensor | None) -> tuple[Tensor, Tensor]:
        axes = (0, *range(2, rows.ndim))
        here = rows.new_tensor(len(rows)) if mask is None else mask.sum().to(rows.dtype)
        count = _sum_over_ranks(here * (rows[0, 0].numel() if len(rows) else 1))
        mean = _sum_over_ranks(rows.sum(axes, keepdim=True)) / count.clamp_min(1)
        # squares of deviations, not of values: those lose all digits where the mean is large
        deviations = rows - mean
        deviations = deviations if absent is None else deviations.masked_fill(absent, 0)
        variance = _sum_over_ranks(deviations.square().sum(axes, keepdim=True)) / count.clamp_min(1)
        if _SECOND.get():
            return mean, variance
        with torch.no_grad():
            step = self.momentum * (count >= 2).to(rows.dtype)
            self.running_mean.lerp_(mean.flatten(), step)
            self.running_var.lerp_((variance * count / (count - 1).clamp_min(1)).flatten(), step)
        return mean, variance


_ABSENT: ContextVar[bool] = ContextVar("_ABSENT", default=False)
_SECOND: ContextVar[bool] = ContextVar("_SECOND", default=False)


@contextmanager
def absent_rows(absent: bool = True) -> Iterator[None]:
    """Inside it, rows count for no statistics (a rank without rows runs one for show)."""
    token = _ABSENT.set(absent)
    try:
        yield
    finally:
        _ABSENT.reset(token)


@contextmanager
def second_forward() -> Iterator[None]:
    """Inside it, running statistics stay: the same rows have moved them once."""
    token = _SECOND.set(True)
    try:
        yield
    finally:
        _SECOND.reset(token)


def _sum_over_ranks(x: Tensor) -> Tensor:
    total: Tensor = _SumOverRanks.apply(x)
    return total


class MLPHead(nn.Module):
    """``layers`` linear maps with an activation between; one layer is a linear map and ignores ``hidden``.

    ``norm`` comes before each activation: none, over present rows of all ranks (``batch``), or over features
    (``layer``).
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        out: int,
        layers: int = 2,
        norm: Literal["none", "batch", "layer"] = "none",
        activation: Literal["gelu", "relu", "silu"] = "gelu",
    ) -> None:
        super().__init__()
        if layers < 1:
            raise ValueError(f"a head has at least one layer, got {layers}")
        norms = {"none": nn.Identity, "batch": RankBatchNorm, "layer": nn.LayerNorm}
        if norm not in norms:
            raise ValueError(f"norm {norm!r} is not one of {', '.join(norms)}")
        functions: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu}
        self.activation = functions[activation]
        widths = [width, *[hidden] * (layers - 1)]
        # batch norm takes the mean away, and a bias with it
        hidden_layers = [nn.Linear(a, b, bias=norm != "batch") for a, b in pairwise(widths)]
        self.linears = nn.ModuleList([*hidden_layers, nn.Linear(widths[-1], out)])
        self.norms = nn.ModuleList(norms[norm](hidden) for _ in hidden_layers)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """float ``(B, width)`` to ``(B, out)``; ``mask`` bool ``(B,)``: rows that are present."""
        for linear, norm in zip(self.linears, self.norms, strict=False):
            x = linear(x)
            x = self.activation(norm(x, mask) if isinstance(norm, RankBatchNorm) else norm(x))
        out: Tensor = self.linears[-1](x)
        return out


class CausalBlock(nn.Module):
    """A transformer layer in which nothing sees what comes after it: self-attention, cross-attention to a memory where
    ``memory`` asks for it, and an MLP, each after a layer norm and added to its input.
    """

    def __init__(self, width: int, heads: int, hidden: int, dropout: float = 0.0, *, memory: bool = False) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} must be a multiple of heads, {heads}")
        self.heads, self.dropout = heads, nn.Dropout(dropout)
        self.norm, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.cross: nn.ModuleDict | None = None
        if memory:
            parts = {"norm": nn.LayerNorm(width), "q": nn.Linear(width, width), "kv": nn.Linear(width, 2 * width)}
            self.cross = nn.ModuleDict({**parts, "out": nn.Linear(width, width)})
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, hidden), nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden, width)
        )

    def forward(self, x: Tensor, memory: Tensor | None = None, real: Tensor | None = None) -> Tensor:
        """float ``(B, L, D)`` to the same.

        ``memory`` ``(B, M, D)``, for a block that was made with it; ``real`` bool ``(B, L)``: what may be seen, True at
        the first place (None: everything).
        """
        q, k, v = (self._split(part) for part in self.qkv(self.norm(x)).chunk(3, -1))
        seen = None
        if real is not None:
            length = x.shape[1]
            seen = torch.ones(length, length, dtype=torch.bool, device=x.device).tril() & real[:, None, None]
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, is_causal=seen is None)
        x = x + self.dropout(self.out(self._joined(attended)))
        if self.cross is not None:
            assert memory is not None
            q = self._split(self.cross["q"](self.cross["norm"](x)))
            k, v = (self._split(part) for part in self.cross["kv"](memory).chunk(2, -1))
            attended = F.scaled_dot_product_attention(q, k, v)
            x = x + self.dropout(self.cross["out"](self._joined(attended)))
        out: Tensor = x + self.dropout(self.mlp(x))
        return out

    def _split(self, x: Tensor) -> Tensor:
        """``(B, L, D)`` to ``(B, heads, L, D / heads)``."""
        return x.view(*x.shape[:2], self.heads, -1).transpose(1, 2)

    @staticmethod
    def _joined(x: Tensor) -> Tensor:
        return x.transpose(1, 2).flatten(2)


def sinusoids(length: int, width: int, like: Tensor) -> Tensor:
    """Positions ``(length, width)`` of any length, sines before cosines (Vaswani et al. 2017); dtype of ``like``."""
    half = (width + 1) // 2
    rates = 10_000.0 ** (-torch.arange(half, device=like.device, dtype=torch.float64) / half)
    angles = torch.arange(length, device=like.device, dtype=torch.float64)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], 1)[:, :width].to(like.dtype)
