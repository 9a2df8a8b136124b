"""`mmcl evaluate classify|knn|linear|few-shot|all`: thin, and quick to start."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from mmcl.cli_options import Cache, Checkpoint, Clips, Crops, Shards, Workers, check_places


class Level(str, Enum):
    """What probes look at."""

    pooled = "pooled"
    joint = "joint"
    informative = "informative"


class Average(str, Enum):
    """What is averaged over windows and crops."""

    scores = "scores"
    embeddings = "embeddings"


class PromptAverage(str, Enum):
    """How the prompts of a class become one score."""

    mean = "mean"
    max = "max"


class Kind(str, Enum):
    """Linear probes."""

    logistic = "logistic"
    ridge = "ridge"


Out = Annotated[Path, typer.Option(help="Folder for report.json, report.md and report.html.")]
Train = Annotated[str, typer.Option(help="Labelled shards to learn from.")]
Protocol = Annotated[
    str | None, typer.Option(help="Classes, prompts, modality and views of a protocol: a name, or a YAML file.")
]
Modalities = Annotated[
    list[str] | None, typer.Option("--modality", help="video, audio, video+audio; default: each of the model.")
]
Column = Annotated[str | None, typer.Option(help="Metadata column with the class names; default: label_name.")]
Classes = Annotated[Path | None, typer.Option(help="All class names: a line each, or labels.json.")]
Prompts = Annotated[list[str] | None, typer.Option(help="'a video of {}.', or a file of such lines; several.")]
Prompted = Annotated[PromptAverage, typer.Option(help="A class is the mean of its prompts, or its best.")]
Averaged = Annotated[
    Average | None,
    typer.Option(help="Over views: softmax scores (linear by default) or embeddings (classify by default)."),
]
Features = Annotated[
    Level,
    typer.Option(
        help="Before every head, the joint space, or the states of a cmim's decoder (these are not kept in --cache)."
    ),
]
TrainClips = Annotated[int, typer.Option(min=1, help="Windows of each training sample; linear: each is a row.")]
Neighbours = Annotated[int, typer.Option(min=1, help="Rows that vote.")]
Temperature = Annotated[float, typer.Option(min=1e-3, max=1e3, help="Of the votes, exp(cosine / T).")]
Penalties = Annotated[
    list[float] | None, typer.Option("--penalty", min=0, help="λ; several are a sweep. Default: 1e-8 … 100.")
]
Probe = Annotated[Kind, typer.Option(help="Logistic regression by L-BFGS, or ridge in closed form.")]
Seed = Annotated[int, typer.Option(min=0, help="Of held-out rows and of episodes.")]
Ways = Annotated[int, typer.Option(min=2, help="Classes of an episode.")]
Shots = Annotated[int, typer.Option(min=1, help="Examples of each.")]
Episodes = Annotated[int, typer.Option(min=1, help="How many.")]


def add_commands(app: typer.Typer) -> None:
    """Puts the commands into ``mmcl evaluate``."""
    app.command("classify")(classify)
    app.command("knn")(knn)
    app.command("linear")(linear)
    app.command("few-shot")(few_shot)
    app.command("all")(everything)


def classify(
    checkpoint: Checkpoint,
    shards: Shards,
    out: Out,
    protocol: Protocol = None,
    modality: Modalities = None,
    column: Column = None,
    classes: Classes = None,
    prompts: Prompts = None,
    prompt_average: Prompted = PromptAverage.mean,
    clips: Clips = None,
    crops: Crops = 1,
    average: Averaged = None,
    cache: Cache = None,
    workers: Workers = 2,
) -> None:
    """Zero-shot: the class whose name lies nearest; mAP where samples have several classes."""
    options = {"prompt_average": prompt_average.value, "clips": clips, "crops": crops, "average": _value(average)}
    named = {"modality": modality, "column": column, "classes": classes, "prompts": prompts}
    _run("classify", checkpoint, shards, out, protocol, cache, workers, named, options)


def knn(
    checkpoint: Checkpoint,
    shards: Shards,
    train: Train,
    out: Out,
    protocol: Protocol = None,
    modality: Modalities = None,
    column: Column = None,
    neighbours: Neighbours = 200,
    temperature: Temperature = 0.1,
    features: Features = Level.pooled,
    clips: Clips = None,
    crops: Crops = 1,
    train_clips: TrainClips = 1,
    cache: Cache = None,
    workers: Workers = 2,
) -> None:
    """Weighted nearest neighbours in labelled training shards."""
    options = {"neighbours": neighbours, "temperature": temperature, "level": features.value}
    views = {"clips": clips, "crops": crops, "train_clips": train_clips}
    named = {"modality": modality, "column": column}
    _run("knn", checkpoint, shards, out, protocol, cache, workers, named, {**options, **views}, train)


def linear(
    checkpoint: Checkpoint,
    shards: Shards,
    train: Train,
    out: Out,
    protocol: Protocol = None,
    modality: Modalities = None,
    column: Column = None,
    kind: Probe = Kind.logistic,
    penalty: Penalties = None,
    features: Features = Level.pooled,
    clips: Clips = None,
    crops: Crops = 1,
    train_clips: TrainClips = 1,
    average: Averaged = None,
    seed: Seed = 0,
    cache: Cache = None,
    workers: Workers = 2,
) -> None:
    """A linear probe of labelled training shards; λ is chosen on a held-out part of them."""
    options = {"kind": kind.value, "level": features.value, "average": _value(average), "seed": seed}
    options |= {"penalties": tuple(penalty)} if penalty else {}
    views = {"clips": clips, "crops": crops, "train_clips": train_clips}
    named = {"modality": modality, "column": column}
    _run("linear", checkpoint, shards, out, protocol, cache, workers, named, {**options, **views}, train)


def few_shot(
    checkpoint: Checkpoint,
    shards: Shards,
    out: Out,
    protocol: Protocol = None,
    modality: Modalities = None,
    column: Column = None,
    ways: Ways = 5,
    shots: Shots = 1,
    episodes: Episodes = 600,
    features: Features = Level.pooled,
    clips: Clips = None,
    crops: Crops = 1,
    seed: Seed = 0,
    cache: Cache = None,
    workers: Workers = 2,
) -> None:
    """Few-shot episodes within labelled shards: the nearest prototype of a few examples."""
    options = {"ways": ways, "shots": shots, "episodes": episodes, "level": features.value, "seed": seed}
    named = {"modality": modality, "column": column}
    views = {"clips": clips, "crops": crops}
    _run("few-shot", checkpoint, shards, out, protocol, cache, workers, named, {**options, **views})


def everything(
    checkpoint: Checkpoint,
    shards: Shards,
    out: Out,
    train: Annotated[str | None, typer.Option(help="Labelled shards to learn from, for the probes.")] = None,
    protocol: Protocol = None,
    modality: Modalities = None,
    column: Column = None,
    classes: Classes = None,
    prompts: Prompts = None,
    clips: Clips = None,
    crops: Crops = 1,
    neighbours: Neighbours = 200,
    kind: Probe = Kind.logistic,
    ways: Ways = 5,
    shots: Shots = 1,
    episodes: Episodes = 600,
    seed: Seed = 0,
    cache: Cache = None,
    workers: Workers = 2,
) -> None:
    """Retrieval, zero-shot, k-NN, linear and few-shot: all that labels and modalities allow, in one report folder."""
    options = {"clips": clips, "crops": crops, "neighbours": neighbours, "kind": kind.value, "ways": ways}
    options |= {"shots": shots, "episodes": episodes, "seed": seed}
    named = {"modality": modality, "column": column, "classes": classes, "prompts": prompts}
    _run("all", checkpoint, shards, out, protocol, cache, workers, named, options, train)


def _value(choice: Enum | None) -> Any:
    return None if choice is None else choice.value


def _run(
    task: Any,
    checkpoint: Path,
    shards: str,
    out: Path,
    protocol: str | None,
    cache: Path | None,
    workers: int,
    named: dict[str, Any],
    options: dict[str, Any],
    train: str | None = None,
) -> None:
    for place in [shards, *([] if train is None else [train])]:
        if protocol is None or place != shards:  # of a protocol the shards may be a folder of splits
            check_places(checkpoint, place, out)

    from mmcl.distributed import Comm
    from mmcl.evaluation.class_labels import read_class_names, read_prompts
    from mmcl.evaluation.protocols import classification_protocol, split_of
    from mmcl.evaluation.run_tasks import TaskOptions, TaskRun, evaluate_all, evaluate_task, options_of
    from mmcl.evaluation.task_report import first_lines

    chosen = TaskOptions(**options)
    asked = None if protocol is None else classification_protocol(protocol)
    if asked is not None:
        shards, chosen = split_of(shards, asked), options_of(asked, chosen)
        check_places(checkpoint, shards, out)
    given: dict[str, Any] = {}  # what is said here goes before the protocol
    if named["modality"]:
        given["modalities"] = tuple(named["modality"])
    if named["column"]:
        given["column"] = named["column"]
    if named.get("classes"):
        given["classes"] = tuple(read_class_names(named["classes"]))
    if named.get("prompts"):
        given["prompts"] = tuple(read_prompts(named["prompts"]))
    run = TaskRun(
        checkpoint,
        shards,
        chosen.but(**given),
        protocol=asked,
        train=train,
        cache=cache or out / "embeddings",
        workers=workers,
    )
    report = evaluate_all(run, out) if task == "all" else evaluate_task(run, task, out)
    for line in [*first_lines(report), f"report: {out / 'report.html'}"] if Comm.current().rank == 0 else []:
        typer.echo(line)
