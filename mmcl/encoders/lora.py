"""Low-rank updates beside frozen matrices: put in (by peft, but for attention), merged, and the names without them."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

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
    encoder.requires_grad_(False)
    attention = [name for name in chosen if isinstance(encoder.get_submodule(name), nn.MultiheadAttention)]
    linear = [name.replace(".", r"\.") for name in chosen if name not in attention]
    if linear:
        # as an expression: names in a list are matched by their endings, which would take more than was chosen
        config = LoraConfig(
            r=options.rank, lora_alpha=options.alpha, lora_dropout=options.dropout, target_modules="|".join(linear)
        )
        inject_adapter_in_model(config, encoder)
    for name in attention:
        _replace(encoder, name, AdaptedAttention(encoder.get_submodule(name), options))


class AdaptedAttention(nn.Module):
    """torch's attention with updates of the projections into it and out of it.

    peft's own adds updates to the weights before each forward and takes them away afterwards, and what rounding leaves
    of that adds up: after some steps the frozen weights are others.
    """

    batch_first = False
    """what keeps ``nn.TransformerEncoderLayer`` from a path of its own that would read the weights alone"""

    def __init__(self, base: nn.Module, options: LoraOptions) -> None:
        super().__init__()
        assert isinstance(base, nn.MultiheadAttention)
        self.base_layer, self.scale = base, options.alpha / options.rank
        width = base.embed_dim
        self.lora_A, self.lora_B = nn.ParameterDict(), nn.ParameterDict()
        for name, out in (("in_proj", 3 * width), ("out_proj", width)):
            self.lora_A[name] = nn.Parameter(base.out_proj.weight.new_empty(options.rank, width))
            self.lora_B[name] = nn.Parameter(base.out_proj.weight.new_zeros(out, options.rank))
            nn.init.kaiming_uniform_(self.lora_A[name], a=math.sqrt(5))

    def weights(self) -> dict[str, Tensor]:
        """The matrices with their updates, by their names in the attention."""
        base = {"in_proj": self.base_layer.in_proj_weight, "out_proj": self.base_layer.out_proj.weight}
        added = {name: w + self.scale * (self.lora_B[name] @ self.lora_A[name]) for name, w in base.items()}
        return {"in_proj_weight": added["in_proj"], "out_proj.weight": added["out_proj"]}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the attention."""
        return functional_call(self.base_layer, self.weights(), args, kwargs)

    def merged(self) -> nn.Module:
        """The attention with matrices that hold their updates."""
        with torch.no_grad():
            for name, weight in self.weights().items():
                self.base_layer.get_parameter(name).copy_(weight)
        return self.base_layer


def _replace(encoder: nn.Module, name: str, module: nn.Module) -> None:
    owner, _, last = name.rpartition(".")
    setattr(encoder.get_submodule(owner), last, module)


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
        and (isinstance(part, nn.Linear) or (isinstance(part, nn.MultiheadAttention) and part._qkv_same_embed_dim))
        and not any(name.startswith(f"{other}.") for other in attention)
    ]


def without_lora(encoder: Encoder) -> Encoder:
    """The tower; where it has updates, a copy whose matrices hold them, under the names that they had without."""
    if not any(is_update(name) for name, _ in encoder.named_parameters()):
        return encoder
    from peft.tuners.tuners_utils import BaseTunerLayer

    done = copy.deepcopy(encoder)
    for name, part in list(done.named_modules()):
        layer: Any = part
        if isinstance(part, AdaptedAttention):
            _replace(done, name, layer.merged())
        elif isinstance(part, BaseTunerLayer):
            layer.merge()
            _replace(done, name, layer.get_base_layer())
    return done
