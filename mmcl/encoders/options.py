"""What every tower can be told, whatever its architecture."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from mmcl.config import Options


class LoraOptions(Options):
    """Low-rank updates beside frozen matrices (Hu et al. 2021, arXiv 2106.09685); needs ``mmcl[lora]``."""

    rank: Annotated[int, Field(ge=1)] = 8
    alpha: Annotated[float, Field(gt=0)] = 16.0
    """the update is multiplied by ``alpha / rank``"""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    targets: tuple[str, ...] = ()
    """endings of the names of linear layers to adapt; none: every linear layer of the blocks"""


class TowerCommon(Options):
    """Options that all towers share; each tower's own options add to them."""

    pretrained: str | None = None
    """where its first weights come from: a file (``.safetensors``, ``.pth``, ``.pt``), a folder, ``package:NAME`` of an
    installed package, or ``hub:ORGANISATION/NAME``, the only one that may download; null: random"""
    lock: Literal["none", "all"] | Annotated[int, Field(ge=1)] = "none"
    """``all`` trains nothing of it (LiT), N its last N blocks alone; locked batch norms keep their statistics"""
    learning_rate_factor: Annotated[float, Field(gt=0)] = 1.0
    """times the run's learning rate"""
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """each block's learning rate is this times that of the block after it"""
    lora: LoraOptions | None = None
    checkpoint_activations: bool = False
    """run each block again in the backward pass instead of keeping what is inside it"""
    compile: bool = False
    """``torch.compile`` each block"""
    precision: Literal["run", "fp32", "bf16"] = "run"
    """of this tower's forward; ``run``: as ``train.precision`` says"""
    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """chance that a row skips a residual branch, growing linearly with depth up to this (arXiv 1603.09382)"""
