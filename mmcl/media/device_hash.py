"""``mmcl.hashing`` in int64 on any device."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mmcl.hashing import signed_constants


def device_uniform(*words: Tensor | int) -> Tensor:
    """float64 in [0, 1): what ``mmcl.hashing.uniform`` gives for these words, int64, broadcast against each other."""
    golden, first, second = signed_constants()
    tensors = [torch.as_tensor(word, dtype=torch.int64) for word in words]
    device = next((tensor.device for tensor in tensors if tensor.device.type != "cpu"), torch.device("cpu"))
    state = torch.tensor(golden, device=device)
    for word in tensors:
        x = (state ^ word.to(device)) + golden
        x = (x ^ _shift_right(x, 30)) * first
        x = (x ^ _shift_right(x, 27)) * second
        state = x ^ _shift_right(x, 31)
    return _shift_right(state, 11).double() * 2.0**-53


def device_normal(*words: Tensor | int) -> Tensor:
    """float64, standard normal (Box & Muller 1958): a pure function of the words, as :func:`device_uniform`."""
    radius = (-2 * (1 - device_uniform(*words, 0)).log()).sqrt()
    return radius * (2 * math.pi * device_uniform(*words, 1)).cos()


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Of int64 taken as 64 bits without a sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
