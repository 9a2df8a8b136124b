"""How long checkpoints hold a run up: written beside the steps, and, as a peer, written between them.

    python tools/bench/checkpoint.py --out tools/bench/results/checkpoint.json

The same run, in turns, without checkpoints, with those of the trainer, and with such that wait for the disk. Printed is
what a step costs more, in seconds and in percent: for the training thread alone (the time in which it takes no step)
and in all (steps also slow down while a core writes).
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
        held, start = Held(saver, trainer, wait=side == "between"), time.perf_counter()
        for number in range(1, steps + 1):
            trainer.optimizer_step([batches[number % len(batches)]])
            trainer.progress.step += 1
            if side != "none" and number % every == 0:
                held.save()
        saver.wait()
        return {"seconds": time.perf_counter() - start, "held": held.seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--every", type=int, default=20, help="steps between two checkpoints")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as work:
        write_clips(Path(work) / "shards", 32)
        run = config(Path(work) / "shards", Path(work) / "run", options.batch)
        trainer = Trainer(run, build_accelerator(run))
        batches = [batch for batch, _ in zip(trainer.stream, range(2), strict=False)]
        seen: dict[str, list[dict[str, float]]] = {"none": [], "beside": [], "between": []}
        with RunFolder(Path(work) / "run") as folder:
            round_of(trainer, batches, folder, "beside", 2, 1)  # warm
            size = sum(f.stat().st_size for f in max((Path(work) / "run/checkpoints").glob("step_*")).iterdir())
            for _ in range(options.rounds):
                for side, rounds in seen.items():
                    rounds.append(round_of(trainer, batches, folder, side, options.steps, options.every))
    bare = statistics.median(each["seconds"] for each in seen["none"])
    report: dict[str, Any] = {
        "megabytes": round(size / 1e6),
        "step_seconds": round(bare / options.steps, 4),
        "steps_between": options.every,
        "rounds": options.rounds,
        "machine": {"cores": os.cpu_count(), "load": round(os.getloadavg()[0], 1)},
    }
    for side in ("beside", "between"):
        # of rounds next to each other, since the machine has others to serve
        more = [a["seconds"] / b["seconds"] - 1 for a, b in zip(seen[side], seen["none"], strict=True)]
        held = [a["held"] / b["seconds"] for a, b in zip(seen[side], seen["none"], strict=True)]
        report[side] = {
            "held": round(statistics.median(held), 4),
            "slower": round(statistics.median(more), 4),
            "spread": [round(min(more), 4), round(max(more), 4)],
        }
        print(f"{side}: steps held for {report[side]['held']:.1%}, slower in all by {report[side]['slower']:.1%}")
    print(f"{report['megabytes']} MB every {options.every} steps of {report['step_seconds']:.2f} s")
    if options.out is not None:
        options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
