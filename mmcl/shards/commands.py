"""``mmcl shards …``: thin; what runs is imported when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mmcl.progress import show_progress

app = typer.Typer(help="Make and index shards: plain tar files of training samples.", no_args_is_help=True)


@app.command()
def make(
    input: Annotated[
        Path,
        typer.Argument(
            help="A folder of media (captions from NAME.txt or NAME.json beside them), or a CSV, TSV, JSONL or Parquet "
            "table with a column 'path' and any of: caption, captions (a list), start_seconds, end_seconds, label, "
            "group, split. Other columns are kept as metadata.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder for the shards; one folder below it per split.")],
    short_side: Annotated[int, typer.Option(help="Pixels of the shorter side; smaller videos keep their size.")] = 128,
    fps: Annotated[float | None, typer.Option(help="Frames per second at most; default: as the source.")] = None,
    gop: Annotated[int, typer.Option(help="Frames between key frames; short ones make random access fast.")] = 16,
    crf: Annotated[int, typer.Option(help="Quality of H.264: 0 is lossless, 51 the worst.")] = 23,
    audio_rate: Annotated[int, typer.Option(help="Audio samples per second at most; a standard rate.")] = 32_000,
    max_count: Annotated[int, typer.Option(help="Samples per shard at most.")] = 1_000,
    max_size: Annotated[int, typer.Option(help="Megabytes per shard at most.")] = 512,
    shuffle: Annotated[int, typer.Option(help="Seed of the order of samples in the shards.")] = 0,
    keep_order: Annotated[bool, typer.Option("--keep-order", help="Keep the order of the input instead.")] = False,
    workers: Annotated[int | None, typer.Option(help="Processes; default: one per core. Same output.")] = None,
    timeout: Annotated[float, typer.Option(help="Seconds per file; then it is skipped and named.")] = 300.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done; write nothing.")] = False,
) -> None:
    """Make training-ready shards from media and captions.

    Run it again to go on after an interruption, or to take in new rows: what is done is kept. Files that cannot be used
    are skipped and named in failures.jsonl.
    """
    from mmcl.shards.make import MakeOptions, describe_plan, make_shards
    from mmcl.shards.transcode import MediaOptions

    options = MakeOptions(
        media=MediaOptions(short_side=short_side, fps=fps, gop=gop, crf=crf, audio_rate_hz=audio_rate),
        max_count=max_count,
        max_bytes=max_size << 20,
        shuffle=None if keep_order else shuffle,
        workers=workers,
        timeout_seconds=timeout,
    )
    if dry_run:
        for line in describe_plan(input, out, options):
            typer.echo(line)
        return
    with show_progress("shards", "samples") as progress:
        report = make_shards(input, out, options, progress=progress)
    for line in report.lines(out):
        typer.echo(line)


@app.command()
def index(
    folder: Annotated[Path, typer.Argument(help="A folder with WebDataset *.tar files, also in folders below it.")],
    workers: Annotated[int, typer.Option(min=1, help="Threads.")] = 4,
) -> None:
    """Index shards that another tool made (video2dataset, img2dataset, open_clip, webdataset), so that mmcl reads them.

    Writes index.json, sizes.json and one .members file per shard beside them; the tars are not changed.
    """
    from mmcl.shards.index import index_shards

    with show_progress("index", "shards") as progress:
        report = index_shards(folder, workers=workers, progress=progress)
    for problem in report.problems:
        typer.echo(problem, err=True)
    if report.ignored:
        typer.echo(
            "ignored: " + ", ".join(f"{count} × {why}" for why, count in sorted(report.ignored.items())), err=True
        )
    manifest = report.manifest
    typer.echo(
        f"{manifest.num_samples} samples in {manifest.num_shards} shards, {report.num_bytes / 1e6:.1f} MB, "
        f"{len(report.problems)} problems"
    )
