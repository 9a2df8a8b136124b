"""Options that several commands take, and what is looked at before anything heavy is imported."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Shards = Annotated[str, typer.Argument(help="A folder of indexed shards, or its URL.")]
Checkpoint = Annotated[Path, typer.Argument(help="A checkpoint, a run folder, or an exported model.")]
Clips = Annotated[
    int | None, typer.Option(min=1, help="Windows per sample whose embeddings are averaged; default: as the run says.")
]
Crops = Annotated[int, typer.Option(help="3: also the start and end of the long side of pictures; 1: the centre.")]
Cache = Annotated[
    Path | None, typer.Option(help="Folder that keeps embeddings for further evaluations; default: OUT/embeddings.")
]
Workers = Annotated[int, typer.Option(min=0, help="Decoding processes.")]


def check_places(checkpoint: Path, shards: str | None, out: Path, against: Path | None = None) -> None:
    """Says what is wrong with a path before torch is imported, which takes seconds.

    Raises:
        ConfigError: no such checkpoint, shards or report.
        RunError: ``out`` cannot be written.
    """
    from mmcl.folders import check_writable, model_folder, read_report
    from mmcl.shards.manifest import load_manifest

    check_writable(out)
    model_folder(checkpoint)
    if shards is not None:
        load_manifest(shards)
    if against is not None:
        read_report(against)
