"""Batch norm in towers from libraries: its statistics never depend on the rows of one rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from mmcl.layers import RankBatchNorm

Norm: TypeAlias = Literal["frozen", "rank"]


class FrozenBatchNorm(nn.Module):
    """Batch norm with the statistics it was given, in training too; scale and shift learn. Any number of axes."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, width: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))
        self.register_buffer("running_mean", torch.zeros(width))
        self.register_buffer("running_var", torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """float ``(B, D, …)`` to the same."""
        return nn.functional.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, training=False, eps=self.eps
        )


class _FrozenThen(FrozenBatchNorm):
    """timm keeps what follows a norm, without weights, inside it."""

    def __init__(self, width: int, eps: float, after: nn.Module) -> None:
        super().__init__(width, eps)
        self.after = after

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.after(super().forward(x))
        return out


class _RankThen(RankBatchNorm):
    def __init__(self, width: int, eps: float, momentum: float, after: nn.Module) -> None:
        super().__init__(width, eps, momentum)
        self.after = after

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        out: Tensor = self.after(super().forward(x, mask))
        return out


def batch_norm(norm: Norm) -> Callable[..., nn.Module]:
    """A class that takes ``(width, eps=…)``, for models that we build ourselves."""
    return FrozenBatchNorm if norm == "frozen" else RankBatchNorm


def replace_batch_norm(module: nn.Module, norm: Norm) -> nn.Module:
    """``module`` with each batch norm in it replaced; names, weights and statistics stay."""
    for name, child in list(module.named_children()):
        setattr(module, name, replace_batch_norm(child, norm))
    if not isinstance(module, nn.modules.batchnorm._BatchNorm):
        return module
    new = _replacement(module, norm)
    new.load_state_dict({key: value for key, value in module.state_dict().items() if key != "num_batches_tracked"})
    return new


def _replacement(module: Any, norm: Norm) -> nn.Module:
    width, eps, momentum = module.num_features, module.eps, module.momentum
    if module.weight is None or momentum is None or not module.track_running_stats:
        raise TypeError(f"no replacement for {module}")
    if not hasattr(module, "act"):
        return FrozenBatchNorm(width, eps) if norm == "frozen" else RankBatchNorm(width, eps, momentum)
    after = nn.Sequential(module.drop, module.act)
    return _FrozenThen(width, eps, after) if norm == "frozen" else _RankThen(width, eps, momentum, after)
