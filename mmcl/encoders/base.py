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
    causal_patch: tuple[int, ...] | None = None
    """for a tower whose tokens see nothing that comes later: what part of the input each stands for, in order: (frames,
    pixels, pixels) of a video, (samples,) of sound, (1,) of a text"""
    locked: tuple[str, ...] = ()
    """names of the modules in it that never leave eval mode; ``""`` is the whole tower"""

    def train(self, mode: bool = True) -> Encoder:
        """As any module, but what is locked stays in eval mode: no dropout, no running statistics."""
        super().train(mode)
        for name in self.locked:
            nn.Module.train(self.get_submodule(name), False)
        return self

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Features:
        """``x``: uint8 ``(B, T, C, H, W)``, float32 ``(B, S)``, int64 ``(B, L)``, float32 ``(B, D)`` or float32
        ``(B, T, 2, S, S)``; ``mask``: bool ``(B, L)``, text.
        """
        raise NotImplementedError

    def blocks(self) -> list[nn.Module]:
        """Its parts from input to output, e.g. the stem and each transformer layer; together they hold all weights but
        those of the front and the last norm. What is locked, decayed, checkpointed, compiled or sharded goes by them.
        Each is called as a module, once in a forward; rows are the first axis of what it reads.
        """
        return [module for module in self.children() if any(True for _ in module.parameters())]

    def foreign(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Names of this module for weights as their makers publish them; those already named so stay as they are."""
        return tensors
