"""Losses of fp16 runs are scaled up, so that small gradients do not vanish."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.amp import GradScaler
from torch.optim import Optimizer


class LossScale:
    """A loss scale that halves when gradients overflow, and doubles again after many steps; without a ``scaler``, 1.

    Source: Micikevicius et al. 2018, Mixed precision training (arXiv 1710.03740), section 3.2.
    """

    def __init__(self, scaler: GradScaler | None) -> None:
        self.scaler = scaler

    def __call__(self, loss: Tensor) -> Tensor:
        return loss if self.scaler is None else self.scaler.scale(loss)

    def unscale(self, optimizer: Optimizer) -> None:
        """Gives gradients their own size again, once per step, before anything reads them."""
        if self.scaler is not None:
            self.scaler.unscale_(optimizer)

    def overflowed(self, grad_norm: Tensor) -> bool:
        """Whether the scale was too large for this step, and can become smaller. Equal on all ranks, as the norm is."""
        return self.scaler is not None and not math.isfinite(float(grad_norm)) and self.scaler.get_scale() > 1.0

    def step(self, optimizer: Optimizer) -> None:
        if self.scaler is None:
            optimizer.step()
        else:
            self.scaler.step(optimizer)

    def update(self) -> None:
        """After every step, taken or not."""
        if self.scaler is not None:
            self.scaler.update()

    def state_dict(self) -> dict[str, Any]:
        """JSON values; empty without a scale."""
        return {} if self.scaler is None else self.scaler.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes up a state; an empty one, of a run without a scale, changes nothing."""
        if self.scaler is not None and state:
            self.scaler.load_state_dict(dict(state))


def set_tf32(wanted: bool) -> None:
    """Whether GPUs may round what they multiply in float32 to 10 bits (TensorFloat-32)."""
    torch.backends.cuda.matmul.allow_tf32 = wanted
    torch.backends.cudnn.allow_tf32 = wanted
