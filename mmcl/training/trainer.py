"""One training run, from configuration to the last checkpoint; reads top to bottom."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

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
from mmcl.media.augment import augment
from mmcl.media.mixing import mix
from mmcl.objectives.base import Term
from mmcl.progress import on_terminal, show_progress
from mmcl.recipe import RunConfig, build_model
from mmcl.shards.sequential import open_shards
from mmcl.training import checkpoint as ckpt
from mmcl.training.grad_cache import cached_backward, check_cacheable
from mmcl.training.meter import Meter, mean_term
from mmcl.training.momentum import advance, momentum_at
from mmcl.training.nonfinite import NonFiniteLimit, describe_step, jsonable, total_norm, write_step
from mmcl.training.optim import build_optimizer, learning_rate_factor, set_learning_rate
from mmcl.training.processes import is_sharded
from mmcl.training.run_folder import RunFolder
from mmcl.training.saving import Saver
from mmcl.training.sharding import average_whole_gradients, load_state_tensors, shard, state_tensors
from mmcl.training.signals import StopRequest
from mmcl.training.snapshot import OPTIMIZER, Progress, Snapshot, counters, host_copy, load_random_state, random_state
from mmcl.training.soundness import SilenceWatch, check_labels, check_pools, not_finite
from mmcl.training.step import TrainStep
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
        torch.manual_seed(config.train.seed)
        self.model, self.mix = build_model(config, pretrained=pretrained, fresh=fresh)
        check_labels(config, self.mix)
        check_pools(config, self.mix)
        self.views = tuple(dict.fromkeys(need.view for need in self.mix.needs))
        self.stream = build_stream(config, self.views, self.comm)
        step = TrainStep(self.model, self.mix)
        if config.train.micro_batch is not None:
            check_cacheable(step)
        self.sharded = is_sharded(config, os.environ) and self.comm.world_size > 1
        if self.sharded and config.train.micro_batch is not None:
            raise ConfigError("train.micro_batch: the gradient cache replays whole towers, train.sharding splits them")
        self.step_module: nn.Module = (
            shard(step, accelerator.device) if self.sharded else accelerator.prepare_model(step)
        )
        self.optimizer = build_optimizer(self.step_module, config.train.optimizer)
        self.progress = Progress()
        self._logged: dict[str, Any] = {}
        """what was logged last"""
        limit = config.train.nonfinite_limit if config.train.nonfinite == "skip" else 0
        self._nonfinite = NonFiniteLimit(limit)
        self._silence = SilenceWatch({name: objective.watched for name, objective in self.mix.each().items()})

    def fit(self, folder: RunFolder, stop: StopRequest, *, resume: Path | None) -> Progress:
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
        ):
            batches = meter.timed(iter(self.stream))
            while self.progress.step < options.steps:
                step_batches = [next(batches) for _ in range(options.accumulate)]
                for batch in step_batches:
                    limits.watch(batch)
                term, grad_norm = self.optimizer_step(step_batches)
                meter.count(step_batches)
                self.progress.step += 1
                self.progress.samples = self.stream.draws
                show(self.progress.step, options.steps, meter.note)
                last = self.progress.step == options.steps
                stopping, due = self.comm.any_of([stop.requested, saver.due(self.progress.step)])
                if last or stopping or self.progress.step % options.log_every == 0:
                    self._log(folder, meter, term, grad_norm)
                if last or stopping or due:
                    saver.wait()  # before the next is copied: one at a time in memory
                    saver.save(self.snapshot(), last=last or stopping)
                if stopping:
                    break
        return self.progress

    def optimizer_step(self, batches: list[Batch]) -> tuple[Term, Tensor]:
        """One optimizer step on ``accumulate`` batches; objectives commit after it."""
        options = self.config.train.optimizer
        factor = learning_rate_factor(
            self.progress.step, warmup_steps=options.warmup_steps, steps=self.config.train.steps
        )
        set_learning_rate(self.optimizer, options.learning_rate * factor)
        terms = []
        for number, batch in enumerate(batches):
            moved = self._moved(batch)
            if number < len(batches) - 1:
                with self.accelerator.no_sync(self.step_module):
                    terms.append(self._backward(moved, len(batches)))
            else:
                terms.append(self._backward(moved, len(batches)))
        if self.sharded:
            average_whole_gradients(self.step_module)
        grad_norm = self._clip(options.clip_norm)
        if self._all_finite(terms, grad_norm, batches):
            self.optimizer.step()
            for term in terms:
                self.mix.commit(term.pending)
            momentum = momentum_at(self.progress.step, self.config.train.steps, self.config.train.momentum)
            advance(self.model.ema_pairs() + self.mix.ema_pairs(), momentum)
            self._silence.watch(mean_term(terms))
        self.optimizer.zero_grad(set_to_none=True)
        return mean_term(terms), grad_norm

    def _moved(self, batch: Batch) -> Batch:
        """The batch on the training device, augmented there: models see no batch that has not gone through here."""
        moved = augment(batch.to(self.accelerator.device))
        return mix(moved, seed=self.config.train.seed, exchange=self.comm)

    def _backward(self, batch: Batch, parts: int) -> Term:
        micro_batch = self.config.train.micro_batch
        if micro_batch is not None and micro_batch < len(batch):
            return cached_backward(
                self.step_module,
                batch,
                micro_batch=micro_batch,
                parts=parts,
                optimizer_step=self.progress.step,
                no_sync=lambda: self.accelerator.no_sync(self.step_module),
                autocast=self.accelerator.autocast,
            )
        with self.accelerator.autocast():
            term: Term = self.step_module(batch, optimizer_step=self.progress.step)
        torch.autograd.backward(term.loss / parts)
        return term

    def _clip(self, clip_norm: float | None) -> Tensor:
        learning = [p for p in self.step_module.parameters() if p.grad is not None]
        norm = total_norm([p.grad for p in learning if p.grad is not None])
        if clip_norm is not None:
            nn.utils.clip_grads_with_norm_(learning, clip_norm, norm)
        return norm

    def _all_finite(self, terms: list[Term], grad_norm: Tensor, batches: list[Batch]) -> bool:
        """Whether this step may be taken, agreed by all ranks; what is wrong with it is written down.

        Raises:
            RunError: it may not, and the run stops at that.
        """
        step, named = self.progress.step + 1, list(self.step_module.named_parameters())
        wrong = not_finite(terms, grad_norm, self.mix.objectives, named)
        if not self.comm.any(bool(wrong)):
            self._nonfinite.finite()
            return True
        record = describe_step(terms, grad_norm, named, batches, self.comm)
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

    def _log(self, folder: RunFolder, meter: Meter, term: Term, grad_norm: Tensor) -> None:
        self._share_quarantine()
        skipped = [record for rank in self.comm.gather_objects(meter.take_skipped()) for record in rank]
        self.progress.skipped += len(skipped)
        cut, before = sum(self.comm.gather_objects(meter.take_cut())), self.progress.captions_cut
        self.progress.captions_cut += cut
        record = {
            "step": self.progress.step,
            "samples": self.progress.samples,
            "loss": float(term.loss.detach()),
            **{name: float(value) for name, value in term.metrics.items()},
            **self._temperatures(),
            "grad_norm": float(grad_norm),
            "learning_rate": self.optimizer.param_groups[0]["lr"] / self.optimizer.param_groups[0]["factor"],
            **meter.rates(self.config.train.global_batch * self.config.train.accumulate),
            "skipped": self.progress.skipped,
            "captions_cut": self.progress.captions_cut,
            "nonfinite": self.progress.nonfinite,
            **self._epochs(),
        }
        self._logged = {name: jsonable(value) for name, value in record.items()}
        if not self.accelerator.is_main_process:
            return
        for line in self._silence.complaints(last=self.progress.step == self.config.train.steps):
            print(line, file=sys.stderr, flush=True)
        if cut and not before:
            print(f"{cut} captions were longer than their tower takes; captions_cut in metrics.jsonl counts them")
        folder.write_metrics(self._logged)
        folder.write_skipped(sorted(skipped, key=lambda entry: int(entry["draw"])))
        self.accelerator.log({k: v for k, v in record.items() if k != "step"}, step=self.progress.step)
        meter.note = (
            f"loss {record['loss']:.3f}  {record['samples_per_second']:.0f} samples/s  "
            f"waiting for data {record['data_wait_fraction']:.0%}"
        ) + (f"  skipped {record['skipped']}" if record["skipped"] else "")
        if not on_terminal():
            print(f"step {record['step']}/{self.config.train.steps}  {meter.note}", flush=True)

    def _temperatures(self) -> dict[str, float]:
        """τ = 1 / scale of each pair, and their mean."""
        each = {name: float(scale.detach().reciprocal()) for name, scale in self.model.scales().items()}
        if not each:
            return {}
        return {"temperature": sum(each.values()) / len(each), **{f"temperature/{k}": v for k, v in each.items()}}

    def _epochs(self) -> dict[str, float]:
        """Epochs drawn so far, of each source of a mixture its own."""
        epochs = self.stream.epochs
        return {"epoch": epochs[0]} if len(epochs) == 1 else {f"epoch/{n}": epoch for n, epoch in enumerate(epochs)}

    def snapshot(self) -> Snapshot:
        """A copy of all that a checkpoint holds; every rank hands in its random state."""
        self._share_quarantine()
        random = {
            name: self.comm.gather(value[None].to(self.accelerator.device)).cpu()
            for name, value in random_state().items()
        }
        state = counters(self.progress, self.stream.state_dict(), self._logged, self.comm.world_size)
        common = (self.progress.step, to_yaml(self.config), state, self.model.told())
        if self.sharded:
            tensors = host_copy(state_tensors(self.step_module, self.optimizer))
            return Snapshot(*common, {"random": random}, sharded=tensors)
        if not self.accelerator.is_main_process:
            return Snapshot(*common, {})
        tensors = {name: host_copy(module.state_dict()) for name, module in self._saved_modules().items()}
        return Snapshot(*common, {**tensors, "random": random}, host_copy(self.optimizer.state_dict()))

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
                tensors = state_tensors(self.step_module, self.optimizer)
                read_sharded(source / FOLDER, tensors, alone=not self.sharded)
                load_state_tensors(self.step_module, self.optimizer, tensors)
            elif self.sharded:
                raise ValueError("it is not split over ranks; go on with train.sharding=none")
            else:
                for name, module in self._saved_modules().items():
                    module.load_state_dict(ckpt.load_tensors(source / f"{name}.safetensors"))
                self.optimizer.load_state_dict(ckpt.load_optimizer(source / OPTIMIZER))
        except (RuntimeError, ValueError) as error:
            first = " ".join(str(error).split())
            raise ConfigError(f"--resume: {source} does not fit this configuration: {first[:300]}") from None
        self.stream.load_state_dict(state["stream"])
        self.progress, self._logged = Progress(**state["progress"]), state.get("metrics", {})


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
        decoder=data.decoder,
        short=data.short,
        sampling=data.sampling,
        augmentations=data.augmentations,
        in_process=data.in_process,
        timeout_seconds=data.timeout_seconds,
        allow_shared_streams=data.allow_shared_streams,
        remote=data.remote,
    )
