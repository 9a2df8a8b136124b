"""What every tower can be told, whatever its architecture."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from pydantic import Field, model_validator

from mmcl.config import Options


class LoraOptions(Options):
    """Low-rank updates beside frozen matrices (Hu et al. 2021, arXiv 2106.09685); needs ``mmcl[lora]``."""

    rank: Annotated[int, Field(ge=1)] = 8
    alpha: Annotated[float, Field(gt=0)] = 16.0
    """the update is multiplied by ``alpha / rank``"""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """of what the updates of linear layers read; torch's attention has none"""
    targets: tuple[str, ...] = ()
    """endings of the names of linear and attention layers to adapt; none: all of them in the blocks"""


Lock: TypeAlias = Literal["none", "all", "with_head"] | Annotated[int, Field(ge=1)]


class TowerCommon(Options):
    """Options that all towers share; each tower's own options add to them."""

    pretrained: Annotated[str, Field(min_length=1)] | None = None
    """where its first weights come from: a file (``.safetensors``, ``.pth``, ``.pt``, ``.bin``), a folder (a model or
    run of ours with a tower of this name, or one with such a file), ``package:NAME`` of an installed package, or
    ``hub:ORGANISATION/NAME``, the only one that may download; null: random"""
    lock: Lock = "none"
    """``all`` trains nothing of it but its head (LiT), ``with_head`` not that either (teachers), N its last N blocks
    and what follows them; what is locked keeps its weights and the statistics of its batch norms, and has no dropout"""
    learning_rate_factor: Annotated[float, Field(gt=0)] = 1.0
    """times the run's learning rate, for the tower without its head"""
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """each block's learning rate is this times that of the block after it; the front comes before the first"""
    lora: LoraOptions | None = None
    """train these, and the head, alone"""
    checkpoint_activations: bool = False
    """run each block again in the backward pass instead of keeping what is inside it"""
    compile: bool = False
    """``torch.compile`` each block"""
    precision: Literal["run", "fp32", "bf16"] = "run"
    """of this tower's forward; ``run``: as ``train.precision`` says"""
    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """chance in training that a row (of a tower that reads frame by frame: a frame) skips a block, growing linearly
    with depth up to this (stochastic depth, arXiv 1603.09382); for blocks whose output has the shape of their input"""

    @model_validator(mode="after")
    def _one_lock(self) -> TowerCommon:
        if self.lora is not None and self.lock != "none":
            raise ValueError("lora trains nothing of the tower but itself: leave lock out")
        return self
