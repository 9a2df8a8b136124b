"""Low-rank updates beside frozen matrices, by peft: put in, taken out, and what a layer was called before."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from mmcl.encoders.base import Encoder
from mmcl.encoders.options import LoraOptions
from mmcl.types import ConfigError


def plain_name(name: str) -> str:
    """The name of a weight without LoRA round its layer.

    >>> plain_name("model.layer.0.query.base_layer.weight")
    'model.layer.0.query.weight'
    """
    return name.replace(".base_layer", "")


def is_update(name: str) -> bool:
    """Whether a weight of this name belongs to an update."""
    return ".lora_" in name


def add_lora(encoder: Encoder, options: LoraOptions, path: str) -> None:
    """Puts updates round linear and attention layers; nothing else of the tower learns. At first they change nothing.

    Raises:
        ConfigError: peft is not installed, or no layer of the blocks has such a name.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise ConfigError(f"{path}: needs peft: pip install 'mmcl[lora]'") from None
    names = adaptable(encoder)
    chosen = [n for n in names if not options.targets or any(f".{n}".endswith(f".{t}") for t in options.targets)]
    for number, target in enumerate(options.targets):
        if not any(f".{name}".endswith(f".{target}") for name in names):
            endings = ", ".join(sorted({name.rpartition(".")[2] for name in names})) or "none"
            raise ConfigError(
                f"{path}.targets.{number}: no layer of the blocks is called {target!r}; there are: {endings}"
            )
    if not chosen:
        raise ConfigError(f"{path}: the blocks of this tower hold no linear and no attention layer")
    config = LoraConfig(
        r=options.rank,
        lora_alpha=options.alpha,
        lora_dropout=options.dropout,
        # a list is matched by ending, which would take more than was chosen
        target_modules="|".join(name.replace(".", r"\.") for name in chosen),
    )
    inject_adapter_in_model(config, encoder)


def adaptable(encoder: Encoder) -> list[str]:
    """Names of the linear layers of the blocks, and of torch's attention, which is adapted as a whole: it reads the
    weights of the linear layer inside it without calling it.
    """
    inside = {id(part) for block in encoder.blocks() for part in block.modules()}
    attention = [name for name, part in encoder.named_modules() if isinstance(part, nn.MultiheadAttention)]
    return [
        name
        for name, part in encoder.named_modules()
        if id(part) in inside
        and isinstance(part, (nn.Linear, nn.MultiheadAttention))
        and not any(name.startswith(f"{other}.") for other in attention)
    ]


def without_lora(encoder: Encoder) -> Encoder:
    """The tower; where it has updates, a copy whose matrices hold them, under the names that they had without."""
    if not any(is_update(name) for name, _ in encoder.named_parameters()):
        return encoder
    from peft.tuners.tuners_utils import BaseTunerLayer

    done = copy.deepcopy(encoder)
    for name, part in list(done.named_modules()):
        if not isinstance(part, BaseTunerLayer) or ".base_layer" in name:
            continue
        layer: Any = part
        unload = getattr(layer, "unload_and_optionally_merge_module", None)
        if unload is not None:
            plain = unload(merge=True, safe_merge=False, adapter_names=None)
        else:
            layer.merge()
            plain = layer.get_base_layer()
        owner, _, last = name.rpartition(".")
        setattr(done.get_submodule(owner), last, plain)
    return done
