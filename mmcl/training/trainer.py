"""One training run, from configuration to the last checkpoint; reads top to bottom."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from mmcl.config import to_yaml
from mmcl.data import ClipStream
from mmcl.data.collate import holes
from mmcl.data.health import SkipLimits, read_quarantine
from mmcl.distributed import Comm
from mmcl.distributed.sharded import FOLDER, read_sharded
from mmcl.encoders.pretrained import Source
from mmcl.folders import AVERAGE
from mmcl.media.augment import augment
from mmcl.media.mixing import mix
from mmcl.objectives.base import Term
from mmcl.progress import show_progress
from mmcl.recipe import RunConfig, build_model
from mmcl.shards.sequential import open_shards
from mmcl.training import checkpoint as ckpt
from mmcl.training.average import WeightAverage
from mmcl.training.during import Evaluator
from mmcl.training.grad_cache import cached_backward, check_cacheable
from mmcl.training.large_batch import describe_split
from mmcl.training.layout import channels_last
from mmcl.training.logbook import Logbook
from mmcl.training.loss_scale import LossScale
from mmcl.training.meter import Meter, mean_term
from mmcl.training.momentum import advance, momentum_at
from mmcl.training.nonfinite import NonFiniteLimit, describe_step, total_norm, write_step
from mmcl.training.optim import build_optimizer, learning_rate_factor, set_learning_rate
from mmcl.training.prefetch import on_device
from mmcl.training.processes import is_sharded, zero_stage
from mmcl.training.profiling import StepProfile
from mmcl.training.run_folder import RunFolder
from mmcl.training.saving import Saver
from mmcl.training.sharding import average_whole_gradients, load_state_tensors, shard, state_tensors
from mmcl.training.signals import StopRequest
from mmcl.training.snapshot import OPTIMIZER, Progress, Snapshot, counters, host_copy, load_random_state, random_state
from mmcl.training.soundness import SilenceWatch, check_labels, check_pools, not_finite
from mmcl.training.spans import span
from mmcl.training.step import TrainStep
from mmcl.training.watching import embedding_figures, gradient_norms
from mmcl.training.zero import ZeroOptimizer
from mmcl.types import Batch, ConfigError, View


class Trainer:
    """Builds everything that a run needs and runs it.

    The loader stays out of ``Accelerator.prepare``: the stream is already split by rank, and ``prepare`` would split it
    again (half of the samples would never be read, without a warning).
    """

    def __init__(
        self,
        config: RunConfig,
        accelerator: Accelerator,
        *,
        pretrained: Mapping[str, Source] | None = None,
        fresh: bool = True,
    ) -> None:
        """``pretrained`` and ``fresh``: as :func:`~mmcl.recipe.build_model` takes them."""
        self.config, self.accelerator = config, accelerator
        self.comm = Comm.current()
        describe_split(config.train, self.comm.world_size)  # refuses what does not divide, before anything is built
        torch.manual_seed(config.train.seed)
        self.model, self.mix = build_model(config, pretrained=pretrained, fresh=fresh)
        check_labels(config, self.mix)
        check_pools(config, self.mix)
        self.views = tuple(dict.fromkeys(need.view for need in self.mix.needs))
        self.stream = build_stream(config, self.views, self.comm)
        self.step = step = TrainStep(self.model, self.mix)
        if config.train.micro_batch is not None:
            check_cacheable(step)
        if config.train.channels_last:
            channels_last(step)
        self.sharded = is_sharded(config, os.environ) and self.comm.world_size > 1
        if self.sharded and config.train.micro_batch is not None:
            raise ConfigError("train.micro_batch: the gradient cache replays whole towers, train.sharding splits them")
        if self.sharded and config.train.ema is not None:
            raise ConfigError("train.ema: keeps the weights as a whole, train.sharding splits them")
        stage = zero_stage(os.environ) if self.comm.world_size > 1 else None
        reduced = self.sharded or stage is not None  # its gradients, by what splits them
        self.step_module: nn.Module = step.to(accelerator.device) if reduced else accelerator.prepare_model(step)
        if self.sharded:
            shard(step, accelerator.device)
        self.optimizer = build_optimizer(self.step_module, config.train.optimizer)
        if stage is not None:
            self.optimizer = ZeroOptimizer(step, self.optimizer, stage, config.train)
        self.average = None if config.train.ema is None else WeightAverage(self.model, config.train.ema)
        self.loss_scale = LossScale(accelerator.scaler)
        self.evaluator = Evaluator(config, self.comm, sharded=self.sharded)
        self.progress = Progress()
        self._rows = config.train.global_batch * config.train.accumulate
        limit = config.train.nonfinite_limit if config.train.nonfinite == "skip" else 0
        self._nonfinite = NonFiniteLimit(limit)
        self._silence = SilenceWatch({name: objective.watched for name, objective in self.mix.each().items()})
        self.logbook = Logbook(config, accelerator, self.comm, self._silence)

    def fit(self, folder: RunFolder, stop: StopRequest, *, resume: Path | None, profiled: bool = False) -> Progress:
        """Trains to the last step, or until ``stop`` is asked for, and saves; ``resume`` is what was loaded.

        Raises:
            RunError: a loss or gradient that is not finite, too many bad samples, a last checkpoint not written.
        """
        options = self.config.train
        self.stream.quarantine_file = folder.quarantine
        self.stream.add_quarantine(read_quarantine(folder.quarantine))
        self._share_quarantine()
        folder.rewind(step=self.progress.step, samples=self.progress.samples)
        self._settle_reducer()
        torch.manual_seed(options.seed + 1 + self.comm.rank)
        if resume is not None:
            load_random_state(resume, self.comm.rank)
        limits = SkipLimits(in_a_row=self.config.data.max_skipped_in_a_row, rate=self.config.data.max_skipped_rate)
        meter = Meter()
        quiet = not self.accelerator.is_main_process
        with (
            Saver(folder, options, self.comm, sharded=self.sharded) as saver,
            show_progress("training", "steps", quiet=quiet, plain=False) as show,
            StepProfile(folder.path, self.step, wanted=profiled and not quiet) as profile,
        ):
            batches = meter.timed(on_device(iter(self.stream), self.accelerator.device))
            while self.progress.step < options.steps:
                number = self.progress.step + 1
                last, evaluating = number == options.steps, self.evaluator.due(number)
                self.step.watching = last or evaluating or number % options.log_every == 0
                step_batches = [next(batches) for _ in range(options.accumulate)]
                for batch in step_batches:
                    limits.watch(batch)
                figures = self.optimizer_step(step_batches)
                meter.count(step_batches)
                self.progress.step = number
                self.progress.samples += self._rows
                show(number, options.steps, meter.note)
                evaluated = self._evaluate(meter) if evaluating else {}
                stopping, due = self.comm.any_of([stop.requested, saver.due(number, evaluated)])
                if self.step.watching or stopping:
                    with span("logging"):
                        self._log(folder, meter, {**figures, **evaluated})
                if last or stopping or due:
                    with span("checkpoint"):
                        saver.wait()  # before the next is copied: one at a time in memory
                        saver.save(self.snapshot(), last=last or stopping)
                profile.next_step()
                if stopping:
                    break
        return self.progress

    def optimizer_step(self, batches: list[Batch]) -> dict[str, Tensor | float]:
        """One optimizer step on ``accumulate`` batches; objectives commit after it. Returns what is to be logged."""
        options, number = self.config.train, self.progress.step
        factor = learning_rate_factor(number, options.optimizer, steps=options.steps, samples_per_step=self._rows)
        set_learning_rate(self.optimizer, options.optimizer.learning_rate * factor)
        terms = []
        for part, batch in enumerate(batches):
            with span("augmentation"):
                moved = self._moved(batch)
            if part < len(batches) - 1:
                with self.accelerator.no_sync(self.step_module):
                    terms.append(self._backward(moved, len(batches)))
            else:
                terms.append(self._backward(moved, len(batches)))
        with span("optimizer"):
            grad_norm, norms = self._gradients()
            if self.loss_scale.overflowed(grad_norm):
                self.progress.overflowed += 1
            elif self._all_finite(terms, grad_norm, batches):
                self.loss_scale.step(self.optimizer)
                for term in terms:
                    self.mix.commit(term.pending)
                momentum = momentum_at(number, options.steps, options.momentum)
                advance(self.model.ema_pairs() + self.mix.ema_pairs(), momentum)
                if self.average is not None:
                    self.average.advance(number)
                self._silence.watch(mean_term(terms))
            self.loss_scale.update()
            self.optimizer.zero_grad(set_to_none=True)
        term = mean_term(terms)
        return {
            "loss": term.loss.detach(),
            **term.metrics,
            "grad_norm": grad_norm,
            **norms,
            "learning_rate": options.optimizer.learning_rate * factor,
        }

    def _gradients(self) -> tuple[Tensor, dict[str, float]]:
        """Reduces and clips them; their norm, and in steps that are watched that of each tower."""
        if isinstance(self.optimizer, ZeroOptimizer):  # clips in its step
            norm = self.optimizer.gradient_norm(whole=self.step.watching)
            return norm, gradient_norms(self.model) if self.step.watching else {}
        if self.sharded:
            average_whole_gradients(self.step_module)
        self.loss_scale.unscale(self.optimizer)
        norms = gradient_norms(self.model) if self.step.watching else {}
        learning = [p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = total_norm([p.grad for p in learning if p.grad is not None])
        if self.config.train.optimizer.clip_norm is not None:
            nn.utils.clip_grads_with_norm_(learning, self.config.train.optimizer.clip_norm, norm)
        return norm, norms

    def _moved(self, batch: Batch) -> Batch:
        """The batch on the training device, augmented there: models see no batch that has not gone through here."""
        moved = augment(batch.to(self.accelerator.device))
        return mix(moved, seed=self.config.train.seed, exchange=self.comm)

    def _backward(self, batch: Batch, parts: int) -> Term:
        micro_batch = self.config.train.micro_batch
        if micro_batch is not None and micro_batch < len(batch):
            with span("gradient cache"):
                return cached_backward(
                    self.step_module,
                    batch,
                    micro_batch=micro_batch,
                    parts=parts,
                    optimizer_step=self.progress.step,
                    no_sync=lambda: self.accelerator.no_sync(self.step_module),
                    autocast=self.accelerator.autocast,
                    scaled=self.loss_scale,
                )
        with self.accelerator.autocast():
            term: Term = self.step_module(batch, optimizer_step=self.progress.step)
        with span("backward"):
            if isinstance(self.optimizer, ZeroOptimizer):
                self.optimizer.backward(term.loss / parts, parts)
            else:
                torch.autograd.backward(self.loss_scale(term.loss / parts))
        return term

    def _all_finite(self, terms: list[Term], grad_norm: Tensor, batches: list[Batch]) -> bool:
        """Whether this step may be taken, agreed by all ranks; what is wrong with it is written down.

        Raises:
            RunError: it may not, and the run stops at that.
        """
        step, module = self.progress.step + 1, self.step_module
        wrong = not_finite(terms, grad_norm, self.mix.objectives, module.named_parameters())
        if not self.comm.any(bool(wrong)):
            self._nonfinite.finite()
            return True
        record = describe_step(terms, grad_norm, module.named_parameters(), batches, self.comm)
        if self.accelerator.is_main_process:
            write_step(Path(self.config.train.out), step, {"what": wrong, **record})
        self._nonfinite.not_finite(step, wrong or "on another rank", record["keys"])
        self.progress.nonfinite += 1
        return False

    def _settle_reducer(self) -> None:
        """One discarded forward and backward on a batch of holes.

        DDP rebuilds its buckets after the first backward, which changes the order of summation on three ranks and more.
        When every start makes the same discarded pass, a resumed run is bitwise the uninterrupted one.
        """
        buffers = {name: value.clone() for name, value in self.step_module.named_buffers()}
        rows = self.config.train.global_batch // self.comm.world_size
        self._backward(self._moved(holes(rows, self.views, blank=self.stream.plan.maker.blank)), 1)
        self.optimizer.zero_grad(set_to_none=True)
        for name, value in self.step_module.named_buffers():
            value.copy_(buffers[name])

    def _share_quarantine(self) -> None:
        """What stopped a worker of one rank is a hole on all."""
        for keys in self.comm.gather_objects(sorted(self.stream.quarantine)):
            self.stream.add_quarantine(keys)

    def _evaluate(self, meter: Meter) -> dict[str, float]:
        """``eval/…``; nothing where it would take too much time."""
        start = time.perf_counter()
        found: dict[str, float] = {}
        if self.evaluator.affordable(meter.samples_per_second(self._rows)):
            with span("evaluation"):
                found = self.evaluator.figures(self.model, self.average)
        meter.leave_out(time.perf_counter() - start)
        return found

    def _log(self, folder: RunFolder, meter: Meter, figures: Mapping[str, Tensor | float]) -> None:
        self._share_quarantine()
        seen, self.step.seen = self.step.seen, None
        if seen is not None:
            figures = {**figures, **embedding_figures(seen, self.comm)}
        told = {**figures, **self._temperatures()}
        self.logbook.write(
            folder, meter, self.progress, {name: float(value) for name, value in told.items()}, self.stream.epochs
        )

    def _temperatures(self) -> dict[str, float]:
        """τ = 1 / scale of each pair, and their mean."""
        each = {name: float(scale.detach().reciprocal()) for name, scale in self.model.scales().items()}
        if not each:
            return {}
        return {"temperature": sum(each.values()) / len(each), **{f"temperature/{k}": v for k, v in each.items()}}

    def snapshot(self) -> Snapshot:
        """A copy of all that a checkpoint holds; every rank hands in its random state."""
        self._share_quarantine()
        random = {
            name: self.comm.gather(value[None].to(self.accelerator.device)).cpu()
            for name, value in random_state().items()
        }
        state = counters(
            self.progress,
            self.stream.state_dict(),
            self.logbook.last,
            self.comm.world_size,
            self.loss_scale.state_dict(),
        )
        common = (self.progress.step, to_yaml(self.config), state, self.model.told())
        if self.sharded:
            tensors = host_copy(state_tensors(self.step_module, self.optimizer))
            return Snapshot(*common, {"random": random}, sharded=tensors)
        optimizer = self.optimizer.state_dict()  # on every rank, which may hold a part of it
        if not self.accelerator.is_main_process:
            return Snapshot(*common, {})
        tensors = {name: host_copy(module.state_dict()) for name, module in self._saved_modules().items()}
        if self.average is not None:
            tensors[AVERAGE] = host_copy(self.average.values)
        return Snapshot(*common, {**tensors, "random": random}, host_copy(optimizer))

    def _saved_modules(self) -> dict[str, nn.Module]:
        """What is saved and taken up as ``NAME.safetensors``."""
        return {"model": self.model, "objectives": self.mix}

    def load(self, source: Path) -> None:
        """Takes up weights, optimizer, objectives and position of a checkpoint.

        Raises:
            ConfigError: the checkpoint belongs to another model, order or batch, or is past the last step.
            RunError: it is damaged.
        """
        state = ckpt.read_state(source)
        if state["progress"]["step"] > self.config.train.steps:
            raise ConfigError(
                f"train.steps: {self.config.train.steps}, but {source} has taken {state['progress']['step']} already"
            )
        try:
            if (source / FOLDER).is_dir():
                if isinstance(self.optimizer, ZeroOptimizer):
                    raise ValueError("it is split over ranks; go on with FSDP2, or on one process")
                tensors = state_tensors(self.step_module, self.optimizer)
                read_sharded(source / FOLDER, tensors, alone=not self.sharded)
                load_state_tensors(self.step_module, self.optimizer, tensors)
            elif self.sharded:
                raise ValueError("it is not split over ranks; go on with train.sharding=none")
            else:
                for name, module in self._saved_modules().items():
                    module.load_state_dict(ckpt.load_tensors(source / f"{name}.safetensors"))
                self.optimizer.load_state_dict(ckpt.load_optimizer(source / OPTIMIZER))
                if self.average is not None and (source / AVERAGE).is_dir():  # --allow train.ema: it begins here
                    self.average.load(ckpt.load_tensors(source / AVERAGE / "model.safetensors"))
        except (RuntimeError, ValueError) as error:
            first = " ".join(str(error).split())
            raise ConfigError(f"--resume: {source} does not fit this configuration: {first[:300]}") from None
        self.stream.load_state_dict(state["stream"])
        self.loss_scale.load_state_dict(state.get("loss_scale", {}))
        self.progress, self.logbook.last = Progress(**state["progress"]), state.get("metrics", {})


def build_stream(config: RunConfig, views: tuple[View, ...], comm: Comm) -> ClipStream:
    """The stream of this rank, as the configuration says."""
    data = config.data
    return ClipStream(
        [
            (open_shards(shards, allow_pipe=data.allow_pipe, remote=data.remote), weight)
            for shards, weight in data.weighted
        ],
        views,
        global_batch=config.train.global_batch,
        seed=config.train.seed,
        rank=comm.rank,
        world_size=comm.world_size,
        workers=data.workers,
        streams=data.streams,
        block=data.block,
        clusters=data.pseudo_labels,
        mixed_clusters=data.cluster_batches == "mixed",
        resampled=data.resampled,
        samples_per_epoch=data.samples_per_epoch,
        decoder=data.decoder,
        short=data.short,
        sampling=data.sampling,
        augmentations=data.augmentations,
        in_process=data.in_process,
        timeout_seconds=data.timeout_seconds,
        allow_shared_streams=data.allow_shared_streams,
        remote=data.remote,
    )
