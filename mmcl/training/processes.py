"""How the processes of a run were started, and whether that agrees with its configuration."""

from __future__ import annotations

import os
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.tracking import get_available_trackers
from accelerate.utils import InitProcessGroupKwargs, patch_environment

from mmcl.recipe import RunConfig, TrainOptions
from mmcl.training.changes import flat
from mmcl.training.loss_scale import set_tf32
from mmcl.types import ConfigError

_DEEPSPEED, _ZERO_STAGE = "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_DEEPSPEED_ZERO_STAGE"


def check_launch(config: RunConfig, environment: Mapping[str, str]) -> None:
    """Refuses a launcher that says something else than the configuration.

    "no" of a launcher is also what it says of what it was not asked, so that alone contradicts nothing.

    Raises:
        ConfigError: names both values, and what to change.
    """
    train = config.train
    started = int(environment.get("WORLD_SIZE", "1"))
    if train.processes is not None and started != train.processes:
        raise ConfigError(
            f"train.processes: {train.processes} asked for, but {started} started; launch with "
            "`accelerate launch --config_file configs/accelerate/…` (`--cpu --num_processes N` starts only one)"
        )
    precision = environment.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision not in ("no", train.precision):
        raise ConfigError(
            f"train.precision: {train.precision}, but the launcher says mixed_precision={precision} "
            "(ACCELERATE_MIXED_PRECISION); set one as the other, or mixed_precision: 'no' there"
        )
    parts = environment.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if parts not in ("1", "auto", str(train.accumulate)):
        raise ConfigError(
            f"train.accumulate: {train.accumulate}, but the launcher says gradient_accumulation_steps={parts} "
            "(ACCELERATE_GRADIENT_ACCUMULATION_STEPS)"
        )
    compiler = environment.get("ACCELERATE_DYNAMO_BACKEND", "no").lower()
    if compiler not in ("no", ""):
        raise ConfigError(
            f"the launcher says dynamo_backend={compiler} (ACCELERATE_DYNAMO_BACKEND), but a run compiles only what "
            "its configuration names; set dynamo_backend: 'no' there"
        )
    if _says(environment, _DEEPSPEED):
        _check_deepspeed(train, environment)
    if _says(environment, "ACCELERATE_USE_FSDP"):
        version = environment.get("FSDP_VERSION", "1")
        if train.sharding == "none" or version != "2":
            raise ConfigError(
                f"train.sharding: {train.sharding or 'fsdp2'}, but the launcher says FSDP version {version} "
                "(ACCELERATE_USE_FSDP, FSDP_VERSION); leave train.sharding out and set fsdp_version: 2 there, or take "
                "another launch file"
            )


def _check_deepspeed(train: TrainOptions, environment: Mapping[str, str]) -> None:
    """Refuses what DeepSpeed is told to do and a run does not, and what a run does not do under it."""
    stage = environment.get(_ZERO_STAGE, "2")
    if stage not in ("1", "2"):
        other = "fsdp2_8.yaml splits weights too" if stage == "3" else "gpu_8.yaml splits nothing"
        raise ConfigError(
            f"the launcher says zero_stage={stage} ({_ZERO_STAGE}), but a run knows 1 and 2; configs/accelerate/{other}"
        )
    for name in ("OPTIMIZER", "PARAM"):
        device = environment.get(f"ACCELERATE_DEEPSPEED_OFFLOAD_{name}_DEVICE", "none")
        if device != "none":
            raise ConfigError(f"the launcher says offload_{name.lower()}_device={device}, but a run knows none alone")
    file = environment.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    if file.lower() not in ("none", ""):
        raise ConfigError(
            f"the launcher says deepspeed_config_file={file}, which is not read; zero_stage is all that a run is told"
        )
    clip = environment.get("ACCELERATE_GRADIENT_CLIPPING", "none")
    if clip != "none" and float(clip) != train.optimizer.clip_norm:
        raise ConfigError(
            f"train.optimizer.clip_norm: {train.optimizer.clip_norm}, but the launcher says gradient_clipping={clip} "
            "(ACCELERATE_GRADIENT_CLIPPING); leave it out there"
        )
    if train.sharding is not None:
        raise ConfigError(
            f"train.sharding: {train.sharding}, but the launcher says DeepSpeed (ACCELERATE_USE_DEEPSPEED); leave "
            "train.sharding out, or take another launch file"
        )
    told = {
        "precision: fp16": (train.precision == "fp16", "scales losses; take bf16 or fp32"),
        f"micro_batch: {train.micro_batch}": (
            train.micro_batch is not None,
            "runs several backwards into one gradient; set it to null or take another launch file",
        ),
        "channels_last: true": (train.channels_last, "lays out weights that DeepSpeed lays out anew; set it to false"),
        f"optimizer: {train.optimizer.name}": (
            train.optimizer.name == "lars",
            "looks at whole matrices, of which a rank holds parts; take adamw or sgd",
        ),
    }
    for option, (taken, why) in told.items():
        if taken:
            raise ConfigError(f"train.{option} {why} (the launcher says DeepSpeed)")


