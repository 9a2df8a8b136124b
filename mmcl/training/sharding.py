"""FSDP2: parameters, gradients and optimizer states split over ranks, block by block (torch's ``fully_shard``).

torch's own functions, not accelerate's, which on CPUs wraps in DDP without a word; so what is tested there is what runs
on GPUs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from mmcl.training.step import TrainStep

_OPTIMIZER = StateDictOptions(flatten_optimizer_state_dict=True)


def shard(step: TrainStep, device: torch.device) -> TrainStep:
    """Splits each block of each tower and of its momentum copy on its own, and all else together.

    Temperatures and other single numbers cannot be split: they stay whole (:func:`average_whole_gradients`).
    """
    step.to(device)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    copies = step.model.momentum_towers
    encoders = [step.model.tower(name) for name in step.model.towers] + [copies[name] for name in copies]
    for encoder in encoders:
        for group in _groups(encoder.blocks()):  # type: ignore[operator]
            fully_shard(group, mesh=mesh)
    fully_shard(step, mesh=mesh, ignored_params=set(_whole(step)))
    return step


def _groups(blocks: list[nn.Module]) -> Iterator[list[nn.Module]]:
    """What is fetched together: a block, or, where nobody calls the container that it is, what lies in it."""
    for block in blocks:
        if isinstance(block, nn.ModuleList):
            yield from _groups(list(block))
        elif isinstance(block, nn.Sequential):
            yield [part for part in block if any(True for _ in part.parameters())]
        elif any(True for _ in block.parameters()):
            yield [block]


def _whole(step: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in step.parameters() if parameter.ndim == 0]


def average_whole_gradients(step: nn.Module) -> None:
    """Averages over ranks the gradients that :func:`shard` left to us."""
    whole = [p for p in _whole(step) if p.requires_grad]
    if not whole:
        return
    for parameter in whole:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    gradients = torch.stack([p.grad for p in whole if p.grad is not None])
    dist.all_reduce(gradients)
    for parameter, gradient in zip(whole, gradients / dist.get_world_size(), strict=True):
        parameter.grad = gradient.clone()


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor that is split, or the tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def state_tensors(step: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """Weights, buffers and optimizer states by full names, split or whole as they are in the run."""
    return {**_tensors(get_model_state_dict(step)), **_tensors(_optimizer_state(step, optimizer))}


def load_state_tensors(step: nn.Module, optimizer: Optimizer, tensors: dict[str, Tensor]) -> None:
    """Takes up what :func:`state_tensors` gave."""
    names = get_model_state_dict(step).keys()
    set_model_state_dict(step, {name: tensors[name] for name in names})
    state = _optimizer_state(step, optimizer)
    state.update({name: tensors[name] for name in _tensors(state)})
    set_optimizer_state_dict(step, optimizer, state, options=_OPTIMIZER)


def _optimizer_state(step: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    return dict(get_optimizer_state_dict(step, optimizer, options=_OPTIMIZER))


def _tensors(state: Mapping[str, Any]) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}
