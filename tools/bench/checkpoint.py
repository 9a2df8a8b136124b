"""How long checkpoints hold a run up: written beside the steps, and, as a peer, written between them.

    python tools/bench/checkpoint.py --out tools/bench/results/checkpoint.json

The same run in short rounds whose order turns: without a checkpoint, with one of the trainer, and with one that waits
for the disk. Of all rounds of a side the median counts, so that what else a machine does falls on all sides alike.
Printed is for how long the training thread takes no step (of the wall time of a round without), and what a round costs
more, in wall time and in CPU seconds of all threads (steps also slow down while a core writes).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from same_run import ROOT, write_clips

import mmcl
from mmcl.distributed import Comm
from mmcl.recipe import RunConfig
from mmcl.training.processes import build_accelerator
from mmcl.training.run_folder import RunFolder
from mmcl.training.saving import Saver
from mmcl.training.snapshot import Snapshot
from mmcl.training.trainer import Trainer

VIDEO = "{name: tiny_video, width: 128, channels: 32, size: 32, frames: 2, fps: 4}"


def config(shards: Path, out: Path, batch: int) -> RunConfig:
    towers = f"model.towers={{video: {VIDEO}, text: {{name: tiny_text, width: 768, depth: 2}}}}"
    options = [towers, f"data.shards={shards}", f"train.out={out}", "train.steps=100000", f"train.global_batch={batch}"]
    return mmcl.load_config(ROOT / "configs/pretrain/tiny_cpu.yaml", [*options, "data.in_process=true"])


class Held:
    """The seconds that a saver holds the training thread."""

    def __init__(self, saver: Saver, trainer: Trainer, *, wait: bool) -> None:
        self.saver, self.trainer, self.wait = saver, trainer, wait
        self.seconds = 0.0

    def save(self) -> None:
        start = time.perf_counter()
        self.saver.wait()
        snapshot: Snapshot = self.trainer.snapshot()
        self.saver.save(snapshot, last=False)
        if self.wait:
            self.saver.wait()
        self.seconds += time.perf_counter() - start


def round_of(
    trainer: Trainer, batches: list[Any], folder: RunFolder, side: str, steps: int, every: int
) -> dict[str, float]:
    """Seconds of one round of steps, with a checkpoint after each ``every``."""
    with Saver(folder, trainer.config.train, Comm(), sharded=False) as saver:
        held, start, cpu = Held(saver, trainer, wait=side == "between"), time.perf_counter(), time.process_time()
        for number in range(1, steps + 1):
            trainer.optimizer_step([batches[number % len(batches)]])
            trainer.progress.step += 1
            if side != "none" and number % every == 0:
                held.save()
        saver.wait()
        return {
            "seconds": time.perf_counter() - start,
            "cpu_seconds": time.process_time() - cpu,
            "held": held.seconds,
        }


def compared(seen: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Medians of both sides over those without a checkpoint."""
    middle = {
        side: {name: statistics.median(each[name] for each in rounds) for name in rounds[0]}
        for side, rounds in seen.items()
    }
    bare, report = middle["none"], dict[str, Any]()
    for side in ("beside", "between"):
        held = [each["held"] / bare["seconds"] for each in seen[side]]
        report[side] = {
            "held": round(statistics.median(held), 4),
            "held_spread": [round(min(held), 4), round(max(held), 4)],
            "slower": round(middle[side]["seconds"] / bare["seconds"] - 1, 4),
            "more_cpu": round(middle[side]["cpu_seconds"] / bare["cpu_seconds"] - 1, 4),
        }
        print(
            f"{side}: steps held for {report[side]['held']:.1%} ({report[side]['held_spread'][0]:.1%} … "
            f"{report[side]['held_spread'][1]:.1%}), slower in all by {report[side]['slower']:.1%}, "
            f"{report[side]['more_cpu']:.1%} more CPU seconds"
        )
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--every", type=int, default=10, help="steps between two checkpoints")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as work:
        write_clips(Path(work) / "shards", 32)
        run = config(Path(work) / "shards", Path(work) / "run", options.batch)
        trainer = Trainer(run, build_accelerator(run))
        batches = [batch for batch, _ in zip(trainer.stream, range(2), strict=False)]
        sides = ["none", "beside", "between"]
        seen: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
        with RunFolder(Path(work) / "run") as folder:
            round_of(trainer, batches, folder, "beside", 2, 1)  # warm
            size = sum(f.stat().st_size for f in max((Path(work) / "run/checkpoints").glob("step_*")).iterdir())
            for number in range(options.rounds):
                for side in (*sides[number % 3 :], *sides[: number % 3]):
                    seen[side].append(round_of(trainer, batches, folder, side, options.steps, options.every))
    bare = statistics.median(each["seconds"] for each in seen["none"])
    report: dict[str, Any] = {
        "megabytes": round(size / 1e6),
        "step_seconds": round(bare / options.steps, 4),
        "steps_between": options.every,
        "rounds": options.rounds,
        "machine": {"cores": os.cpu_count(), "load": round(os.getloadavg()[0], 1)},
        **compared(seen),
    }
    print(f"{report['megabytes']} MB every {options.every} steps of {report['step_seconds']:.2f} s")
    if options.out is not None:
        options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
