"""Parts of heads: MLPs, and a batch norm whose statistics do not depend on how rows are spread over ranks."""

from __future__ import annotations

from collections.abc import Callable
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


class RankBatchNorm1d(nn.Module):
    """Batch norm over the present rows of all ranks (Ioffe & Szegedy 2015, algorithm 1), also on CPUs.

    With all rows present, on one rank, it is ``torch.nn.BatchNorm1d``. Fewer than two present rows define no variance:
    they come out as ``bias``, and the running statistics stay. In training every rank calls it equally often.
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
        """float ``(B, D)`` to the same; ``mask`` bool ``(B,)``: rows present (None: all), the others become 0."""
        present = torch.ones(len(x), dtype=torch.bool, device=x.device) if mask is None else mask
        with torch.autocast(x.device.type, enabled=False):
            rows = (x if x.dtype == torch.float64 else x.float()).masked_fill(~present[:, None], 0)
            mean, variance = self.running_mean, self.running_var
            if self.training:
                mean, variance = self._batch_statistics(rows, present)
            out = (rows - mean) * (variance + self.eps).rsqrt() * self.weight + self.bias
            return out.masked_fill(~present[:, None], 0).to(x.dtype)

    def _batch_statistics(self, rows: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
        count = _sum_over_ranks(present.sum().to(rows.dtype))
        mean = _sum_over_ranks(rows.sum(0)) / count.clamp_min(1)
        # squares of deviations, not of values: those lose all digits where the mean is large
        deviations = (rows - mean).masked_fill(~present[:, None], 0)
        variance = _sum_over_ranks(deviations.square().sum(0)) / count.clamp_min(1)
        with torch.no_grad():
            step = self.momentum * (count >= 2).to(rows.dtype)
            self.running_mean.lerp_(mean, step)
            self.running_var.lerp_(variance * count / (count - 1).clamp_min(1), step)
        return mean, variance


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
        norms = {"none": nn.Identity, "batch": RankBatchNorm1d, "layer": nn.LayerNorm}
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
            x = self.activation(norm(x, mask) if isinstance(norm, RankBatchNorm1d) else norm(x))
        out: Tensor = self.linears[-1](x)
        return out
