"""The whole of a run's configuration: towers, objectives, data, training and evaluation in one typed tree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

import torch
from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from mmcl.config import Options, build, read_yaml, unknown_name
from mmcl.data.options import DataOptions
from mmcl.encoders.pretrained import Source
from mmcl.media.augmentation import NONE, Augmentation
from mmcl.model import ModelOptions, MultimodalModel
from mmcl.objectives import OBJECTIVES, ObjectiveOptions
from mmcl.objectives.base import Objective, ObjectiveMix, check_needs
from mmcl.objectives.weights import Ramp, over_run
from mmcl.types import ConfigError, Need, VideoSpec

PositiveInt = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class ScheduleOptions(Options):
    """What every optimizer has; norms, biases and temperatures are never decayed."""

    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """of the learning rate after the warm-up: half a cosine or a line down to ``floor`` at the last step, none, or
    ``wsd``: none until the last ``decay_share`` of the steps, a line there (arXiv 2405.18392)"""
    warmup_steps: Annotated[int, Field(ge=0)] = 20
    """optimizer steps of a linear warm-up from 0"""
    warmup_samples: Annotated[int, Field(ge=0)] | None = None
    """instead: as many steps as it takes to draw so many rows"""
    decay_share: Annotated[float, Field(gt=0, le=1)] = 0.2
    """of ``wsd``: the share of all steps in which the rate goes down"""
    floor: Fraction = 0.0
    """where the rate ends, as a share of ``learning_rate``"""
    clip_norm: Annotated[float, Field(gt=0)] | None = 1.0
    """largest gradient norm over all parameters; null: no clipping"""


class AdamWOptions(ScheduleOptions):
    """AdamW (Loshchilov & Hutter 2019)."""

    name: Literal["adamw"] = "adamw"
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.98
    epsilon: Annotated[float, Field(gt=0)] = 1e-8


class SGDOptions(ScheduleOptions):
    """Stochastic gradient descent with momentum."""

    name: Literal["sgd"] = "sgd"
    learning_rate: Annotated[float, Field(gt=0)] = 0.1
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    nesterov: bool = False
    """look ahead along the momentum (Sutskever et al. 2013)"""
    clip_norm: Annotated[float, Field(gt=0)] | None = None

    @model_validator(mode="after")
    def _has_momentum(self) -> SGDOptions:
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov looks ahead along the momentum: give one above 0")
        return self


class LARSOptions(ScheduleOptions):
    """SGD with layer-wise rates for large batches (You et al. 2017, arXiv 1708.03888)."""

    name: Literal["lars"] = "lars"
    learning_rate: Annotated[float, Field(gt=0)] = 0.6
    weight_decay: Annotated[float, Field(ge=0)] = 1e-6
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    trust: Annotated[float, Field(gt=0)] = 1e-3
    """size of a step relative to the weights, times the learning rate"""
    clip_norm: Annotated[float, Field(gt=0)] | None = None


def _optimizer_name(options: Any) -> Any:
    """AdamW where no name is given."""
    return options.get("name", "adamw") if isinstance(options, dict) else getattr(options, "name", None)


OptimizerOptions: TypeAlias = Annotated[
    Annotated[AdamWOptions, Tag("adamw")] | Annotated[SGDOptions, Tag("sgd")] | Annotated[LARSOptions, Tag("lars")],
    Discriminator(_optimizer_name),
]


class MomentumOptions(Options):
    """Moving averages of towers and heads, for objectives that ask for them (MoCo, BYOL, …)."""

    start: Fraction = 0.996
    """share that a copy keeps of itself in the first step (BYOL 0.996; persistency MoCo 0.994; MoCo 0.999)"""
    schedule: Literal["cosine", "constant"] = "cosine"
    """half a cosine up to 1 at the last step, or ``start`` throughout"""


class EmaOptions(Options):
    """A moving average of the whole model, for evaluation: it steers nothing of the training."""

    decay: Annotated[float, Field(gt=0, lt=1)] = 0.9999
    """share that the average keeps of itself in a step"""
    start_step: Annotated[int, Field(ge=0)] = 0
    """until so many steps are taken it is the model itself"""


class CollapseOptions(Options):
    """When embeddings are so much alike that a line on stderr says so."""

    std: Annotated[float, Field(ge=0)] = 0.05
    """``std/TOWER`` in ``metrics.jsonl`` below this; 1 is a spread in all directions"""
    effective_rank: Annotated[float, Field(ge=0)] = 1.5
    """``effective_rank/TOWER`` below this; 1 is a line"""
    logs: PositiveInt = 5
    """in so many logged steps in a row"""


class BestOptions(Options):
    """Which checkpoint is kept for good, beside the newest ones."""

    metric: str = "loss"
    """a name in ``metrics.jsonl``, as it was logged last before the checkpoint"""
    mode: Literal["min", "max"] = "min"
    """whether less of it is better, or more"""


class TrainOptions(Options):
    """Length, batch, precision and what a run writes."""

    out: str
    """the run folder"""
    steps: PositiveInt
    """optimizer steps"""
    global_batch: PositiveInt
    """rows of one loss over all ranks, which share them equally: the same number on any number of processes"""
    micro_batch: PositiveInt | None = None
    """rows per forward of a rank; smaller than its share of the batch, which it divides: the same loss and gradients in
    less memory for a second forward (gradient cache); null: all at once"""
    accumulate: PositiveInt = 1
    """losses whose gradients are averaged into one optimizer step; each sees its own global batch"""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    processes: PositiveInt | None = None
    """how many ranks this run must have; a launcher that started another number is refused"""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """of forwards; weights stay fp32. ``fp16`` (GPUs alone) scales losses, and skips steps while the scale is found"""
    tf32: bool = False
    """GPUs may multiply fp32 numbers with 10 bits behind the point"""
    channels_last: bool = False
    """convolutions of towers lie channels last, 2-d and 3-d: the same figures but for rounding. Made for tensor cores
    of GPUs; on CPUs 3-d ones are slower by it (tools/bench/layout.py), so try both"""
    threads: PositiveInt | None = None
    """torch threads per rank on a CPU; null: the cores of a rank, less one where workers decode beside it"""
    log_every: PositiveInt = 10
    checkpoint_every: PositiveInt = 100
    """steps"""
    checkpoint_minutes: Annotated[float, Field(gt=0)] | None = None
    """also when so many have passed since the last one"""
    keep_checkpoints: PositiveInt = 2
    """the newest so many"""
    best: BestOptions | None = None
    """null: no other is kept"""
    sharding: Literal["none", "fsdp2"] | None = None
    """``fsdp2``: parameters, gradients and optimizer states are split over ranks, tower block by tower block; null: as
    the launcher says (configs/accelerate/fsdp2_8.yaml; deepspeed_8.yaml splits gradients and states alone)"""
    timeout_seconds: Annotated[float, Field(ge=1)] = 600.0
    """how long ranks wait for one that gives no sign of life, before they end and name it"""
    nonfinite: Literal["stop", "skip"] = "stop"
    """a loss or gradient that is not finite ends the run before the step, or costs that step"""
    nonfinite_limit: PositiveInt = 10
    """``skip``: so many such steps in a row, and the next one ends the run"""
    trackers: tuple[str, ...] = ()
    """names of Accelerate trackers: tensorboard, wandb, trackio, …"""
    collapse: CollapseOptions = CollapseOptions()
    optimizer: OptimizerOptions = AdamWOptions()
    momentum: MomentumOptions = MomentumOptions()
    ema: EmaOptions | None = None
    """null: no average is kept; else each checkpoint has one in its folder ``ema``, a model like any other"""


class EvaluateOptions(Options):
    """How shards are embedded for retrieval, and which of them while a run goes on."""

    clips: PositiveInt = 1
    """evenly spaced windows of a sample whose embeddings are averaged"""
    shards: str | None = None
    """retrieval on these every ``every_steps``, over all ranks, and after the last step: ``eval/…`` in
    ``metrics.jsonl``; of the moving average where there is one (``train.ema``); null: none"""
    knn_shards: str | None = None
    """labelled shards among which samples of ``shards`` look for their label, by the joint space (k-NN)"""
    every_steps: PositiveInt = 1000
    max_share: Annotated[float, Field(gt=0, le=1)] = 0.1
    """of the time that evaluation may take; one that would take more is skipped, which is said"""
    workers: Annotated[int, Field(ge=0)] = 2
    """decoding processes of each rank meanwhile"""


class MultistageOptions(Options):
    """Stages of ``pipelines/multistage.py``: each draws its batches from clusters of all earlier ones (2402.11816)."""

    stages: PositiveInt = 2
    """models that are trained one after the other, each from the same start"""
    clusters: Annotated[int, Field(ge=1, le=100_000)] = 10
    """that the embeddings of each stage are parted into"""
    modality: str | None = None
    """whose rows are clustered; null: the first tower's that reads no text"""
    level: Literal["joint", "pooled"] = "joint"
    """rows of the joint space, or what is before every head, for objectives that train no head (intra_modal)"""
    fit_rows: PositiveInt = 1_000_000
    """rows that centroids are fitted to, at most; all are assigned"""


