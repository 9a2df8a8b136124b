"""Class labels, by a linear head on one tower: fine-tuning, and linear probes that see augmented clips."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from mmcl.config import Options, unknown_name
from mmcl.distributed import Comm
from mmcl.objectives.base import Objective, Term
from mmcl.objectives.ranks import classification
from mmcl.objectives.weights import Weight
from mmcl.types import ConfigError, Embeddings, Need, TowerInfo, VectorSpec, View


class ClassificationOptions(Options):
    """Cross-entropy of a linear head on a tower's features with class labels (smoothed: Szegedy et al. 2015, arXiv
    1512.00567).

    Needs: one tower, which may be locked (then the head alone learns), and labels; samples without one take no part.
    ``pipelines/finetune.py`` trains it and measures the head on test shards.
    """

    name: Literal["classification"] = "classification"
    weight: Weight = 1.0
    tower: str = "video"
    classes: Annotated[int, Field(ge=2)]
    """how many labels there are"""
    level: Literal["pooled", "joint"] = "pooled"
    """what the head reads: the tower's features, or the unit rows of the joint space"""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """share of the target that is spread evenly over all classes"""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """of what the head reads"""
    augmentation: str = "none"
    """a name in ``data.augmentations``"""


class Classification(Objective):
    """CE(W f + b, y), the mean over the labelled rows of all ranks; ``top-1`` in its metrics is theirs, in percent."""

    labels_option = "classes"

    def __init__(self, options: ClassificationOptions, need: Need, width: int) -> None:
        super().__init__()
        self.options, self.need, self.needs = options, need, (need,)
        self.dropout = nn.Dropout(options.dropout)
        self.head = nn.Linear(width, options.classes)
        nn.init.normal_(self.head.weight, std=0.01)  # no class is preferred before the first step
        nn.init.zeros_(self.head.bias)

    def forward(self, embeddings: Embeddings, comm: Comm) -> Term:
        rows = embeddings.present(self.need.view)
        labels = embeddings.batch.labels
        logits = self.head(self.dropout(embeddings.get(self.need)))
        loss = classification(logits, labels, rows, comm, smoothing=self.options.label_smoothing)
        return Term(loss, {"top-1": self._right(logits.detach(), labels, rows, comm)})

    @staticmethod
    def _right(logits: Tensor, labels: Tensor, rows: Tensor, comm: Comm) -> Tensor:
        return comm.mean(100.0 * (logits.argmax(1) == labels).to(torch.float32), rows & (labels >= 0))


def build(
    options: ClassificationOptions, towers: Mapping[str, TowerInfo], path: str = "objectives.0"
) -> Classification:
    """The objective for these towers.

    Raises:
        ConfigError: an unknown tower, or the joint space of stored embeddings; names ``path``.
    """
    if options.tower not in towers:
        raise unknown_name(f"{path}.tower", options.tower, towers)
    tower = towers[options.tower]
    if options.level == "joint" and isinstance(tower.spec, VectorSpec):
        raise ConfigError(f"{path}.level: joint, but {options.tower!r} holds stored embeddings; take pooled")
    need = Need(options.tower, View(tower.spec, augmentation=options.augmentation), (options.level,))
    return Classification(options, need, tower.width if options.level == "pooled" else tower.joint_width)
