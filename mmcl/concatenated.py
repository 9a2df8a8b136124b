"""Several models as one: what each says of a sample, side by side."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmcl.encode import Encodes
from mmcl.encoders.base import Encoder
from mmcl.encoders.fusion import Fusions
from mmcl.folders import CONFIG, HUB, model_folder
from mmcl.model import MultimodalModel
from mmcl.shards.files import write_atomically
from mmcl.types import ConfigError, Level, ViewBatch

STAGES = "stages"
"""the key of ``config.json`` that names the folders of the models, seen from this one"""


class ConcatenatedModel(Encodes):
    """Models of the same towers: the concatenation of their rows, made unit once more at level ``joint``.

    The cosine of two rows is the mean of the models' cosines. Level ``pooled`` is the plain concatenation.
    """

    def __init__(self, models: Sequence[MultimodalModel]) -> None:
        super().__init__()
        if not models or any(list(each.towers) != list(models[0].towers) for each in models):
            raise ValueError("needs at least one model, and the same towers in all")
        self.models = nn.ModuleList(models).eval()
        self.joint_width = sum(each.joint_width for each in models)
        self.fusions = Fusions()  # none: theirs are of their own spaces

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> ConcatenatedModel:
        """Reads what ``pipelines/multistage.py`` wrote.

        Raises:
            ConfigError: not such a folder, or one of its models cannot be read.
        """
        folder = Path(folder)
        names = stages_of(folder)
        if not names:
            raise ConfigError(f"{folder}: holds no stages of pipelines/multistage.py")
        return cls([MultimodalModel.from_pretrained(folder / name) for name in names])

    def stages(self) -> list[MultimodalModel]:
        """The models, the first stage first."""
        return [model for model in self.models if isinstance(model, MultimodalModel)]

    @property
    def first(self) -> MultimodalModel:
        """The model whose towers say what is decoded."""
        return self.stages()[0]

    @property
    def towers(self) -> nn.ModuleDict:
        return self.first.towers

    def tower(self, name: str) -> Encoder:
        return self.first.tower(name)

    def tower_of(self, modality: str) -> str:
        return self.first.tower_of(modality)

    def head_locked(self, tower: str) -> bool:
        return self.first.head_locked(tower)

    def scales(self) -> dict[str, Tensor]:
        """None: cosines are means of the models', whose temperatures may differ."""
        return {}

    def width(self, tower: str, level: Level) -> int:
        return sum(each.width(tower, level) for each in self.stages())

    def encode_view(self, tower: str, view: ViewBatch, levels: Sequence[Level]) -> dict[Level, Tensor]:
        """Levels ``joint`` and ``pooled`` of one tower on one view; absent rows hold zeros."""
        found = [model.encode_view(tower, view, levels) for model in self.stages()]
        rows = {level: torch.cat([values[level].float() for values in found], -1) for level in levels}
        return {level: F.normalize(row, dim=-1) if level == "joint" else row for level, row in rows.items()}


def stages_of(folder: Path) -> list[str]:
    """Folders of the models that ``folder`` joins, seen from there; none where it is a model of its own, or nothing."""
    try:
        described = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    names = described.get(STAGES) if isinstance(described, dict) else None
    return [str(name) for name in names] if isinstance(names, list) else []


def write_stages(folder: Path, names: Sequence[str]) -> None:
    """Makes a folder that joins these models."""
    write_atomically(folder / CONFIG, (json.dumps({STAGES: list(names)}, indent=1) + "\n").encode())


AnyModel: TypeAlias = MultimodalModel | ConcatenatedModel


def open_model(place: str | Path) -> AnyModel:
    """The model of a folder, a checkpoint, a run folder, a hub's name, or all models of a folder of stages.

    Raises:
        ConfigError: there is none, or it cannot be read.
    """
    if not str(place).startswith(HUB) and stages_of(model_folder(Path(place))):
        return ConcatenatedModel.from_pretrained(place)
    return MultimodalModel.from_pretrained(place)