class RunConfig(Options):
    """A run, whole."""

    model: ModelOptions
    objectives: Annotated[tuple[ObjectiveOptions, ...], Field(min_length=1)]
    data: DataOptions
    train: TrainOptions
    evaluate: EvaluateOptions = EvaluateOptions()
    multistage: MultistageOptions = MultistageOptions()

    @field_validator("objectives", mode="before")
    @classmethod
    def _list(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads a YAML file, applies ``dotted.path=value`` overrides and checks every key and value.

    Raises:
        ConfigError: naming each wrong path, its value, what is allowed and the nearest name.
    """
    return build(RunConfig, read_yaml(Path(path)), overrides, where=str(path))


def build_model(
    config: RunConfig, *, pretrained: Mapping[str, Source] | None = None, fresh: bool = True
) -> tuple[MultimodalModel, ObjectiveMix]:
    """The model and its objectives, freshly initialised from torch's random state.

    Args:
        config: the run.
        pretrained: tower: what gives its first weights instead of what the configuration says, such as a function.
        fresh: False where a checkpoint is loaded afterwards: first weights are then neither read nor downloaded.

    Raises:
        ConfigError: an objective asks for what no tower gives, or first weights cannot be had; names the path.
    """
    model = MultimodalModel(config.model)
    towers = model.tower_infos()
    objectives: dict[str, Objective] = {}
    weights: dict[str, float | Ramp] = {}
    for number, options in enumerate(config.objectives):
        name = options.name if options.name not in objectives else f"{options.name}_{number}"
        objectives[name] = OBJECTIVES[options.name].build(options, towers, path=f"objectives.{number}")
        check_needs(objectives[name].needs, towers, path=f"objectives.{number}")
        _check_augmentations(objectives[name].needs, options, config.data.augmentations, f"objectives.{number}")
        _check_masking(objectives[name].masking, config.data.augmentations, f"objectives.{number}")
        _check_mixing(objectives[name].mixing, config.data.augmentations, f"objectives.{number}")
        _check_sizes(objectives[name].needs, options, model, f"objectives.{number}")
        weights[name] = over_run(options.weight, config.train.steps, f"objectives.{number}.weight")
    mix = ObjectiveMix(objectives, weights, steps=config.train.steps)
    model.add_scales(mix.scales, mix.start_temperatures)
    model.add_fusions(mix.fusions)
    if fresh:
        model.load_pretrained(pretrained)
        for objective in objectives.values():
            objective.load_pretrained()
    model.serve(mix.needs)
    return model, mix


def _check_augmentations(
    needs: Sequence[Need], options: Options, augmentations: Mapping[str, Augmentation], path: str
) -> None:
    """ConfigError where an option names an augmentation that does not exist."""
    for need in needs:
        name = need.view.augmentation
        if name != NONE and name not in augmentations:
            place = _place(options.model_dump(), "augmentation", name, path)
            raise unknown_name(place, name, [*augmentations, NONE])


@torch.no_grad()
def _check_sizes(needs: Sequence[Need], options: Options, model: MultimodalModel, path: str) -> None:
    """ConfigError where pictures are not of the size that a tower asks for, and it cannot read them."""
    for tower, spec in dict.fromkeys((need.tower, need.view.spec) for need in needs):
        encoder = model.tower(tower)
        if spec == encoder.spec or not isinstance(spec, VideoSpec):
            continue
        training = encoder.training
        try:
            encoder.eval()(torch.zeros(1, spec.frames, 3, spec.size, spec.size, dtype=torch.uint8))
        except (RuntimeError, ValueError, AssertionError) as error:
            place = _place(options.model_dump(), "size", spec.size, path)
            reason = " ".join(str(error).split())[:200]
            raise ConfigError(
                f"{place}: tower {tower!r} cannot read pictures of {spec.size} pixels: {reason}"
            ) from None
        finally:
            encoder.train(training)


def _place(tree: Any, ending: str, value: object, path: str) -> str:
    """The dotted path of the first option whose name ends so and that has this value; where none has, ``path``."""
    for key, node in tree.items():
        if key.endswith(ending) and node == value:
            return f"{path}.{key}"
        if isinstance(node, dict):
            below = _place(node, ending, value, f"{path}.{key}")
            if below != f"{path}.{key}":
                return below
    return path


def _check_masking(masking: Mapping[str, str], augmentations: Mapping[str, Augmentation], path: str) -> None:
    """ConfigError where texts are to be read with masked tokens and their augmentation masks none."""
    for option, name in masking.items():
        if name == NONE or not augmentations[name].text.mask:
            place = f"give data.augmentations.{name}.text a mask" if name != NONE else "name one that does"
            raise ConfigError(f"{path}.{option}: {name!r} masks no token; {place}")


def _check_mixing(mixing: Mapping[str, tuple[str, str]], augmentations: Mapping[str, Augmentation], path: str) -> None:
    """ConfigError where rows are to come mixed and their augmentation does not mix them."""
    for option, (modality, name) in mixing.items():
        if name == NONE or getattr(augmentations[name], modality).mix is None:
            place = f"give data.augmentations.{name}.{modality} a mix" if name != NONE else "name one that does"
            raise ConfigError(f"{path}.{option}: {name!r} mixes no {modality}; {place}")


def json_schema() -> dict[str, Any]:
    """The JSON schema of a configuration file, for editors."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **RunConfig.model_json_schema()}
