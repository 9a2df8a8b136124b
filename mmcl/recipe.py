"""The whole of a run's configuration: towers, objectives, data, training and evaluation in one typed tree."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from mmcl.config import Options, build, read_yaml
from mmcl.data.options import DataOptions
from mmcl.model import ModelOptions, MultimodalModel
from mmcl.objectives import OBJECTIVES, ObjectiveOptions
from mmcl.objectives.base import ObjectiveMix

PositiveInt = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class OptimizerOptions(Options):
    """AdamW (Loshchilov & Hutter 2019); norms, biases and temperatures are never decayed."""

    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    beta1: Fraction = 0.9
    beta2: Fraction = 0.98
    epsilon: Annotated[float, Field(gt=0)] = 1e-8
    warmup_steps: Annotated[int, Field(ge=0)] = 20
    """linear warm-up from 0, then half a cosine down to 0 at the last step"""
    clip_norm: Annotated[float, Field(gt=0)] | None = 1.0
    """largest gradient norm over all parameters; null: no clipping"""


class TrainOptions(Options):
    """Length, batch, precision and what a run writes."""

    out: str
    """the run folder"""
    steps: PositiveInt
    """optimizer steps"""
    global_batch: PositiveInt
    """rows of one loss over all ranks"""
    accumulate: PositiveInt = 1
    """losses whose gradients are averaged into one optimizer step; each sees its own global batch"""
    seed: int = 0
    processes: PositiveInt | None = None
    """how many ranks this run must have; a launcher that started another number is refused"""
    precision: Literal["fp32", "bf16"] = "fp32"
    threads: PositiveInt | None = None
    """torch threads per rank on a CPU; null: the cores of a rank, less one where workers decode beside it"""
    log_every: PositiveInt = 10
    checkpoint_every: PositiveInt = 100
    keep_checkpoints: PositiveInt = 2
    trackers: tuple[str, ...] = ()
    """names of Accelerate trackers: tensorboard, wandb, trackio, …"""
    optimizer: OptimizerOptions = OptimizerOptions()


class EvaluateOptions(Options):
    """How shards are embedded for retrieval."""

    clips: PositiveInt = 1
    """evenly spaced windows of a sample whose embeddings are averaged"""
    batch: PositiveInt = 64


class RunConfig(Options):
    """A run, whole."""

    model: ModelOptions
    objectives: Annotated[tuple[ObjectiveOptions, ...], Field(min_length=1)]
    data: DataOptions
    train: TrainOptions
    evaluate: EvaluateOptions = EvaluateOptions()

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


def build_model(config: RunConfig) -> tuple[MultimodalModel, ObjectiveMix]:
    """The model and its objectives, freshly initialised from torch's random state."""
    model = MultimodalModel(config.model)
    towers = model.tower_infos()
    objectives, weights = {}, {}
    for number, options in enumerate(config.objectives):
        name = options.name if options.name not in objectives else f"{options.name}_{number}"
        objectives[name] = OBJECTIVES[options.name].build(options, towers, path=f"objectives.{number}")
        weights[name] = options.weight
    mix = ObjectiveMix(objectives, weights)
    model.add_scales(mix.scales)
    model.freeze_unused(mix.needs)
    model.load_weights()
    return model, mix


def json_schema() -> dict[str, Any]:
    """The JSON schema of a configuration file, for editors."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **RunConfig.model_json_schema()}
