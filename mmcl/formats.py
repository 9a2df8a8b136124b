"""Checkpoints as model folders, and single towers in the formats of other libraries."""

from __future__ import annotations

from pathlib import Path

from mmcl.card import card_report, recipe_facts
from mmcl.config import unknown_name
from mmcl.model import MultimodalModel

FORMATS = ("mmcl", "open_clip", "transformers", "onnx")


def export_checkpoint(
    checkpoint: Path, out: Path, *, to: str = "mmcl", tower: str | None = None, report: Path | None = None
) -> Path:
    """Writes a checkpoint as a model folder with a card, or one of its towers for another library; returns the folder.

    Raises:
        ConfigError: no such format, checkpoint, tower or report.
        RunError: the folder cannot be written.
    """
    if to not in FORMATS:
        raise unknown_name("--to", to, FORMATS)
    figures = None if report is None else card_report(report)
    model = MultimodalModel.from_pretrained(checkpoint)
    return model.export(out, facts=recipe_facts(checkpoint), report=figures)
