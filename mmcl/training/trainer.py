"""One training run, from configuration to the last checkpoint; reads top to bottom."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.tracking import get_available_trackers
from torch import Tensor, nn

import mmcl
from mmcl.config import to_yaml
from mmcl.data import ClipStream
from mmcl.data.collate import holes
from mmcl.data.health import SkipLimits, read_quarantine
from mmcl.distributed import Comm
from mmcl.encoders.pretrained import Source
from mmcl.media.augment import augment
from mmcl.media.mixing import mix
from mmcl.objectives.base import Term
from mmcl.progress import on_terminal, show_progress
from mmcl.recipe import RunConfig, build_model
from mmcl.shards.sequential import open_shards
from mmcl.training import checkpoint as ckpt
from mmcl.training.grad_cache import cached_backward, check_cacheable
from mmcl.training.meter import Meter
from mmcl.training.momentum import advance, momentum_at
from mmcl.training.optim import build_optimizer, learning_rate_factor, set_learning_rate
from mmcl.training.run_folder import RunFolder
from mmcl.training.signals import StopRequest
from mmcl.training.soundness import SilenceWatch, check_labels, not_finite
from mmcl.training.step import TrainStep
from mmcl.types import Batch, ConfigError, RunError, View


@dataclasses.dataclass
class Progress:
    """How far a run is; saved with every checkpoint."""

    step: int = 0
    """optimizer steps taken"""
    samples: int = 0
    """rows drawn, all ranks"""
    skipped: int = 0
    """bad samples among them, all ranks"""
    captions_cut: int = 0
    """captions that were longer than their tower takes, all ranks"""


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
        self.views = tuple(dict.fromkeys(need.view for need in self.mix.needs))
        self.stream = build_stream(config, self.views, self.comm)
        step = TrainStep(self.model, self.mix)
        if config.train.micro_batch is not None:
            check_cacheable(step)
        self.step_module: nn.Module = accelerator.prepare_model(step)
        self.optimizer = build_optimizer(self.step_module, config.train.optimizer)
        self.progress = Progress()
        self._silence = SilenceWatch({name: objective.watched for name, objective in self.mix.each().items()})

    def fit(self, folder: RunFolder, *, resume: Path | None) -> Progress:
        """Trains to the last step, or until a stop is asked for, and saves; ``resume`` is what was loaded.

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
            self._load_random_state(resume)
        limits = SkipLimits(in_a_row=self.config.data.max_skipped_in_a_row, rate=self.config.data.max_skipped_rate)
        meter = Meter()
        quiet = not self.accelerator.is_main_process
        with (
            StopRequest(folder.stop_file) as stop,
            show_progress("training", "steps", quiet=quiet, plain=False) as show,
        ):
            batches = meter.timed(iter(self.stream))
            while self.progress.step < options.steps:
                step_batches = [next(batches) for _ in range(options.accumulate)]
                for batch in step_batches:
                    limits.watch(batch)
                term, grad_norm = self.optimizer_step(step_batches)
                meter.count(step_batches)
                self._silence.watch(term)
                self.progress.step += 1
                self.progress.samples = self.stream.draws
                show(self.progress.step, options.steps, meter.note)
                last = self.progress.step == options.steps
                stopping = self.comm.any(stop.requested)
                if last or stopping or self.progress.step % options.log_every == 0:
                    self._log(folder, meter, term, grad_norm)
                if last or stopping or self.progress.step % options.checkpoint_every == 0:
                    written = self.save(folder)
                    if not written and (last or stopping):
                        raise RunError(f"the checkpoint of step {self.progress.step}, the last one, was not written")
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
        grad_norm = self._clip(options.clip_norm)
        self._check_finite(terms, grad_norm, batches)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        for term in terms:
            self.mix.commit(term.pending)
        momentum = momentum_at(self.progress.step, self.config.train.steps, self.config.train.momentum)
        advance(self.model.ema_pairs() + self.mix.ema_pairs(), momentum)
        return _mean_term(terms), grad_norm

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
        gradients = [p.grad for p in self.step_module.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        if clip_norm is not None:
            nn.utils.clip_grads_with_norm_(
                [p for p in self.step_module.parameters() if p.grad is not None], clip_norm, norm
            )
        return norm

    def _check_finite(self, terms: list[Term], grad_norm: Tensor, batches: list[Batch]) -> None:
        """Loss and averaged gradients are global values: every rank sees the same and stops at the same step."""
        wrong = not_finite(terms, grad_norm, self.mix.objectives, self.step_module.named_parameters())
        if wrong:
            keys = sorted(
                {key for keys in self.comm.gather_objects([k for b in batches for k in b.keys if k]) for key in keys}
            )
            raise RunError(
                f"step {self.progress.step + 1}: not finite: {wrong}; nothing was changed by this step; "
                f"keys of its batch: {', '.join(keys)}"
            )

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
            **self._epochs(),
        }
        if not self.accelerator.is_main_process:
            return
        for line in self._silence.complaints(last=self.progress.step == self.config.train.steps):
            print(line, file=sys.stderr, flush=True)
        if cut and not before:
            print(f"{cut} captions were longer than their tower takes; captions_cut in metrics.jsonl counts them")
        folder.write_metrics(record)
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

    def save(self, folder: RunFolder) -> bool:
        """Writes a checkpoint; every rank hands in its random state, and learns whether it is there."""
        written = True
        self._share_quarantine()
        random = {
            name: self.comm.gather(value[None].to(self.accelerator.device)).cpu()
            for name, value in random_state().items()
        }
        if self.accelerator.is_main_process:
            state = {
                "mmcl": mmcl.__version__,
                "torch": torch.__version__,
                "world_size": self.comm.world_size,
                "progress": dataclasses.asdict(self.progress),
                "stream": self.stream.state_dict(),
            }

            def write(target: Path) -> None:
                (target / "config.yaml").write_text(to_yaml(self.config), encoding="utf-8")
                (target / ckpt.STATE).write_text(json.dumps(state, indent=1))
                self.model.save_pretrained(target)
                ckpt.save_tensors(target / "objectives.safetensors", self.mix.state_dict())
                ckpt.save_optimizer(target / "optimizer.pt", self.optimizer.state_dict())
                ckpt.save_tensors(target / "random.safetensors", random)

            written = folder.checkpoint(self.progress.step, write, keep=self.config.train.keep_checkpoints)
        return self.comm.all_agree(written)

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
            self.model.load_state_dict(ckpt.load_tensors(source / "model.safetensors"))
            self.mix.load_state_dict(ckpt.load_tensors(source / "objectives.safetensors"))
            self.optimizer.load_state_dict(ckpt.load_optimizer(source / "optimizer.pt"))
        except (RuntimeError, ValueError) as error:
            first = " ".join(str(error).split())
            raise ConfigError(f"--resume: {source} does not fit this configuration: {first[:300]}") from None
        self.stream.load_state_dict(state["stream"])
        self.progress = Progress(**state["progress"])

    def _load_random_state(self, source: Path) -> None:
        """One's own random state, or, on more ranks than before, another's."""
        saved = ckpt.load_tensors(source / "random.safetensors")
        # copied: torch crashes on a state that does not start its own memory
        own = {name: states[self.comm.rank % len(states)].clone() for name, states in saved.items()}
        torch.set_rng_state(own["cpu"])
        if "cuda" in own and torch.cuda.is_available():
            torch.cuda.set_rng_state(own["cuda"])


