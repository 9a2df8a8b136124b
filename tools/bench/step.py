"""What a step costs: the trainer beside a bare PyTorch loop, decoding hidden behind steps, start, checkpoints, memory.

    python tools/bench/step.py --out tools/bench/results/step.json
    python tools/bench/step.py --quick                     # under four minutes

- overhead: one process takes turns, a stretch of steps of the trainer (with its log, its finite checks, its moving
  parts) and one of a bare loop on the same towers, batches in memory, optimizer and clipping, on 1 and on 2 processes.
  At least 0.95 times its steps per second, the median over pairs of neighbouring stretches.
- data: real shards, one decoding worker beside one training thread. Of the time that decoding a batch takes, at least
  90 % hides behind the step, where it is shorter than the step; both cores work.
- start: seconds from the command to the first step of configs/pretrain/demo.yaml, at most 15.
- checkpoint: tools/bench/checkpoint.py; beside the steps it costs at most 5 %.
- memory: of a run with its worker over 2,000 steps, after the first quarter no more than 2 % added.

Exit 1 where a bar is missed; on a machine that others use too, that may be theirs.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
import torch.nn.functional as F
from same_run import ROOT, write_clips
from torch import Tensor, nn
from torch.distributed.nn.functional import all_gather
from torch.nn.parallel import DistributedDataParallel

import mmcl
from mmcl.data import ClipStream
from mmcl.recipe import RunConfig
from mmcl.training.processes import build_accelerator
from mmcl.training.run_folder import RunFolder
from mmcl.training.signals import StopRequest
from mmcl.training.trainer import Trainer
from mmcl.types import Batch

PAIRS = (("video", "text"), ("audio", "text"), ("video", "audio"))
BARS = {"overhead": 0.95, "hidden": 0.9, "start_seconds": 15.0, "checkpoint": 0.05, "growth": 0.02}


def config(shards: Path, out: Path, *more: str) -> RunConfig:
    """The demo's towers and objective on other shards, one thread a rank."""
    options = [f"data.shards={shards}", f"train.out={out}", "train.threads=1", "train.log_every=10", "data.workers=1"]
    return mmcl.load_config(ROOT / "configs/pretrain/demo.yaml", [*options, "train.checkpoint_every=100000", *more])


class Bare(nn.Module):
    """What one would write by hand: towers, projections, one temperature a pair, cross-entropy both ways."""

    def __init__(self, trainer: Trainer) -> None:
        super().__init__()
        model = mmcl.MultimodalModel(trainer.config.model)
        model.load_state_dict(trainer.model.state_dict(), strict=False)
        self.towers, self.heads = model.towers, model.heads
        self.log_scale = nn.Parameter(torch.full((len(PAIRS),), 2.66))
        self.views = {need.tower: need.view for need in trainer.mix.needs}

    def forward(self, batch: Batch) -> Tensor:
        rows = {}
        for name, tower in self.towers.items():
            view = batch.views[self.views[name]]
            rows[name] = F.normalize(self.heads[name](tower(view.data, view.mask).pooled), dim=-1)
        if dist.is_initialized() and dist.get_world_size() > 1:
            rows = {name: torch.cat(all_gather(x)) for name, x in rows.items()}
        target = torch.arange(len(next(iter(rows.values()))))
        losses = []
        for number, (a, b) in enumerate(PAIRS):
            logits = self.log_scale[number].exp() * rows[a] @ rows[b].T
            losses += [F.cross_entropy(logits, target), F.cross_entropy(logits.T, target)]
        return torch.stack(losses).mean()


