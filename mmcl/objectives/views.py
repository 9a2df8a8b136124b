"""What objectives on several views of one tower share: heads, queues, prototypes, and losses over rows of all ranks."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, TypeAlias

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from mmcl.config import Options, unknown_name
from mmcl.distributed import Comm
from mmcl.layers import MLPHead
from mmcl.losses._math import unit
from mmcl.objectives.base import Objective
from mmcl.types import TIMED, ConfigError, Embeddings, Erase, Kind, Need, TowerInfo, VectorSpec, VideoSpec, View

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
    """width between them"""
    out: PositiveInt = 128
    """width of the rows that are compared"""
    norm: Norm = "none"
    """before each activation: ``batch`` counts the present rows of all ranks"""

    def projector(self, width: int) -> MLPHead:
        return MLPHead(width, self.hidden, self.out, layers=self.layers, norm=self.norm)


class EraseViewsOptions(Options):
    """Background erasing (Wang et al. 2021, arXiv 2009.05769): one frame of a clip is laid over all of them, in what
    asks and not in what answers. Momentum copies see the clip as it is; methods without copies compare what they get.
    """

    strength: tuple[Annotated[float, Field(ge=0, le=1)], Annotated[float, Field(ge=0, le=1)]] = (0.0, 0.3)
    """[least, most] share of that frame, uniform"""
    views: Literal["first", "all"] = "first"
    """of the views of ``tower``, in their order"""
    per: Literal["sample", "batch"] = "sample"
    """each sample draws a share of its own, or one holds for the whole batch (the authors' code); frames are always
    drawn for each sample"""

    @field_validator("strength", mode="before")
    @classmethod
    def _tuple(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    @field_validator("strength")
    @classmethod
    def _ordered(cls, value: tuple[float, float]) -> tuple[float, float]:
        if value[0] > value[1]:
            raise ValueError("must be [smallest, largest]")
        return value


def erased(views: tuple[View, ...], options: EraseViewsOptions | None, tower: TowerInfo, path: str) -> tuple[View, ...]:
    """The views of ``tower`` with those erased that ``options`` name.

    Raises:
        ConfigError: it is no video tower, or its clips have one frame; names ``path``.
    """
    if options is None:
        return views
    if not isinstance(tower.spec, VideoSpec) or tower.spec.frames < 2:
        raise ConfigError(f"{path}: tower {tower.name!r} reads no clips of several frames, which alone can be erased")
    erase = Erase(options.strength, options.per)
    return tuple(
        replace(view, erase=erase) if number == 0 or options.views == "all" else view
        for number, view in enumerate(views)
    )


@dataclass(frozen=True)
class ViewSet:
    """The views that one objective compares, and which of them attract each other."""

    tower: TowerInfo
    own: tuple[View, ...]
    """of ``tower``"""
    reduction: Reduction = "mean"
    """over the terms of a batch: pairs of views, or views that ask"""
    other: TowerInfo | None = None
    others: tuple[View, ...] = ()
    """of ``other``; numbered on after ``own``"""
    own_clips: bool = True
    """views of one tower attract each other; those of two towers do where their times differ"""
    negative: View | None = None
    """of ``tower``, at another time: what a row is to be told from though it is of the same sample"""

    @property
    def views(self) -> tuple[View, ...]:
        return (*self.own, *self.others)

    def tower_of(self, view: int) -> TowerInfo:
        assert self.other is not None or view < len(self.own)
        return self.tower if self.other is None or view < len(self.own) else self.other

    def positives(self, view: int) -> tuple[int, ...]:
        """Numbers of the views that this one attracts."""
        return tuple(i for i in range(len(self.views)) if i != view and self._attract(i, view))

    def neighbours(self) -> list[tuple[int, int]]:
        """Pairs that attract each other and are no more than one clip apart; what has no time is near to all."""
        pairs = ((i, j) for i in range(len(self.views)) for j in self.positives(i) if i < j)
        return [(i, j) for i, j in pairs if abs(self.views[i].clip - self.views[j].clip) <= 1 or self._timeless(i, j)]

    def _attract(self, i: int, j: int) -> bool:
        if (i < len(self.own)) == (j < len(self.own)):
            return self.own_clips
        return self._timeless(i, j) or self.views[i].clip != self.views[j].clip

    def _timeless(self, *views: int) -> bool:
        return any(not isinstance(self.views[i].spec, TIMED) for i in views)


class MultiView(Objective):
    """Projects some views online and some by momentum copies, with a projector per tower; rows count where all views
    are present.
    """

    def __init__(
        self, views: ViewSet, options: MethodOptions, *, online: Iterable[int], momentum: Iterable[int] = ()
    ) -> None:
        super().__init__()
        self.view_set, self.views, self.reduction = views, views.views, views.reduction
        self.online = {i: self._need(i, "online") for i in online}
        self.momentum = {i: self._need(i, "momentum") for i in momentum}
        self.hard = None if views.negative is None else Need(views.tower.name, views.negative, ("pooled",), "online")
        self.needs = (*self.online.values(), *self.momentum.values(), *([self.hard] if self.hard else []))
        self.projector = options.projector(views.tower.width)
        self.momentum_projector = frozen_copy(self.projector) if self.momentum else None
        self.other_projector = None if views.other is None else options.projector(views.other.width)
        copied = self.other_projector is not None and self.momentum
        self.other_momentum_projector = frozen_copy(self.other_projector) if copied and self.other_projector else None

    def _need(self, view: int, kind: Kind) -> Need:
        seen = self.views[view] if kind == "online" else replace(self.views[view], erase=None)
        return Need(self.view_set.tower_of(view).name, seen, ("pooled",), kind)

    def of_tower(self, view: int, own: nn.Module | None, other: nn.Module | None) -> nn.Module:
        """What belongs to the tower of a view, of two parts that there are one per tower."""
        part = own if self.view_set.tower_of(view) is self.view_set.tower else other
        assert part is not None
        return part

    def present(self, embeddings: Embeddings) -> Tensor:
        """bool ``(B,)``: rows that have every view."""
        return embeddings.present(*(need.view for need in self.needs))

    def project_hard(self, embeddings: Embeddings) -> tuple[Tensor, Tensor]:
        """``(B, out)`` of another time of each sample, with a gradient, and bool ``(B,)``: where it is one.

        In a source that is too short for two clips, or where ``data.sampling`` lets them overlap, it may not be.
        """
        assert self.hard is not None
        spec, present = self.hard.view.spec, self.present(embeddings)
        starts = [embeddings.batch.views[need.view].params["start_seconds"] for need in (self.online[0], self.hard)]
        distance = (starts[1] - starts[0]).abs()
        # with a stride the length of a clip is known to the data alone
        strided = isinstance(spec, VideoSpec) and spec.stride is not None
        apart = distance > 0 if strided else distance >= spec.seconds - 1e-6
        return self.projector(embeddings.get(self.hard), present), present & apart

    def project(self, embeddings: Embeddings) -> dict[int, Tensor]:
        """``(B, out)`` of each online view, by its number; absent rows hold anything."""
        present = self.present(embeddings)
        heads = (self.projector, self.other_projector)
        return {i: self.of_tower(i, *heads)(embeddings.get(need), present) for i, need in self.online.items()}

    @torch.no_grad()
    def project_momentum(self, embeddings: Embeddings) -> dict[int, Tensor]:
        """The same of the momentum copies, without a gradient."""
        present = self.present(embeddings)
        heads = (self.momentum_projector, self.other_momentum_projector)
        return {i: self.of_tower(i, *heads)(embeddings.get(need), present) for i, need in self.momentum.items()}

    def reduce(self, terms: Sequence[Tensor]) -> Tensor:
        stacked = torch.stack(list(terms))
        return stacked.mean() if self.reduction == "mean" else stacked.sum()

    def metrics(self, embeddings: Embeddings, comm: Comm) -> dict[str, Tensor]:
        return {"rows": comm.sum(self.present(embeddings).sum())}

    def ema_pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        pairs = [
            (self.projector, self.momentum_projector),
            (self.other_projector, self.other_momentum_projector),
        ]
        return [(online, copied) for online, copied in pairs if online is not None and copied is not None]


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

    def places(self, count: int) -> Tensor:
        """int64: where the last of ``count`` further keys go, at most K."""
        dropped = max(count - len(self), 0)
        return (self.pointer + torch.arange(dropped, count, device=self.rows.device)) % len(self)

    @torch.no_grad()
    def push(self, keys: Tensor) -> None:
        """Takes in keys ``(n, D)`` over the oldest; of more than K the last K."""
        places = self.places(len(keys))
        self.rows[places] = keys[len(keys) - len(places) :].to(self.rows.dtype)
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
    if isinstance(towers[name].spec, VectorSpec):
        raise ConfigError(f"{path}: tower {name!r} holds stored embeddings, which have no views")
    if not towers[name].trainable:
        raise ConfigError(f"{path}: tower {name!r} is frozen, so there is nothing to learn from its views")
    return towers[name]
