"""The moving average of a whole model, which is evaluated and never trained."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from mmcl.model import MultimodalModel
from mmcl.recipe import EmaOptions


class WeightAverage:
    """Of all parameters, in their own precision; buffers, such as running statistics, are those of the model.

    Momentum copies of towers are left out: they are averages already, and serve training alone.
    """

    def __init__(self, model: MultimodalModel, options: EmaOptions) -> None:
        self.options = options
        self.model = model
        self.values = {name: value.clone() for name, value in self._own().items()}
        """name in ``model.safetensors``: the average"""

    def _own(self) -> dict[str, Tensor]:
        values = self.model.state_dict()
        return {name: value.detach() for name, value in values.items() if not name.startswith("momentum_")}

    @torch.no_grad()
    def advance(self, step: int) -> None:
        """Takes in the weights after optimizer step ``step``, counted from 0."""
        learned = {name for name, _ in self.model.named_parameters(remove_duplicate=False)}
        keep = self.options.decay if step >= self.options.start_step else 0.0
        own = self._own()
        mixed = [name for name in own if name in learned and keep]
        if mixed:
            torch._foreach_lerp_([self.values[n] for n in mixed], [own[n] for n in mixed], 1 - keep)
        for name in own.keys() - mixed:
            self.values[name].copy_(own[name])

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within the context the model's weights are the average; afterwards what they were, bit for bit."""
        kept = {name: value.clone() for name, value in self._own().items()}
        try:
            self._copy(self.values, self._own())
            yield
        finally:
            self._copy(kept, self._own())  # asked for again: moving a model gives it other memory

    def load(self, values: Mapping[str, Tensor]) -> None:
        """Takes up what was saved.

        Raises:
            ValueError: it is of another model.
        """
        if values.keys() != self.values.keys():
            raise ValueError(f"ema: {', '.join(sorted(values.keys() ^ self.values.keys()))[:200]}")
        self._copy(values, self.values)

    @staticmethod
    @torch.no_grad()
    def _copy(source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> None:
        for name, value in target.items():
            value.copy_(source[name])
