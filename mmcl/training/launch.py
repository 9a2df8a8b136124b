"""What `mmcl train` and `pipelines/pretrain.py` run in every process."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TypeVar

import torch
from accelerate import Accelerator

from mmcl.config import to_yaml
from mmcl.distributed import Comm
from mmcl.encoders.pretrained import Source
from mmcl.model import parameter_counts
from mmcl.recipe import RunConfig, build_model
from mmcl.shards.sequential import describe_order
from mmcl.training.changes import check_unchanged, flat
from mmcl.training.checkpoint import read_state
from mmcl.training.peers import Peers
from mmcl.training.processes import build_accelerator
from mmcl.training.run_folder import RunFolder
from mmcl.training.signals import StopRequest
from mmcl.training.soundness import check_labels, check_pools, remarks
from mmcl.training.trainer import Trainer, build_stream
from mmcl.types import Batch, MmclError, RunError

T = TypeVar("T")


def pretrain(
    config: RunConfig,
    *,
    resume: str | None = None,
    allow: Sequence[str] = (),
    pretrained: Mapping[str, Source] | None = None,
) -> bool:
    """Trains; on one process or as one rank of many.

    Args:
        config: the run.
        resume: None starts a new run; ``"auto"`` goes on from the newest complete checkpoint of the run folder, or
            starts; a path goes on from that checkpoint.
        allow: dotted keys of the configuration that may differ from that of the checkpoint.
        pretrained: tower: what gives its first weights instead of what the configuration says, such as a function.

    Returns:
        Whether the last step was reached; False after a stop that was asked for.

    Raises:
        ConfigError: a wrong configuration, a folder that already holds a run, a checkpoint that does not fit.
        RunError: the run cannot go on.
    """
    with StopRequest(Path(config.train.out) / "stop") as stop, training_processes(config) as accelerator:
        return train(config, accelerator, stop, resume=resume, allow=allow, pretrained=pretrained)


@contextmanager
def training_processes(config: RunConfig) -> Iterator[Accelerator]:
    """This process as one of those that a launcher started, for one run or several after each other.

    Raises:
        ConfigError: the launcher contradicts the configuration.
    """
    _ignore_harmless_warnings()
    accelerator = build_accelerator(config)
    if not torch.cuda.is_available():
        torch.set_num_threads(
            config.train.threads or spare_threads(config, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        )
    try:
        with Peers(Comm.current(), config.train.timeout_seconds):
            yield accelerator
    finally:
        # without this a process group sometimes aborts at exit and the launcher reports a failure
        accelerator.end_training()


def train(
    config: RunConfig,
    accelerator: Accelerator,
    stop: StopRequest,
    *,
    resume: str | None = None,
    allow: Sequence[str] = (),
    pretrained: Mapping[str, Source] | None = None,
) -> bool:
    """:func:`pretrain` within :func:`training_processes`."""
    with ExitStack() as stack:
        folder = RunFolder(Path(config.train.out), writer=accelerator.is_main_process)
        source = together(lambda: stack.enter_context(folder).resume_from(resume))
        changes = [] if source is None else together(lambda: check_unchanged(source, config, allow))
        trainer = Trainer(config, accelerator, pretrained=pretrained, fresh=source is None)
        if source is not None:
            trainer.load(source)
        if accelerator.is_main_process:
            folder.write_config(to_yaml(config))
            print(_headline(trainer), flush=True)
            if source is not None:
                print(_going_on(source, trainer.comm.world_size, changes), flush=True)
        if config.train.trackers:
            accelerator.init_trackers("mmcl", config=flat(config.model_dump(mode="json")))
        progress = trainer.fit(folder, stop, resume=source)
        finished = progress.step >= config.train.steps
        if not finished and accelerator.is_main_process:
            print(f"stopped after step {progress.step} of {config.train.steps}; --resume auto goes on", flush=True)
        return finished


def _ignore_harmless_warnings() -> None:
    """Two that every rank would print in every run."""
    # its successor synchronises buffers once, at the start, which here would be as good; accelerate does not know it
    warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
    # axes of length 1 may have any stride
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides", UserWarning)


def together(look: Callable[[], T]) -> T:
    """Calls ``look`` on every rank; where it fails on one, all raise, and none waits for a rank that is gone."""
    found, problem = [], None
    try:
        found.append(look())
    except MmclError as error:
        problem = error
    said = [text for text in Comm.current().gather_objects(str(problem) if problem else None) if text]
    if problem is not None:
        raise problem
    if said:
        raise RunError(said[0])
    return found[0]


def spare_threads(config: RunConfig, ranks: int) -> int:
    """Cores of one rank, less one where workers decode beside it.

    More threads than free cores do not share them, they wait for each other by spinning: measured, a step then takes
    up to a hundred times as long.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    decoding = 0 if config.data.in_process else 1
    return max(1, cores // max(ranks, 1) - decoding)


def _headline(trainer: Trainer) -> str:
    stream, config = trainer.stream, trainer.config
    tars = stream.plan.tars
    lines = [
        (f"{stream.num_samples:,} samples" if tars is None else "samples that nobody has counted")
        + f" in {stream.num_shards:,} shards, "
        f"{parameter_counts(trainer.model)['total']:,} parameters, {config.train.steps:,} steps of "
        f"{config.train.global_batch} on {trainer.comm.world_size} process(es) ({trainer.accelerator.device.type}) "
        f"with {stream.workers} decoding worker(s)"
    ]
    if stream.workers != config.data.workers and config.data.workers > 0:
        lines.append(
            f"data.workers lowered from {config.data.workers} to {stream.workers}: it must divide a rank's rows"
        )
    if stream.sharing > 1:
        lines.append(
            f"each of data.streams={stream.plan.streams} streams is read by {stream.sharing} decoding workers: "
            "a multiple of ranks × workers is read by one"
        )
    if tars is not None:
        lines.append(f"warning: {describe_order(tars)}")
    lines += trainer.model.loaded
    lines += [f"warning: {remark}" for remark in remarks(config, trainer.model, trainer.mix)]
    return "\n".join(lines)


def _going_on(source: Path, world_size: int, changes: Sequence[str]) -> str:
    """What a resumed run says of itself: from where, on how many processes, what was let through."""
    state = read_state(source)
    lines = [f"going on from {source}, after step {state['progress']['step']}"]
    if state["world_size"] != world_size:
        lines.append(
            f"it ran on {state['world_size']} process(es), now on {world_size}: the order of samples stays, "
            "sums are rounded otherwise"
        )
    return "\n".join([*lines, *(f"changed: {change}" for change in changes)])


def describe(config: RunConfig) -> str:
    """What a run would do: the resolved configuration, parameter counts, the shapes of its first batch."""
    torch.manual_seed(config.train.seed)
    model, mix = build_model(config)
    check_labels(config, mix)
    check_pools(config, mix)
    views = tuple(dict.fromkeys(need.view for need in mix.needs))
    batch = next(iter(build_stream(config, views, Comm())))
    lines = [to_yaml(config).rstrip(), "", "# parameters that learn"]
    lines += [f"# {name}: {count:,}" for name, count in parameter_counts(model).items()]
    lines += [f"# warning: {remark}" for remark in remarks(config, model, mix)]
    return "\n".join([*lines, "# first batch", *(f"# {line}" for line in batch_lines(batch))])


def batch_lines(batch: Batch) -> list[str]:
    """One line per view: its shape, type and how many rows have it."""
    lines = []
    for view, values in batch.views.items():
        shape = " × ".join(map(str, values.data.shape))
        lines.append(
            f"{view}: {str(values.data.dtype).removeprefix('torch.')} {shape}, {int(values.present.sum())} present"
        )
    for draw, key, reason, detail in batch.skipped:
        lines.append(f"skipped draw {draw} ({key}): {reason} {detail}".rstrip())
    return lines
