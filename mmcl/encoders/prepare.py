"""Gives effect to the options that all towers share, on any tower, by its blocks."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from mmcl.encoders.base import Encoder
from mmcl.encoders.lora import add_lora, is_update
from mmcl.encoders.options import Lock, TowerCommon
from mmcl.encoders.parts import depths
from mmcl.layers import RankBatchNorm, second_forward
from mmcl.types import ConfigError, Features


def prepare(encoder: Encoder, options: TowerCommon, path: str) -> Encoder:
    """Locks, adapts, and changes how its blocks run; the tower itself comes back. Names of its weights stay, but where
    LoRA surrounds a layer.

    Raises:
        ConfigError: more blocks to train than there are, or nothing for an option to act on; names ``path``.
    """
    blocks = encoder.blocks()
    if options.lora is not None:
        add_lora(encoder, options.lora, f"{path}.lora")
        encoder.locked = _fixed_modules(
            encoder, {name for name, _ in encoder.named_parameters() if not is_update(name)}
        )
        blocks = encoder.blocks()
    else:
        lock(encoder, options.lock, f"{path}.lock")
    for option in ("checkpoint_activations", "compile", "drop_path"):
        if getattr(options, option) and not blocks:
            raise ConfigError(f"{path}.{option}: this tower has no blocks")
    if options.checkpoint_activations:
        for block in blocks:
            if any(isinstance(part, _BatchNorm) and part.training for part in block.modules()):
                raise ConfigError(
                    f"{path}.checkpoint_activations: this tower holds torch's batch norm, which would count rows twice"
                )
            block.forward = MethodType(_run_again_in_backward, block)
    if options.drop_path:
        paths = [DropPath(options.drop_path * n / len(blocks)) for n in range(1, len(blocks) + 1)]
        for block, drop in zip(blocks, paths, strict=True):
            block.register_forward_hook(drop)
        encoder.register_forward_hook(_AnyDropped(paths, f"{path}.drop_path"))
    if options.compile:
        for block in blocks:
            block.compile()
    if options.precision != "run":
        encoder.forward = MethodType(_IN_PRECISION[options.precision], encoder)  # type: ignore[method-assign]
    return encoder


def lock(encoder: Encoder, how_much: Lock, path: str) -> None:
    """Takes the gradient from what is locked, and keeps it in eval mode."""
    if how_much == "none":
        return
    where = depths(encoder)
    blocks = len(encoder.blocks())
    if isinstance(how_much, int) and how_much > blocks:
        raise ConfigError(
            f"{path}: {how_much} blocks to train, but this tower has {blocks}; allowed: none, all, 1 to {blocks}"
        )
    first = blocks - how_much + 1 if isinstance(how_much, int) else blocks + 2
    fixed = {name for name, depth in where.items() if depth < first}
    for name, parameter in encoder.named_parameters():
        if name in fixed:
            parameter.requires_grad_(False)
    encoder.locked = _fixed_modules(encoder, fixed) if isinstance(how_much, int) else ("",)
    encoder.train(encoder.training)


def _fixed_modules(encoder: Encoder, fixed: set[str]) -> tuple[str, ...]:
    """The outermost modules all of whose parameters are in ``fixed``."""
    found: list[str] = []
    for prefix, module in encoder.named_modules():
        names = [name for name, _ in module.named_parameters(prefix)]
        if names and fixed.issuperset(names) and not any(prefix.startswith(f"{outer}.") for outer in found):
            found.append(prefix)
    return tuple(found)


def _run_again_in_backward(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """In place of a block's forward. It finds the block's own by its class, so copies of the block run themselves."""
    forward = type(block).forward
    if not torch.is_grad_enabled():
        return forward(block, *args, **kwargs)
    if any(isinstance(part, RankBatchNorm) for part in block.modules()):
        twice = partial(checkpoint, context_fn=lambda: (nullcontext(), second_forward()))
        return twice(forward, block, *args, use_reentrant=False, **kwargs)
    return checkpoint(forward, block, *args, use_reentrant=False, **kwargs)


class DropPath:
    """A forward hook: in training, rows come out as they went in by a chance, and the others' change grows so that the
    mean stays. The draw is torch's, one number a row.
    """

    def __init__(self, chance: float) -> None:
        self.chance = chance
        self.used = False

    def __call__(self, block: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        x, out = (args[0] if args else None), (output[0] if isinstance(output, tuple) else output)
        if not block.training or not isinstance(x, Tensor) or not isinstance(out, Tensor) or x.shape != out.shape:
            return output
        self.used = True
        kept = torch.rand(len(x), *[1] * (x.ndim - 1), device=x.device) >= self.chance
        changed = x + (out - x) * (kept / (1 - self.chance)).to(out.dtype)
        return (changed, *output[1:]) if isinstance(output, tuple) else changed


class _AnyDropped:
    """A hook of the tower: the option must have found a block to act on."""

    def __init__(self, paths: list[DropPath], where: str) -> None:
        self.paths, self.where = paths, where

    def __call__(self, encoder: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if encoder.training and not any(path.used for path in self.paths):
            raise ConfigError(f"{self.where}: no block of this tower gives out the shape that it reads")


def _in_fp32(encoder: Encoder, x: Tensor, mask: Tensor | None = None) -> Features:
    with torch.autocast(x.device.type, enabled=False):
        return _as_float32(type(encoder).forward(encoder, x, mask))


def _in_bf16(encoder: Encoder, x: Tensor, mask: Tensor | None = None) -> Features:
    with torch.autocast(x.device.type, torch.bfloat16):
        return _as_float32(type(encoder).forward(encoder, x, mask))


_IN_PRECISION = {"fp32": _in_fp32, "bf16": _in_bf16}


def _as_float32(features: Features) -> Features:
    """What heads and objectives get must not depend on a tower's own precision."""
    tokens = None if features.tokens is None else features.tokens.float()
    stages = {name: stage.float() for name, stage in features.stages.items()}
    return Features(features.pooled.float(), tokens, features.token_mask, features.grid, stages)
