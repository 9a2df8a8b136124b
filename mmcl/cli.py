"""The command line: thin, and quick to start: nothing heavy is imported before a command runs."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

import mmcl
from mmcl.shards.commands import app as shards_app
from mmcl.types import MmclError

app = typer.Typer(
    help="Train one embedding space of video, audio and text on streamed shards.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help: rich alone doubles the time to start
)
evaluate_app = typer.Typer(help="Measure a trained model.", no_args_is_help=True)
app.add_typer(shards_app, name="shards")
app.add_typer(evaluate_app, name="evaluate")

Shards = Annotated[str, typer.Argument(help="A folder of indexed shards, or its URL.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="Changes to the configuration: dotted.path=value …")]


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"mmcl {mmcl.__version__}")
        raise typer.Exit


@app.callback()
def _main(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    if debug:
        os.environ["MMCL_DEBUG"] = "1"


@shards_app.command()
def stats(
    shards: Shards,
    out: Annotated[Path | None, typer.Option(help="Folder for stats.json and stats.html.")] = None,
    sample: Annotated[int | None, typer.Option(min=1, help="Look at so many, drawn at random; default: all.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of what is drawn at random.")] = 0,
    batch: Annotated[int, typer.Option(min=1, help="Samples per batch, of which mixing is told.")] = 256,
    streams: Annotated[int, typer.Option(min=1, help="data.streams of the run.")] = 64,
    block: Annotated[int, typer.Option(min=1, help="data.block of the run.")] = 256,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes; default: one per core.")] = None,
    timeout: Annotated[
        float, typer.Option(max=1e6, help="Seconds per sample; then its process is ended and the sample named.")
    ] = 60.0,
) -> None:
    """Count what shards hold: seconds, sizes, rates, codecs, captions, duplicates, what is missing, how batches mix."""
    from mmcl.folders import check_writable

    if out is not None:
        check_writable(out.expanduser())

    from mmcl.data.mixing import describe_mixing
    from mmcl.progress import show_progress
    from mmcl.shards.manifest import load_manifest
    from mmcl.shards.stats import shard_stats, write_stats

    with show_progress("stats", "samples") as progress:
        found = shard_stats(
            shards, sample=sample, seed=seed, workers=workers, timeout_seconds=timeout, progress=progress
        )
    manifest = load_manifest(shards)
    found = found.with_mixing(
        *describe_mixing(manifest, batch=batch, streams=streams, block=block, seed=seed, alike=found.alike)
    )
    for line in found.lines():
        typer.echo(line)
    if out is not None:
        for path in write_stats(found, out, shards):
            typer.echo(str(path))


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Where everything goes.")] = Path("demo-out"),
    steps: Annotated[int | None, typer.Option(min=1, help="Training steps; default: as the recipe says.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of recordings, weights and order.")] = 0,
    clips: Annotated[
        Path | None, typer.Option(help="Your own CSV (path,caption[,split]) instead of recorded games.")
    ] = None,
) -> None:
    """The whole main job on real clips: record, make shards, train, evaluate, report. A few minutes on a CPU."""
    from mmcl.demo.run import run_demo

    run_demo(out, steps=steps, seed=seed, clips=clips)


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="A YAML file, e.g. configs/pretrain/demo.yaml.")],
    overrides: Overrides = None,
    resume: Annotated[
        str | None,
        typer.Option(help="Go on: 'auto' (newest checkpoint of the run folder, or a new run) or a checkpoint."),
    ] = None,
    allow: Annotated[
        list[str] | None, typer.Option(metavar="KEY", help="A dotted key that may differ from the checkpoint's.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would run, and one batch; train nothing.")
    ] = False,
) -> None:
    """Train in this process. On many: accelerate launch pipelines/pretrain.py CONFIG …, the same program."""
    from mmcl.config import read_yaml
    from mmcl.folders import check_resume

    check_resume(resume)
    read_yaml(config)  # a wrong path is said before torch is imported, which takes seconds

    from mmcl.recipe import load_config
    from mmcl.training.launch import describe, pretrain

    resolved = load_config(config, overrides or [])
    if dry_run:
        typer.echo(describe(resolved))
    else:
        pretrain(resolved, resume=resume, allow=allow or [])


@app.command()
def objectives(
    name: Annotated[
        str | None, typer.Argument(help="One of them, or OBJECTIVE.METHOD, with the meaning of its options.")
    ] = None,
) -> None:
    """List the objectives that a configuration can name: needs, options and source."""
    from mmcl.catalogue import detail, find_entry, overview, read_catalogue

    entries = read_catalogue()
    if name is None:
        typer.echo(overview(entries))
        typer.echo("\n`mmcl objectives NAME` explains the options; configs/pretrain/README.md has a file for each.")
    else:
        typer.echo(detail(find_entry(name, entries)))


Checkpoint = Annotated[Path, typer.Argument(help="A checkpoint, a run folder, or an exported model.")]
Clips = Annotated[
    int | None, typer.Option(min=1, help="Windows per sample whose embeddings are averaged; default: as the run says.")
]
Workers = Annotated[int, typer.Option(min=0, help="Decoding processes.")]


def _check_places(checkpoint: Path, shards: str | None, out: Path, against: Path | None = None) -> None:
    """Says what is wrong with a path before torch is imported, which takes seconds."""
    from mmcl.folders import check_writable, model_folder, read_report
    from mmcl.shards.manifest import load_manifest

    check_writable(out)
    model_folder(checkpoint)
    if shards is not None:
        load_manifest(shards)
    if against is not None:
        read_report(against)


@app.command()
def embed(
    checkpoint: Checkpoint,
    shards: Shards,
    out: Annotated[Path, typer.Option(help="Folder for embeddings.safetensors and items.jsonl.")],
    clips: Clips = None,
    workers: Workers = 2,
) -> None:
    """Embed every sample of some shards."""
    _check_places(checkpoint, shards, out)

    from mmcl.evaluation.embed import embed_to_folder

    count = embed_to_folder(checkpoint, shards, out, clips=clips, workers=workers)
    typer.echo(f"{count} samples embedded into {out}")


@evaluate_app.command("retrieval")
def evaluate_retrieval(
    checkpoint: Checkpoint,
    shards: Shards,
    out: Annotated[Path, typer.Option(help="Folder for report.json, report.md and report.html.")],
    by: Annotated[
        str | None, typer.Option(help="A metadata column: one list per value, each searched on its own.")
    ] = None,
    headline: Annotated[str | None, typer.Option(help="The value of --by that comes first.")] = None,
    per: Annotated[
        str | None, typer.Option(help="A metadata column, or `label`: also figures of each value, whole gallery.")
    ] = None,
    against: Annotated[Path | None, typer.Option(help="An older report: what got better or worse.")] = None,
    transductive: Annotated[
        bool, typer.Option(help="Also dual and inverted softmax, apart from plain figures.")
    ] = False,
    bank: Annotated[str | None, typer.Option(help="Training shards: also QB-norm, apart from plain figures.")] = None,
    clips: Clips = None,
    workers: Workers = 2,
) -> None:
    """Retrieval between every two modalities, in both directions, with a report to look at."""
    _check_places(checkpoint, shards, out, against)

    from mmcl.evaluation.run import evaluate_checkpoint
    from mmcl.evaluation.show import print_evaluation

    print_evaluation(
        evaluate_checkpoint(
            checkpoint,
            shards,
            out,
            by=by,
            headline=headline,
            clips=clips,
            workers=workers,
            per=per,
            against=against,
            transductive=transductive,
            bank=bank,
        )
    )


@app.command()
def export(
    checkpoint: Checkpoint,
    out: Annotated[Path, typer.Option(help="Folder for config.json, model.safetensors and the card.")],
) -> None:
    """Write a model that `mmcl.MultimodalModel.from_pretrained` loads."""
    _check_places(checkpoint, None, out)

    from mmcl.model import MultimodalModel

    MultimodalModel.from_pretrained(checkpoint).export(out)
    typer.echo(f"model: {out}")


def guarded(function: Callable[[], object]) -> None:
    """Runs ``function``; errors meant for people become one line on stderr and an exit code."""
    try:
        function()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        sys.exit(130)
    except Exception as error:
        if not isinstance(error, MmclError) or os.environ.get("MMCL_DEBUG"):
            raise
        rank = f"[rank {os.environ['RANK']}] " if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ""
        print(f"{rank}error: {error}", file=sys.stderr, flush=True)
        sys.exit(error.exit_code)


def main() -> None:
    """Entry point of the ``mmcl`` command."""
    guarded(app)
