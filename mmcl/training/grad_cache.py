"""The gradient of one large batch from small forwards (Gao et al. 2021, arXiv 2101.06983, over ranks).

Features of each micro-batch without a graph, all objectives once on the features of the whole batch, then each
micro-batch again with the random numbers of its first time, pulled by the gradient of its features. Objectives, queues
and temperatures see the whole batch once; momentum and frozen towers run in the first pass alone. A replay makes no
collective but the last one's reduction of gradients.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from mmcl.layers import RankBatchNorm
from mmcl.model import Values
from mmcl.objectives.base import Term
from mmcl.training.step import CachePass, TrainStep
from mmcl.types import Batch, ConfigError, ViewBatch

BATCH_STATISTICS = (nn.modules.batchnorm._BatchNorm, RankBatchNorm)

Context = Callable[[], AbstractContextManager[object]]


def cached_backward(
    step: nn.Module,
    batch: Batch,
    *,
    micro_batch: int,
    parts: int = 1,
    optimizer_step: int | None = None,
    no_sync: Context = nullcontext,
    autocast: Context = nullcontext,
) -> Term:
    """Forward and backward of one batch; leaves the gradients that a forward of the whole would leave.

    Args:
        step: a :class:`~mmcl.training.step.TrainStep`, or what a launcher wrapped round it.
        batch: the rows of this rank, equally many on all ranks.
        micro_batch: rows per forward.
        parts: the loss is divided by it.
        optimizer_step: as :class:`~mmcl.training.step.TrainStep` takes it.
        no_sync: keeps gradients of backwards inside it on this rank; they are reduced once, with the last replay.
        autocast: the precision of forwards.

    Returns:
        The objectives' term; its graph is used up.
    """
    chunks = [slice(start, start + micro_batch) for start in range(0, len(batch), micro_batch)]
    states: list[tuple[Tensor, Tensor | None]] = []
    features: list[Values] = []
    with torch.no_grad(), autocast():
        for chunk in chunks:
            states.append(_random_state(batch))
            features.append(step(rows_of(batch, chunk), CachePass("features")))
    leaves: Values = {key: torch.cat([part[key] for part in features]) for key in features[0]}
    learning = inner(step).model.learning_values(leaves)
    for key in learning:
        leaves[key].requires_grad_()
    with no_sync():
        with autocast():
            term: Term = step(batch, CachePass("loss", leaves), optimizer_step)
        torch.autograd.backward(term.loss / parts)
    after = _random_state(batch)
    for number, (chunk, state) in enumerate(zip(chunks, states, strict=True)):
        _set_random_state(batch, state)
        pulls = {key: _gradient(leaves[key])[chunk] for key in learning}
        with nullcontext() if number == len(chunks) - 1 else no_sync():
            with autocast():
                pulled: Tensor = step(rows_of(batch, chunk), CachePass("replay", pulls))
            torch.autograd.backward(pulled)
    _set_random_state(batch, after)
    return dataclasses.replace(term, loss=term.loss.detach())


def inner(step: nn.Module) -> TrainStep:
    """The module inside what launchers wrap round it."""
    while not isinstance(step, TrainStep):
        wrapped = step.module
        assert isinstance(wrapped, nn.Module)
        step = wrapped
    return step


def check_cacheable(step: TrainStep) -> None:
    """Refuses towers whose forward of a micro-batch is not a part of their forward of the batch.

    Raises:
        ConfigError: a tower that learns holds batch statistics.
    """
    parts = [(f"tower {name!r}", tower) for name, tower in step.model.towers.items()]
    parts += [(f"the head of tower {name!r}", head) for name, head in step.model.heads.items()]
    for name, part in parts:
        for module in part.modules():
            if isinstance(module, BATCH_STATISTICS) and any(p.requires_grad for p in module.parameters()):
                raise ConfigError(
                    f"train.micro_batch: {name} holds batch statistics ({type(module).__name__}), which differ "
                    "between a micro-batch and the batch; set it to null or take one without batch norm"
                )


def rows_of(batch: Batch, rows: slice) -> Batch:
    """Some rows of a batch; what was skipped in it is left out."""

    def cut(view: ViewBatch) -> ViewBatch:
        return view.map(lambda tensor: tensor[rows])

    return Batch(
        views={view: cut(values) for view, values in batch.views.items()},
        keys=batch.keys[rows],
        draws=batch.draws[rows],
        groups=batch.groups[rows],
        labels=batch.labels[rows],
        pools=None if batch.pools is None else batch.pools[rows],
    )


def _gradient(leaf: Tensor) -> Tensor:
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


def _random_state(batch: Batch) -> tuple[Tensor, Tensor | None]:
    device = batch.draws.device
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _set_random_state(batch: Batch, state: tuple[Tensor, Tensor | None]) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], batch.draws.device)
