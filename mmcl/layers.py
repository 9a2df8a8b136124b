"""Parts of heads: MLPs, and a batch norm whose statistics do not depend on how rows are spread over ranks."""

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
        """float ``(B, D)`` or ``(B, D, …)`` to the same; ``mask`` bool ``(B,)``: rows present (None: all, or none
        inside :func:`absent_rows`), the others become 0.
        """
        if mask is None and _ABSENT.get():
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
        with torch.no_grad():
            step = self.momentum * (count >= 2).to(rows.dtype)
            self.running_mean.lerp_(mean.flatten(), step)
            self.running_var.lerp_((variance * count / (count - 1).clamp_min(1)).flatten(), step)
        return mean, variance


_ABSENT: ContextVar[bool] = ContextVar("_ABSENT", default=False)


@contextmanager
def absent_rows(absent: bool = True) -> Iterator[None]:
    """Inside it, rows that come without a mask count for no statistics (a rank without rows runs one for show)."""
    token = _ABSENT.set(absent)
    try:
        yield
    finally:
        _ABSENT.reset(token)


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
