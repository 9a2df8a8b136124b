"""Whether a run is the same on 1, 2 and 4 processes, for each family of objectives.

    python tools/bench/same_run.py --out tools/bench/results/same_run.json
    python tools/bench/same_run.py --quick          # one family on 1 and 2 processes, in half a minute

Losses of the first 50 steps agree to 1e-4, of the last step to 1e-3 · max(loss, 1), final R@1 (the mean over
directions, over what was learned) to one point. From the state of half the run, one step's gradient of every parameter
agrees: |difference| ≤ 1e-5 · |its gradient| + 1e-6 · |all gradients|. Gradients show what losses hide. Exit 1 where
one does not.
Towers are smooth and hold no batch statistics, dropout is 0; processes exchange over gloo.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from loader_media import write_shard
from safetensors.torch import load_file, save_file

import mmcl
from mmcl.distributed import Comm
from mmcl.recipe import RunConfig
from mmcl.shards.index import index_shards
from mmcl.training.processes import build_accelerator
from mmcl.training.run_folder import RunFolder
from mmcl.training.signals import StopRequest
from mmcl.training.trainer import Trainer

ROOT = Path(__file__).parents[2]
VIDEO = "model.towers.video={name: tiny_video, width: 32, channels: 16, size: 32, frames: 2, fps: 4}"
AUDIO = "model.towers.audio={name: tiny_audio, width: 32, channels: 16, seconds: 0.5}"
TEXT = "model.towers.text={name: tiny_text, width: 32, depth: 1}"
FAMILIES = {
    "cross_modal": ("tiny_cpu", [VIDEO, AUDIO, TEXT]),
    "persistency": (
        "persistency_moco",
        [
            VIDEO,
            TEXT,
            "objectives=[{name: persistency, tower: video, rho: 2, augmentation: strong, "
            "method: {name: moco, hidden: 32, queue: 96}}, {name: cross_modal, pairs: [[video, text]]}]",
            "train.optimizer.learning_rate=0.02",
        ],
    ),
    "tcl": ("tcl", [VIDEO, TEXT, "objectives.0.queue=96", "objectives.0.fusion={width: 32, layers: 1, heads: 2}"]),
    "compositional_distillation": (
        "compositional_distillation",
        [VIDEO, AUDIO, "model.weights.audio={work}/cross_modal/1"],
    ),
}
"""configuration, and what makes it small; the audio teacher of the last is what the first learned"""


def write_clips(folder: Path, samples: int) -> None:
    """A colour, a tone and a sentence that say the same number, each in a film of half a second."""
    files = []
    for number in range(samples):
        rng = np.random.default_rng(number)
        colour, hertz = rng.integers(20, 236, 3), 150 * 2 ** (5 * number / samples)
        file = io.BytesIO()
        with av.open(file, "w", format="mp4") as container:
            video = container.add_stream("libx264", rate=4, options={"preset": "ultrafast", "crf": "18"})
            video.width, video.height, video.pix_fmt = 32, 32, "yuv420p"
            video.codec_context.thread_count = 1
            sound = container.add_stream("aac", rate=16_000, layout="mono")
            picture = np.broadcast_to(colour.astype(np.uint8), (32, 32, 3)).copy()
            picture[number % 4 * 8 :][:8] //= 2
            for _ in range(4):
                container.mux(video.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            wave = 0.4 * np.sin(2 * np.pi * hertz * np.arange(16_384) / 16_000)
            for position, part in enumerate(wave.astype(np.float32).reshape(-1, 1, 1024)):
                frame = av.AudioFrame.from_ndarray(part, "fltp", "mono")
                frame.sample_rate, frame.pts = 16_000, position * 1024
                container.mux(sound.encode(frame))
            container.mux(video.encode(None))
            container.mux(sound.encode(None))
        caption = f"clip {number}: red {colour[0]} green {colour[1]} blue {colour[2]}"
        files.append({"mp4": file.getvalue(), "txt": caption.encode()})
    write_shard(folder / "000000.tar", files)
    index_shards(folder)


def configuration(family: str, work: Path, world: int, steps: int) -> RunConfig:
    name, small = FAMILIES[family]
    common = [f"data.shards={work}/shards", f"train.out={work}/{family}/{world}", f"train.steps={steps}"]
    common += ["train.global_batch=24", "train.log_every=1", f"train.checkpoint_every={steps // 2}", "train.threads=1"]
    common += ["train.keep_checkpoints=2", "data.in_process=true", "train.optimizer.warmup_steps=5"]
    overrides = [line.replace("{work}", str(work)) for line in [*small, *common]]
    return mmcl.load_config(ROOT / f"configs/pretrain/{name}.yaml", [*overrides, f"train.processes={world}"])


def as_rank(family: str, work: Path, world: int, steps: int) -> None:
    """The run; and, in the same process, the gradients of one step from the half of the run on one process."""
    torch.set_num_threads(1)
    config = configuration(family, work, world, steps)
    accelerator = build_accelerator(config)
    try:
        with (
            StopRequest(work / "stop") as stop,
            RunFolder(Path(config.train.out), writer=Comm.current().rank == 0) as folder,
        ):
            trainer = Trainer(config, accelerator)
            trainer.fit(folder, stop, resume=None)
        Comm.current().barrier()
        trainer = Trainer(config, accelerator)
        trainer.load(work / family / "1" / "checkpoints" / f"step_{steps // 2:08d}")
        batch = next(iter(trainer.stream))
        trainer._backward(trainer._moved(batch), 1)
        gradients = {
            name.removeprefix("module."): p.grad
            for name, p in trainer.step_module.named_parameters()
            if p.grad is not None
        }
        if accelerator.is_main_process:
            save_file(gradients, Path(config.train.out) / "gradients.safetensors")
    finally:
        accelerator.end_training()


def run(family: str, work: Path, world: int, steps: int) -> None:
    launcher = [sys.executable]
    if world > 1:
        file = str(ROOT / "configs/accelerate/cpu_2.yaml")
        launcher += ["-m", "accelerate.commands.launch", "--config_file", file, "--num_processes", str(world)]
    rank = ["--as-rank", family, str(work), str(world), str(steps)]
    done = subprocess.run(
        [*launcher, __file__, *rank],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    if done.returncode:
        sys.exit(f"{family} on {world}:\n{done.stdout[-1000:]}{done.stderr[-3000:]}")


def losses(out: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def recall(out: Path, shards: Path) -> float:
    """R@1 in percent, the mean over all directions."""
    from mmcl.evaluation.run import evaluate_checkpoint

    report = evaluate_checkpoint(out, str(shards), out / "report", workers=1).report
    figures = [direction.metrics["R@1"] for direction in report.headline.directions.values()]
    return sum(figures) / len(figures)


def gradient_excess(found: Path, wanted: Path) -> tuple[float, str]:
    """The largest |difference| over what is allowed, and whose it is."""
    ours, theirs = (load_file(folder / "gradients.safetensors") for folder in (found, wanted))
    assert ours.keys() == theirs.keys()
    everything = torch.stack([g.double().norm() for g in theirs.values()]).norm()
    excess = {
        name: float((ours[name].double() - g.double()).norm() / (1e-5 * g.double().norm() + 1e-6 * everything))
        for name, g in theirs.items()
    }
    worst = max(excess, key=lambda name: excess[name])
    return excess[worst], worst


def compare(family: str, work: Path, worlds: list[int], steps: int) -> list[dict[str, Any]]:
    """One line for each number of processes but one."""
    lines = []
    for world in worlds:
        run(family, work, world, steps)
    alone = work / family / "1"
    one, found_alone = losses(alone), recall(alone, work / "shards")
    for world in worlds[1:]:
        out = work / family / str(world)
        many, excess = losses(out), gradient_excess(out, alone)
        first = max(abs(a - b) / abs(a) for a, b in zip(one[:50], many[:50], strict=True))
        last = abs(one[-1] - many[-1]) / max(abs(one[-1]), 1.0)
        points = abs(recall(out, work / "shards") - found_alone)
        lines.append(
            {
                "family": family,
                "processes": world,
                "first_50_relative": first,
                "last_relative": last,
                "loss": [one[0], one[-1]],
                "recall_at_1": found_alone,
                "recall_points": points,
                "gradient_of_allowed": excess[0],
                "worst_gradient": excess[1],
                "same": first <= 1e-4 and last <= 1e-3 and points <= 1 and excess[0] <= 1,
            }
        )
        line = lines[-1]
        print(
            f"{family} on {world}: losses of 50 steps to {first:.1e}, of step {steps} to {last:.1e} "
            f"({one[0]:.3f} → {one[-1]:.3f}), R@1 {found_alone:.1f} to {points:.2f} points, gradients at "
            f"{excess[0]:.2f} of what is allowed: {'the same' if line['same'] else 'NOT THE SAME'}",
            flush=True,
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=FAMILIES, action="append", help="default: all")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--samples", type=int, default=48)
    parser.add_argument("--quick", action="store_true", help="persistency on 1 and 2 processes, 50 steps")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    parser.add_argument("--as-rank", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.as_rank:
        family, work, world, steps = options.as_rank
        as_rank(family, Path(work), int(world), int(steps))
        return
    torch.set_num_threads(1)
    families, worlds, steps, samples = options.family or list(FAMILIES), [1, 2, 4], options.steps, options.samples
    if options.quick:
        families, worlds, steps, samples = ["persistency"], [1, 2], 50, 48
    if "compositional_distillation" in families and "cross_modal" not in families:
        families = ["cross_modal", *families]  # its teacher
    with tempfile.TemporaryDirectory() as work:
        write_clips(Path(work) / "shards", samples)
        lines: list[dict[str, Any]] = []
        for family in families:
            lines += compare(family, Path(work), worlds, steps)
            if options.out is not None:
                report = {"steps": steps, "samples": samples, "global_batch": 24, "torch": torch.__version__}
                options.out.write_text(json.dumps({**report, "runs": lines}, indent=1) + "\n", encoding="utf-8")
    sys.exit(not all(line["same"] for line in lines))


if __name__ == "__main__":
    main()
