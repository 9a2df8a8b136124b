"""Where the weights of a tower stand, from input to output, and which of them weight decay would harm."""

from __future__ import annotations

import re

from torch import nn

from mmcl.encoders.base import Encoder

UNDECAYED = re.compile(
    r"(^|[._])(cls|class|dist|distillation|mask|eos|bos)_(token|embedding)s?$"
    r"|(^|[._])((time|temporal|frame|rel|relative|absolute)_)*pos(ition(al)?)?_?(emb(ed|eds|edding|eddings)?|table|bias)s?"
    r"(_table)?(\.weight)?$|(^|[._])(time|temporal|frame)_(embed|embeds|embedding|embeddings)(\.weight)?$"
    r"|(^|[._])logit_(scale|bias)$"
)
"""Names of embeddings of positions and classes, of marks and of temperatures."""


def depths(encoder: Encoder) -> dict[str, int]:
    """Parameter: 0 for the front, n for the n-th block, from 1, and one more for what follows the last block.

    The front is what is registered before the first block, or embeds positions and classes; parameters that an owner of
    blocks holds itself, such as a last projection, follow.
    """
    blocks = encoder.blocks()
    number = {id(p): n for n, block in enumerate(blocks, 1) for p in block.parameters()}
    inside = {id(part) for block in blocks for part in block.modules()}
    last, found, started = len(blocks) + 1, {}, not blocks
    for prefix, module in encoder.named_modules():
        started = started or id(module) in inside
        holds_blocks = any(id(part) in inside for part in module.children())
        for name, parameter in module.named_parameters(prefix, recurse=False):
            front = bool(UNDECAYED.search(_plain(name))) or not (started or holds_blocks or module is encoder)
            found[name] = number.get(id(parameter), 0 if front and blocks else last)
    return found


def undecayed(module: nn.Module) -> set[str]:
    """Names of parameters that weight decay leaves alone: those of fewer than two axes (norms, biases, temperatures),
    embeddings of positions and of classes, and those that a part of a library names itself (``no_weight_decay``).
    """
    said = set()
    for prefix, part in module.named_modules():
        names = getattr(part, "no_weight_decay", None)
        if callable(names):
            said |= {f"{prefix}.{name}" if prefix else str(name) for name in names()}
    return {
        name
        for name, parameter in module.named_parameters()
        if parameter.ndim < 2 or _plain(name) in said or UNDECAYED.search(_plain(name))
    }


def _plain(name: str) -> str:
    """The name that a parameter has without what LoRA puts round layers."""
    return name.replace(".base_layer", "")
