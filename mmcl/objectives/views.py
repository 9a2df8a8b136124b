"""What objectives on several views of one tower share: heads, queues, prototypes, and losses over rows of all ranks."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, TypeAlias

import torch
from pydantic import Field
from torch import Tensor, nn

from mmcl.config import Options, unknown_name
from mmcl.distributed import Comm
from mmcl.layers import MLPHead
from mmcl.losses._math import unit
from mmcl.objectives.base import Objective
from mmcl.types import ConfigError, Embeddings, Need, TowerInfo, View

PositiveInt = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Reduction: TypeAlias = Literal["mean", "sum"]
Norm: TypeAlias = Literal["none", "batch", "layer"]


class MethodOptions(Options):
    """The projector, an MLP from ``pooled`` to the rows that a method compares."""

    layers: Annotated[int, Field(ge=1, le=4)] = 3
    """linear maps of the projector"""
    hidden: PositiveInt = 2048
    out: PositiveInt = 128
    norm: Norm = "none"
    """before each activation: ``batch`` counts the present rows of all ranks"""

    def projector(self, width: int) -> MLPHead:
        return MLPHead(width, self.hidden, self.out, layers=self.layers, norm=self.norm)


@dataclass(frozen=True)
class ViewSet:
    """The views that one objective compares."""

    tower: TowerInfo
    views: tuple[View, ...]
    reduction: Reduction = "mean"
    """over the terms of a batch: pairs of views, or views that ask"""


class MultiView(Objective):
    """Projects some views online and some by momentum copies; rows count where all views are present."""

    def __init__(
        self, views: ViewSet, options: MethodOptions, *, online: Iterable[int], momentum: Iterable[int] = ()
    ) -> None:
        super().__init__()
        self.views, self.reduction = views.views, views.reduction
        self.online = {i: Need(views.tower.name, self.views[i], ("pooled",)) for i in online}
        self.momentum = {i: Need(views.tower.name, self.views[i], ("pooled",), "momentum") for i in momentum}
        self.needs = (*self.online.values(), *self.momentum.values())
        self.projector = options.projector(views.tower.width)
        self.momentum_projector = frozen_copy(self.projector) if self.momentum else None

    def present(self, embeddings: Embeddings) -> Tensor:
        """bool ``(B,)``: rows that have every view."""
        return embeddings.present(*self.views)

    def project(self, embeddings: Embeddings) -> dict[int, Tensor]:
        """``(B, out)`` of each online view, by its number; absent rows hold anything."""
        present = self.present(embeddings)
        return {i: self.projector(embeddings.get(need), present) for i, need in self.online.items()}

    @torch.no_grad()
    def project_momentum(self, embeddings: Embeddings) -> dict[int, Tensor]:
        """The same of the momentum copies, without a gradient."""
        assert self.momentum_projector is not None
        present = self.present(embeddings)
        return {i: self.momentum_projector(embeddings.get(need), present) for i, need in self.momentum.items()}

    def reduce(self, terms: Sequence[Tensor]) -> Tensor:
        stacked = torch.stack(list(terms))
        return stacked.mean() if self.reduction == "mean" else stacked.sum()

    def metrics(self, embeddings: Embeddings, comm: Comm) -> dict[str, Tensor]:
        return {"rows": comm.sum(self.present(embeddings).sum())}

    def ema_pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        return [] if self.momentum_projector is None else [(self.projector, self.momentum_projector)]


def frozen_copy(module: MLPHead) -> MLPHead:
    """An equal module that is never trained."""
    return copy.deepcopy(module).requires_grad_(False)


def unit_rows(x: Tensor) -> Tensor:
    """Rows of length 1, float32 or better; zero rows stay zero."""
    return unit(x if x.dtype == torch.float64 else x.float())


def log_sum_over_ranks(comm: Comm) -> Callable[[Tensor], Tensor]:
    """Takes the log-sum-exp of own rows to that of all ranks' rows, elementwise; without gradient."""

    def total(own: Tensor) -> Tensor:
        top = comm.max(own)
        top = top.masked_fill(top.isneginf(), 0)  # nobody has a row: keep −inf from becoming NaN
        return top + comm.sum((own.detach() - top).exp()).log()

    return total


class KeyQueue(nn.Module):
    """The newest keys, equal on all ranks."""

    rows: Tensor
    """float ``(K, D)``"""
    pointer: Tensor
    """where the next key goes"""
    filled: Tensor
    """how many rows hold a key"""

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.register_buffer("rows", torch.zeros(size, width))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.int64))
        self.register_buffer("filled", torch.zeros((), dtype=torch.int64))

    def __len__(self) -> int:
        return len(self.rows)

    def mask(self) -> Tensor:
        """bool ``(K,)``: rows that hold a key."""
        return torch.arange(len(self), device=self.rows.device) < self.filled

    @torch.no_grad()
    def push(self, keys: Tensor) -> None:
        """Takes in keys ``(n, D)`` over the oldest; of more than K the last K."""
        dropped = max(len(keys) - len(self), 0)
        places = (self.pointer + torch.arange(dropped, len(keys), device=keys.device)) % len(self)
        self.rows[places] = keys[dropped:].to(self.rows.dtype)
        self.pointer.copy_((self.pointer + len(keys)) % len(self))
        self.filled.copy_((self.filled + len(keys)).clamp(max=len(self)))


def present_keys(keys: Iterable[Tensor], present: Tensor, comm: Comm) -> Tensor:
    """Present rows of all ranks in draw order, view after view, as they enter a queue."""
    everyone = comm.gather(present)
    return torch.cat([comm.gather(x.detach())[everyone] for x in keys])


class Prototypes(nn.Module):
    """Unit vectors that rows are assigned to; they learn after ``frozen_batches``."""

    seen: Tensor
    """batches so far"""

    def __init__(self, count: int, width: int, frozen_batches: int) -> None:
        super().__init__()
        self.frozen_batches = frozen_batches
        self.weight = nn.Parameter(unit(torch.randn(count, width)))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, rows: Tensor) -> Tensor:
        """Cosines ``(B, K)`` of unit rows ``(B, D)``."""
        # where, not a branch: a parameter without a gradient would keep the ranks waiting for it
        weight = torch.where(self.seen < self.frozen_batches, self.weight.detach(), self.weight)
        with torch.autocast(rows.device.type, enabled=False):
            return rows @ weight.to(rows.dtype).T

    @torch.no_grad()
    def renew(self) -> None:
        """Back to length 1, after an optimizer step."""
        self.weight.copy_(unit(self.weight))
        self.seen += 1


def learning_tower(name: str, towers: Mapping[str, TowerInfo], path: str) -> TowerInfo:
    """The tower of that name.

    Raises:
        ConfigError: there is none, or it is frozen; names ``path``.
    """
    if name not in towers:
        raise unknown_name(path, name, towers)
    if not towers[name].trainable:
        raise ConfigError(f"{path}: tower {name!r} is frozen, so there is nothing to learn from its views")
    return towers[name]