class BareLoop:
    """Its forward, backward, clipping and AdamW."""

    def __init__(self, trainer: Trainer) -> None:
        bare: nn.Module = Bare(trainer)
        self.step = DistributedDataParallel(bare) if trainer.comm.world_size > 1 else bare
        self.optimizer = torch.optim.AdamW(self.step.parameters(), lr=1e-3, weight_decay=0.1)

    def run(self, batches: list[Batch]) -> None:
        for batch in batches:
            loss = self.step(batch)
            loss.backward()
            nn.utils.clip_grad_norm_(self.step.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            float(loss.detach())  # a loop that shows its loss


class InMemory(ClipStream):
    """Hands out the same batches again and again; between two stretches of them ``pause`` runs."""

    batches: list[Batch]
    stretch: int
    pause: Callable[[], None]

    def __iter__(self) -> Iterator[Batch]:
        number = 0
        while True:
            if number % self.stretch == 0:
                self.pause()
            self.draws += self.plan.global_batch
            yield self.batches[number % len(self.batches)]
            number += 1


class Clock:
    """Wall and CPU seconds of the trainer's stretches and of the bare loop's between them."""

    def __init__(self, loop: BareLoop, batches: list[Batch], stretch: int) -> None:
        self.loop = loop
        self.batches = [batches[number % len(batches)] for number in range(stretch)]
        self.ours: list[tuple[float, float]] = []
        self.bare: list[tuple[float, float]] = []
        self._since: tuple[float, float] | None = None

    def pause(self) -> None:
        now = time.perf_counter(), time.process_time()
        if self._since is not None:
            self.ours.append((now[0] - self._since[0], now[1] - self._since[1]))
        self.loop.run(self.batches)
        end = time.perf_counter(), time.process_time()
        self.bare.append((end[0] - now[0], end[1] - now[1]))
        self._since = end


def complete(batches: Iterator[Batch], rows: int, count: int) -> list[Batch]:
    """Batches in which every row has everything."""
    found = []
    for batch in batches:
        if all(bool(view.present.all()) for view in batch.views.values()) and len(batch) == rows:
            found.append(batch)
        if len(found) == count:
            return found
    raise AssertionError("a stream has no end")


def as_rank(work: Path, pairs: int, stretch: int, batch: int) -> None:
    """The overhead, in one process or as one rank of two."""
    torch.set_num_threads(1)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    steps = f"train.steps={(pairs + 2) * stretch}"
    run = config(work / "shards", work / f"run_{world}", steps, f"train.global_batch={batch}", "data.in_process=true")
    accelerator = build_accelerator(run)
    try:
        trainer = Trainer(run, accelerator)
        batches = complete(iter(trainer.stream), batch // world, 2)
        trainer.stream.draws = 0
        clock = Clock(BareLoop(trainer), batches, stretch)
        stream = trainer.stream
        stream.__class__ = InMemory
        stream.batches, stream.stretch, stream.pause = batches, stretch, clock.pause  # type: ignore[attr-defined]
        with (
            StopRequest(work / "stop") as stop,
            RunFolder(Path(run.train.out), writer=trainer.comm.rank == 0) as folder,
        ):
            trainer.fit(folder, stop, resume=None)
        if trainer.comm.rank == 0:
            # the first stretch of each warms up; each of ours lies between two of the bare loop
            ours, bare = clock.ours[1:], clock.bare[1:]
            between = itertools.pairwise(bare)
            neighbours = [((x[0] + y[0]) / 2, (x[1] + y[1]) / 2) for x, y in between]
            rows = [(theirs[0] / own[0], theirs[1] / own[1]) for own, theirs in zip(ours, neighbours, strict=False)]
            step = statistics.median(own[0] for own in ours) / stretch
            (work / f"overhead_{world}.json").write_text(json.dumps({"pairs": rows, "step_seconds": step}))
    finally:
        accelerator.end_training()


def overhead(work: Path, world: int, pairs: int, stretch: int, batch: int) -> dict[str, Any]:
    """Our steps per second over those of the bare loop."""
    launcher = [sys.executable]
    if world > 1:
        file = str(ROOT / "configs/accelerate/cpu_2.yaml")
        launcher += ["-m", "accelerate.commands.launch", "--config_file", file, "--num_processes", str(world)]
    rank = ["--as-rank", str(work), str(pairs), str(stretch), str(batch)]
    _finish([*launcher, __file__, *rank])
    found = json.loads((work / f"overhead_{world}.json").read_text())
    wall, cpu = ([pair[k] for pair in found["pairs"]] for k in (0, 1))
    report = {
        "steps_per_second_ratio": round(statistics.median(wall), 4),
        "spread": [round(min(wall), 4), round(max(wall), 4)],
        "cpu_ratio": round(statistics.median(cpu), 4),
        "cpu_spread": [round(min(cpu), 4), round(max(cpu), 4)],
        "pairs": len(wall),
        "steps_per_stretch": stretch,
        "step_seconds": round(found["step_seconds"], 4),
    }
    print(
        f"overhead on {world}: {report['steps_per_second_ratio']:.3f} × the bare loop's steps per second "
        f"({report['spread'][0]:.3f} … {report['spread'][1]:.3f}, {len(wall)} pairs), in CPU seconds "
        f"{report['cpu_ratio']:.3f}; a step of {1000 * found['step_seconds']:.0f} ms",
        flush=True,
    )
    return report


def family_cpu_seconds() -> float:
    """Of this process and all that it started and that still run."""
    members = [psutil.Process(), *psutil.Process().children(recursive=True)]
    return sum(sum(member.cpu_times()[:2]) for member in members)


def family_bytes() -> int:
    """Memory of this process and its workers that no file holds: pages of libraries are other programs' too, or not."""
    members = [psutil.Process(), *psutil.Process().children(recursive=True)]
    return sum(info.rss - info.shared for info in (member.memory_info() for member in members))


def hidden(work: Path, steps: int, batch: int) -> dict[str, Any]:
    """How much of decoding hides behind steps, with one worker and one training thread."""
    alone = Trainer(
        config(work / "shards", work / "run_alone", f"train.global_batch={batch}", "data.in_process=true"),
        build_accelerator(config(work / "shards", work / "run_alone")),
    )
    batches = iter(alone.stream)
    next(batches)
    start, count = time.process_time(), 4
    for _ in range(count):
        next(batches)
    decode = (time.process_time() - start) / count
    run = config(work / "shards", work / "run_data", f"train.steps={steps}", f"train.global_batch={batch}")
    trainer = Trainer(run, build_accelerator(run))
    source, waits = iter(trainer.stream), []
    for _ in range(3):
        trainer.optimizer_step([next(source)])
    begun, cpu = time.perf_counter(), family_cpu_seconds()
    for _ in range(steps):
        asked = time.perf_counter()
        rows = next(source)
        waits.append(time.perf_counter() - asked)
        trainer.optimizer_step([rows])
    wall, cpu = time.perf_counter() - begun, family_cpu_seconds() - cpu
    source.close()  # type: ignore[attr-defined]
    step = wall / steps - statistics.mean(waits)
    share = 1 - statistics.mean(waits) / decode
    report = {
        "decode_cpu_seconds": round(decode, 4),
        "step_seconds": round(step, 4),
        "wait_seconds": round(statistics.mean(waits), 5),
        "hidden": round(share, 4),
        "cores_busy": round(cpu / wall, 2),
        "steps": steps,
    }
    print(
        f"data: decoding {1000 * decode:.0f} ms of CPU per batch beside steps of {1000 * step:.0f} ms, "
        f"{share:.1%} of it hidden; {report['cores_busy']:.2f} cores busy",
        flush=True,
    )
    return report


def start(work: Path) -> dict[str, Any]:
    """Seconds from the command to the first logged step."""
    out = work / "run_start"
    command = [sys.executable, str(ROOT / "pipelines/pretrain.py"), str(ROOT / "configs/pretrain/demo.yaml")]
    command += [f"data.shards={work / 'shards'}", f"train.out={out}", "train.steps=1", "train.log_every=1"]
    begun = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, env=_environment()) as process:
        while not (out / "metrics.jsonl").exists() and process.poll() is None:
            time.sleep(0.02)
        seconds = time.perf_counter() - begun
        cpu = sum(psutil.Process(process.pid).cpu_times()[:2]) if process.poll() is None else None
        code = process.wait()
    assert code == 0, "the demo configuration did not train"
    print(f"start: {seconds:.1f} s to the first step of the demo configuration", flush=True)
    return {"seconds": round(seconds, 2), "cpu_seconds": cpu and round(cpu, 2)}


def checkpoints(work: Path, rounds: int) -> dict[str, Any]:
    """``tools/bench/checkpoint.py``, which prints."""
    out = work / "checkpoint.json"
    command = [sys.executable, str(Path(__file__).with_name("checkpoint.py")), "--rounds", str(rounds)]
    print(_finish([*command, "--out", str(out)]).strip(), flush=True)
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def memory(work: Path, steps: int) -> dict[str, Any]:
    """Memory of trainer and worker along a run of the smallest towers."""
    options = [f"data.shards={work / 'shards'}", f"train.out={work / 'run_memory'}", f"train.steps={steps}"]
    options += ["train.threads=1", "data.workers=1", "train.log_every=100", "train.checkpoint_every=500"]
    options += ["train.global_batch=4", "model.towers.video.frames=1", "model.towers.audio.seconds=0.5"]
    run = mmcl.load_config(ROOT / "configs/pretrain/tiny_cpu.yaml", options)
    trainer = Trainer(run, build_accelerator(run))
    seen: list[tuple[int, int]] = []
    note = trainer._log

    def log(*arguments: Any) -> None:
        note(*arguments)
        seen.append((trainer.progress.step, family_bytes()))

    trainer._log = log  # type: ignore[method-assign]
    with StopRequest(work / "stop") as stop, RunFolder(Path(run.train.out), writer=True) as folder:
        reached = trainer.fit(folder, stop, resume=None).step
    if reached < steps:
        sys.exit(f"memory: stopped after {reached} of {steps} steps")
    settled = [size for step, size in seen if step > steps // 4]
    third = max(1, len(settled) // 3)
    first, last = statistics.median(settled[:third]), statistics.median(settled[-third:])
    report = {
        "steps": steps,
        "megabytes": [round(first / 1e6, 1), round(last / 1e6, 1)],
        "growth": round(last / first - 1, 4),
    }
    print(
        f"memory: {first / 1e6:.0f} MB early, {last / 1e6:.0f} MB at step {steps}: {report['growth']:+.2%}", flush=True
    )
    return report


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def _finish(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=_environment())
    if done.returncode:
        sys.exit(f"{' '.join(command)}:\n{done.stdout[-1000:]}{done.stderr[-3000:]}")
    return done.stdout


def missed(report: dict[str, Any]) -> list[str]:
    """Bars that were not reached."""
    wrong = []
    for world in (1, 2):
        found = report.get(f"overhead_{world}")
        if found and found["steps_per_second_ratio"] < BARS["overhead"]:
            wrong.append(f"overhead on {world}: {found['steps_per_second_ratio']} < {BARS['overhead']}")
    data = report.get("data")
    if data and data["decode_cpu_seconds"] < data["step_seconds"] and data["hidden"] < BARS["hidden"]:
        wrong.append(f"hidden: {data['hidden']} < {BARS['hidden']}")
    for name, part, figure in (("start", "start", "seconds"), ("growth", "memory", "growth")):
        bar = BARS["start_seconds" if name == "start" else "growth"]
        if part in report and report[part][figure] > bar:
            wrong.append(f"{name}: {report[part][figure]} > {bar}")
    if "checkpoint" in report and report["checkpoint"]["beside"]["held"] > BARS["checkpoint"]:
        wrong.append(f"checkpoint: {report['checkpoint']['beside']['held']} > {BARS['checkpoint']}")
    return wrong


PARTS = ("overhead", "data", "start", "checkpoint", "memory")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer pairs and rounds, under four minutes")
    parser.add_argument("--part", choices=PARTS, action="append", help="default: all")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    parser.add_argument("--as-rank", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.as_rank:
        work, pairs, stretch, batch = options.as_rank
        as_rank(Path(work), int(pairs), int(stretch), int(batch))
        return
    torch.set_num_threads(1)
    quick, parts = options.quick, options.part or PARTS
    report: dict[str, Any] = {"machine": {"cores": os.cpu_count()}, "torch": torch.__version__, "quick": quick}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        write_clips(work / "shards", 64)
        if "overhead" in parts:
            for world in (1, 2):
                report[f"overhead_{world}"] = overhead(work, world, 15 if quick else 31, 6 if quick else 10, 64)
        if "data" in parts:
            report["data"] = hidden(work, 20 if quick else 60, 32)
        if "start" in parts:
            report["start"] = start(work)
        if "checkpoint" in parts:
            report["checkpoint"] = checkpoints(work, 7 if quick else 15)
        if "memory" in parts:
            report["memory"] = memory(work, 2000)
        report["machine"]["load"] = round(os.getloadavg()[0], 1)
    report["missed"] = missed(report)
    if options.out is not None:
        options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    sys.exit("missed: " + "; ".join(report["missed"]) if report["missed"] else 0)


if __name__ == "__main__":
    main()