def random_state() -> dict[str, Tensor]:
    """The state of torch's generators on this rank, uint8."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _mean_term(terms: list[Term]) -> Term:
    """Losses and metrics of the parts of one step, averaged, for the log."""
    if len(terms) == 1:
        return terms[0]
    loss = torch.stack([term.loss.detach() for term in terms]).mean()
    metrics: Mapping[str, Tensor] = {
        name: torch.stack([term.metrics[name].float() for term in terms]).mean() for name in terms[0].metrics
    }
    return Term(loss, metrics)


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
        decoder=data.decoder,
        short=data.short,
        sampling=data.sampling,
        augmentations=data.augmentations,
        in_process=data.in_process,
        timeout_seconds=data.timeout_seconds,
        allow_shared_streams=data.allow_shared_streams,
        remote=data.remote,
    )


def build_accelerator(config: RunConfig) -> Accelerator:
    """The only place that makes one.

    Raises:
        ConfigError: the launcher started another number of processes than ``train.processes`` asks for.
    """
    precision = "no" if config.train.precision == "fp32" else config.train.precision
    known = [tracker.value for tracker in get_available_trackers()]
    for number, name in enumerate(config.train.trackers):
        if name not in known:
            raise ConfigError(
                f"train.trackers.{number}: {name!r} is unknown or not installed; "
                f"here are: {', '.join(known) or 'none'} (pip install 'mmcl[track]' brings tensorboard)"
            )
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(),
        mixed_precision=precision,
        log_with=list(config.train.trackers) or None,
        project_dir=config.train.out,
        # objectives own queues and statistics that are equal on all ranks by themselves
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )
    wanted = config.train.processes
    if wanted is not None and accelerator.num_processes != wanted:
        raise ConfigError(
            f"train.processes: {wanted} asked for, but {accelerator.num_processes} started; launch with "
            "`accelerate launch --config_file configs/accelerate/…` (`--cpu --num_processes N` starts only one)"
        )
    return accelerator
