"""The command line: thin, and quick to start: nothing heavy is imported before a command runs."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

import mmcl
from mmcl.cli_classify import add_commands
from mmcl.cli_options import Cache, Checkpoint, Clips, Crops, Shards, Workers, check_places
from mmcl.shards.commands import app as shards_app
from mmcl.types import ConfigError, MmclError

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
    profile: Annotated[
        bool, typer.Option("--profile", help="Also write where a step goes: profile/ in the run folder.")
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
        pretrain(resolved, resume=resume, allow=allow or [], profiled=profile)


@app.command()
def runs(
    folders: Annotated[list[Path], typer.Argument(help="Run folders, or folders of them.")],
    out: Annotated[Path, typer.Option(help="The HTML file with their curves.")] = Path("runs.html"),
) -> None:
    """Show runs side by side, and draw their curves."""
    from mmcl.evaluation.runs import find_runs, run_lines, write_runs
    from mmcl.folders import check_writable

    check_writable(out.parent)
    found = find_runs(folders)
    for line in run_lines(found):
        typer.echo(line)
    typer.echo(str(write_runs(found, out)))


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


@app.command()
def encoders(
    name: Annotated[
        str | None, typer.Argument(help="One of them, with its options, or timm: or open_clip: for all their names.")
    ] = None,
) -> None:
    """List the towers that a configuration can name: sizes, what they eat, weights and their licences."""
    from mmcl.encoders.listing import detail, overview

    typer.echo(overview() if name is None else detail(name))


@app.command()
def embed(
    checkpoint: Checkpoint,
    shards: Shards,
    out: Annotated[Path, typer.Option(help="Folder for the files of each shard and index.json.")],
    clips: Clips = None,
    crops: Crops = 1,
    pooled: Annotated[bool, typer.Option("--pooled", help="What is before every head, for probes; no texts.")] = False,
    each_view: Annotated[
        bool, typer.Option("--each-view", help="Keep a row of each window and crop, not their mean.")
    ] = False,
    workers: Workers = 2,
) -> None:
    """Embed every sample of some shards; what the folder holds of them already is kept."""
    check_places(checkpoint, shards, out)

    from mmcl.distributed import Comm
    from mmcl.evaluation.embed import embed_to_folder

    stored = embed_to_folder(
        checkpoint,
        shards,
        out,
        clips=clips,
        crops=crops,
        level="pooled" if pooled else "joint",
        each_view=each_view,
        workers=workers,
    )
    if Comm.current().rank == 0:
        typer.echo(f"{len(stored)} samples embedded into {out}")


@evaluate_app.command("retrieval")
def evaluate_retrieval(
    out: Annotated[Path, typer.Option(help="Folder for report.json, report.md and report.html.")],
    checkpoint: Annotated[
        Path | None, typer.Argument(help="A checkpoint, a run folder, or an exported model; not with --embeddings.")
    ] = None,
    shards: Annotated[
        str | None, typer.Argument(help="A folder of indexed shards, or of splits, or its URL; not with --embeddings.")
    ] = None,
    protocol: Annotated[
        str,
        typer.Option(
            help="What counts: a name (paired, msrvtt_1k_a, msrvtt_full, msvd, didemo, activitynet, lsmdc, vatex, "
            "audiocaps, clotho), or a YAML file."
        ),
    ] = "paired",
    directions: Annotated[
        str,
        typer.Option(
            help="Instead of the protocol's: QUERY->GALLERY, by commas, such as 'text->video,text->video+audio'; "
            "or all: of all sets of modalities."
        ),
    ] = "",
    join: Annotated[
        str | None,
        typer.Option(help="Instead of the protocol's fusion, of a set: mean, or learned (as the model was trained)."),
    ] = None,
    embeddings: Annotated[
        Path | None, typer.Option(help="A folder that `mmcl embed` wrote, instead of CHECKPOINT and SHARDS.")
    ] = None,
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
    bank: Annotated[
        str | None, typer.Option(help="Training shards, or embeddings of them: also QB-norm, apart from plain figures.")
    ] = None,
    cache: Cache = None,
    clips: Clips = None,
    workers: Workers = 2,
) -> None:
    """Retrieval between modalities, or sets of them, with a report to look at."""
    from mmcl.evaluation.protocols import TRANSDUCTIVE, retrieval_protocol, split_of

    chosen = retrieval_protocol(
        protocol,
        directions=[each.strip() for each in directions.split(",") if each.strip()],
        post=TRANSDUCTIVE if transductive else (),
        fusion=join,
    )
    if embeddings is not None and (checkpoint is not None or clips is not None):
        raise ConfigError("--embeddings: rows that are there need neither CHECKPOINT and SHARDS nor --clips")
    if embeddings is None:
        if checkpoint is None or shards is None:
            raise ConfigError("evaluate retrieval needs CHECKPOINT and SHARDS, or --embeddings")
        check_places(checkpoint, split_of(shards, chosen), out, against)
    from mmcl.distributed import Comm
    from mmcl.evaluation.run import evaluate_checkpoint, evaluate_embeddings
    from mmcl.evaluation.show import print_evaluation

    wanted: dict[str, Any] = {"by": by, "headline": headline, "per": per, "against": against, "protocol": chosen}
    if embeddings is not None:
        found = evaluate_embeddings(embeddings, out, bank=None if bank is None else Path(bank), **wanted)
    else:
        assert checkpoint is not None
        assert shards is not None
        kept = cache or out / "embeddings"
        found = evaluate_checkpoint(
            checkpoint, shards, out, clips=clips, workers=workers, bank=bank, cache=kept, **wanted
        )
    if Comm.current().rank == 0:
        print_evaluation(found)


add_commands(evaluate_app)


@app.command()
def search(
    index: Annotated[Path, typer.Argument(help="A folder that `mmcl embed` wrote.")],
    query: Annotated[str, typer.Argument(help="A text, or a video, picture or sound file.")],
    checkpoint: Annotated[
        Path | None, typer.Option(help="The model that made the index; default: where it was then.")
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="How many items are shown.")] = 10,
    modality: Annotated[
        str | None, typer.Option(help="Which rows are searched; default: the first that is not text.")
    ] = None,
    method: Annotated[
        str, typer.Option("--index", help="exact, or faiss: approximate, for millions; built once, kept beside.")
    ] = "exact",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON array instead of lines.")] = False,
) -> None:
    """Find the items of embedded shards that are nearest to a text or a file."""
    from mmcl.shards.embedding_files import read_index

    read_index(index)  # a wrong path is said before torch is imported, which takes seconds

    from mmcl.search import Index, hit_lines, hits_json
    from mmcl.search import search as find

    hits = find(Index.open(index), query, checkpoint=checkpoint, top=top, modality=modality, method=method)
    typer.echo(hits_json(hits) if as_json else hit_lines(hits))


@app.command()
def serve(
    checkpoint: Checkpoint,
    index: Annotated[Path, typer.Argument(help="A folder that `mmcl embed` wrote with this model.")],
    shards: Annotated[
        str | None, typer.Option(help="The shards, for pictures and sounds; default: where they were then.")
    ] = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = 8000,
    host: Annotated[
        str, typer.Option(help="Where to listen. Anybody who reaches it may search and upload.")
    ] = "127.0.0.1",
) -> None:
    """Search embedded shards in a browser: by text, or by a picture, video or sound."""
    from mmcl.folders import model_folder
    from mmcl.shards.embedding_files import read_index

    model_folder(checkpoint)
    read_index(index)
    try:
        from mmcl.serve.app import serve as answer
    except ModuleNotFoundError as error:
        raise ConfigError(f"serve needs {error.name}: pip install 'mmcl[serve]'") from None
    from mmcl.serve.library import Library

    answer(Library.open(checkpoint, index, shards), host=host, port=port)


@app.command()
def export(
    checkpoint: Checkpoint,
    out: Annotated[Path, typer.Option(help="Folder for what is written.")],
    report: Annotated[Path | None, typer.Option(help="A report folder: its figures go into the card.")] = None,
    to: Annotated[str, typer.Option(help="mmcl, or for one tower: open_clip, transformers, onnx.")] = "mmcl",
    tower: Annotated[
        str | None, typer.Option(help="The tower that --to open_clip, transformers or onnx wants.")
    ] = None,
) -> None:
    """Write a model that `mmcl.MultimodalModel.from_pretrained` loads, or a tower for another library."""
    check_places(checkpoint, None, out)

    from mmcl.formats import export_checkpoint

    typer.echo(f"model: {export_checkpoint(checkpoint, out, to=to, tower=tower, report=report)}")


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
        print(f"{rank}error: {error}\n", end="", file=sys.stderr, flush=True)  # in one piece, as other ranks write too
        sys.exit(error.exit_code)


def main() -> None:
    """Entry point of the ``mmcl`` command."""
    guarded(app)
