"""What every tower is: a module from one view to ``Features``, and what it eats."""

from __future__ import annotations

from torch import Tensor, nn

from mmcl.types import Features, Spec


class Encoder(nn.Module):
    """A tower. ``spec`` says what it eats (the data layer reads it; the user never repeats a number).

    Subclasses set ``spec`` and ``width`` and implement ``forward``. Normalisation of uint8 video and the front end of
    audio happen inside, on the device of the weights. In training a tower holds no batch statistics.
    """

    spec: Spec
    width: int
    """``D`` of ``pooled`` and ``tokens``"""
    stages: tuple[tuple[str, int], ...] = ()
    """(name, ``D``) of the feature maps in ``Features.stages``"""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Features:
        """``x``: uint8 ``(B, T, C, H, W)``, float32 ``(B, S)``, int64 ``(B, L)``, float32 ``(B, D)`` or float32
        ``(B, T, 2, S, S)``; ``mask``: bool ``(B, L)``, text.
        """
        raise NotImplementedError

    def blocks(self) -> list[nn.Module]:
        """Its parts from input to output, e.g. the stem and each transformer layer; together they hold all weights but
        those of the front and the last norm. What is locked, decayed, checkpointed, compiled or sharded goes by them.
        """
        return [module for module in self.children() if any(True for _ in module.parameters())]

    def foreign(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Names of this module for weights as their makers publish them; those already named so stay as they are."""
        return tensors
