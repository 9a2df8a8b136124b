"""How the weights of convolutions lie in memory."""

from __future__ import annotations

import torch
from torch import nn


def channels_last(module: nn.Module) -> None:
    """Lays out convolutions with the channels last, in place; what they compute with, and return, then lies so too.

    Values, names and shapes stay, so checkpoints do not depend on it.
    """
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    for part in module.modules():
        if isinstance(part, (nn.Conv2d, nn.Conv3d)):
            part.weight.data = part.weight.data.contiguous(memory_format=formats[part.weight.ndim])