def zero_stage(environment: Mapping[str, str]) -> int | None:
    """Of DeepSpeed's ZeRO, as the launcher says; None where it does not say DeepSpeed."""
    return int(environment.get(_ZERO_STAGE, "2")) if _says(environment, _DEEPSPEED) else None


def begin_tracking(accelerator: Accelerator, config: RunConfig) -> None:
    """Tells the trackers of a run's configuration; what they write on this computer goes into the run folder."""
    told = {key: value for key, value in flat(config.model_dump(mode="json")).items() if value is not None}
    folder = Path(config.train.out)
    accelerator.init_trackers(
        "mmcl",
        config=told,
        init_kwargs={"wandb": {"dir": str(folder), "name": folder.name}, "trackio": {"name": folder.name}},
    )


def is_sharded(config: RunConfig, environment: Mapping[str, str]) -> bool:
    """Whether weights are split over ranks: as the configuration says, or, where it says nothing, the launcher."""
    if config.train.sharding is None:
        return _says(environment, "ACCELERATE_USE_FSDP")
    return config.train.sharding == "fsdp2"


def _says(environment: Mapping[str, str], name: str) -> bool:
    return environment.get(name, "false").lower() in ("true", "1", "yes")


def build_accelerator(config: RunConfig) -> Accelerator:
    """The only place that makes one.

    Raises:
        ConfigError: the launcher contradicts the configuration, or a tracker is unknown.
    """
    check_launch(config, os.environ)
    if config.train.precision == "fp16":
        if not torch.cuda.is_available():
            raise ConfigError("train.precision: fp16 needs a GPU, and there is none here; take bf16 or fp32")
        if is_sharded(config, os.environ):
            raise ConfigError("train.precision: fp16 scales losses, which train.sharding cannot; take bf16")
    set_tf32(config.train.tf32)
    precision = "no" if config.train.precision == "fp32" else config.train.precision
    known = [tracker.value for tracker in get_available_trackers()]
    for number, name in enumerate(config.train.trackers):
        if name not in known:
            raise ConfigError(
                f"train.trackers.{number}: {name!r} is unknown or not installed; "
                f"here are: {', '.join(known) or 'none'} (pip install 'mmcl[track]' brings tensorboard)"
            )
    # of DeepSpeed a run takes the optimizer alone (mmcl.training.zero), and nothing through accelerate
    with patch_environment(**{_DEEPSPEED: "false"}):
        return Accelerator(
            cpu=not torch.cuda.is_available(),
            mixed_precision=precision,
            log_with=list(config.train.trackers) or None,
            project_dir=config.train.out,
            kwargs_handlers=[
                # objectives own queues and statistics that are equal on all ranks by themselves
                DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True),
                InitProcessGroupKwargs(timeout=timedelta(seconds=config.train.timeout_seconds)),
            ],
        )
