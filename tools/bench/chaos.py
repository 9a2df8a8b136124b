"""A run that is killed at random moments, again and again, and goes on: are its weights those of one left alone?

    python tools/bench/chaos.py --out tools/bench/results/chaos.json       # 20 moments each on 1, 2 and 3 processes

``kill -9`` of the launcher and of every rank at once, at moments drawn evenly over the time that the run takes, start
included; then ``--resume auto``. Weights, optimizer and logged losses of the last checkpoint must be bitwise those of
an uninterrupted run. Exit 1 where they are not.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from same_run import ROOT, losses, write_clips

VIDEO = "model.towers={video: {name: tiny_video, width: 32, channels: 16, size: 32, frames: 2, fps: 4}}"
OBJECTIVE = "objectives=[{name: intra_modal, tower: video, augmentation: flip, method: {name: moco, queue: 96}}]"
FLIP = "data.augmentations={flip: {video: {flip: 0.5}}}"


def command(shards: Path, out: Path, processes: int, steps: int) -> list[str]:
    """A queue and a momentum copy, a random augmentation, a checkpoint every ten steps and by the clock."""
    launcher = [sys.executable]
    if processes > 1:
        file = str(ROOT / "configs/accelerate/cpu_2.yaml")
        launcher += ["-m", "accelerate.commands.launch", "--config_file", file, "--num_processes", str(processes)]
    options = [VIDEO, OBJECTIVE, FLIP, f"data.shards={shards}", f"train.out={out}", f"train.steps={steps}"]
    options += ["train.global_batch=12", "train.log_every=1", "train.checkpoint_every=10", "train.threads=1"]
    options += ["train.checkpoint_minutes=0.01", "data.in_process=true"]
    return [*launcher, str(ROOT / "pipelines/pretrain.py"), str(ROOT / "configs/pretrain/tiny_cpu.yaml"), *options]


def start(words: list[str], log: Path) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with log.open("ab") as file:
        return subprocess.Popen(words, stdout=file, stderr=file, env=environment)


def descendants(pid: int) -> list[int]:
    """A process and all that it started, and these."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError, IndexError):
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(entry.name))
    found = [pid]
    for member in found:
        found += children.get(member, [])
    return found


def kill(process: subprocess.Popen[bytes]) -> None:
    for pid in descendants(process.pid):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


def finish(process: subprocess.Popen[bytes], log: Path) -> None:
    if process.wait(timeout=600):
        sys.exit(log.read_text(encoding="utf-8")[-3000:])


def difference(found: Path, wanted: Path, steps: int) -> str:
    """What is not bitwise the same; "" where all is."""
    ours, theirs = (out / "checkpoints" / f"step_{steps:08d}" for out in (found, wanted))
    for file in ("model.safetensors", "objectives.safetensors"):
        a, b = load_file(ours / file), load_file(theirs / file)
        wrong = [name for name in b if not torch.equal(a[name], b[name])]
        if wrong:
            return f"{file}: {wrong[0]}"
    a, b = (torch.load(folder / "optimizer.pt", weights_only=True)["state"] for folder in (ours, theirs))
    for number, state in b.items():
        for name, value in state.items():
            if not torch.equal(a[number][name], value):
                return f"optimizer: {name} of parameter {number}"
    return "" if losses(found) == losses(wanted) else "losses in metrics.jsonl"


def ordeal(work: Path, processes: int, kills: int, steps: int, seed: int) -> dict[str, Any]:
    """One run left alone, and one killed so many times."""
    whole, broken, log = work / f"whole{processes}", work / f"broken{processes}", work / "log"
    begun = time.monotonic()
    finish(start(command(work / "shards", whole, processes, steps), log), log)
    seconds = time.monotonic() - begun
    drawn, taken = random.Random(seed + processes), []
    words = [*command(work / "shards", broken, processes, steps), "--resume", "auto"]
    for _ in range(kills):
        process = start(words, log)
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=drawn.uniform(0, seconds))
        kill(process)
        latest = broken / "checkpoints/latest"
        taken.append(int(latest.read_text().strip().removeprefix("step_")) if latest.exists() else 0)
        if taken[-1] == steps:  # the next ones shall have something to kill
            break
    finish(start(words, log), log)
    wrong = difference(broken, whole, steps)
    report = {"processes": processes, "kills": len(taken), "steps_after_each": taken, "difference": wrong}
    said = wrong or "bitwise the same"
    print(f"{processes} process(es): killed {len(taken)} times, at step {taken}; {said}", flush=True)
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="moments, on each number of processes")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--processes", type=int, action="append", help="default: 1, 2 and 3")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    options = parser.parse_args()
    torch.set_num_threads(1)
    reports = []
    with tempfile.TemporaryDirectory() as work:
        write_clips(Path(work) / "shards", 48)
        for processes in options.processes or (1, 2, 3):
            kills, number = options.kills, 0
            while kills > 0:  # a run that comes to its end before all its kills is followed by another
                place = Path(work) / f"{processes}-{number}"
                place.mkdir()
                (place / "shards").symlink_to(Path(work) / "shards")
                reports.append(ordeal(place, processes, kills, options.steps, options.seed + 100 * number))
                kills, number = kills - reports[-1]["kills"], number + 1
    if options.out is not None:
        options.out.write_text(json.dumps({"steps": options.steps, "runs": reports}, indent=1) + "\n", encoding="utf-8")
    sys.exit(any(report["difference"] for report in reports))


if __name__ == "__main__":
    main()
