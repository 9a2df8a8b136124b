"""Does video question answering look, only read, or guess: trained with the picture and without it, over several seeds.

    python tools/bench/learning_qa.py --work qa-work --jobs 2 --out tools/bench/results/learning_qa.json

The questions are those of ``qa_data.py``: four answers, of which texts alone tell nothing and of which a picture at
another time tells two wrong. ``answers`` trains with the cross-entropy of the answers; ``all terms`` with masked-answer
contrast and temporal localisation beside it; ``texts alone`` as ``answers``, but no sentence sees a frame. Each is also
scored with black frames. All arms take the same steps of the same batch from the same towers; the learning rate is one
at which ``answers`` learns.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qa_data import ANSWERS, make_questions

CONFIG = Path(__file__).parents[2] / "configs/pretrain/video_qa.yaml"
ALONE = ("contrast", "localisation", "question")
ARMS = {
    "answers": [*(f"objectives.0.{term}=null" for term in ALONE)],
    "all terms": ["objectives.0.question=null"],
    "texts alone": [*(f"objectives.0.{term}=null" for term in ALONE), "objectives.0.video=null"],
}


@dataclass(frozen=True)
class Sizes:
    train: int
    test: int
    steps: int
    kinds: tuple[str, ...]
    learning_rate: float
    seeds: int = 3


FULL = Sizes(train=400, test=200, steps=200, kinds=("colour", "ground"), learning_rate=1.5e-3)
QUICK = Sizes(train=240, test=60, steps=80, kinds=("colour",), learning_rate=2e-3)


def run(work: Path, sizes: Sizes, arm: str, seed: int) -> dict[str, float]:
    """Trains one arm and scores it; percent, and seconds of one core for training."""
    import torch

    import mmcl
    from mmcl.evaluation.video_qa import score_questions
    from mmcl.training.launch import pretrain

    torch.set_num_threads(1)
    out = work / f"{arm.replace(' ', '_')}-{seed}"
    shutil.rmtree(out, ignore_errors=True)
    changes = [
        f"data.shards={work / 'train'}",
        "data.in_process=true",
        f"train.out={out}",
        f"train.seed={seed}",
        f"train.steps={sizes.steps}",
        f"train.checkpoint_every={sizes.steps}",
        f"train.optimizer.learning_rate={sizes.learning_rate}",
        "train.threads=1",
    ]
    out.mkdir(parents=True)
    started = time.process_time()
    with (work / f"{out.name}.log").open("w") as log, redirect_stdout(log):
        pretrain(mmcl.load_config(CONFIG, [*changes, *ARMS[arm]]))
    figures = {"train_cpu_seconds": time.process_time() - started}
    for name, blank in (("", False), ("black frames", True)):
        scores = score_questions(out, str(work / "test"), in_process=True, blank_video=blank)
        figures[name or "accuracy"] = 100 * scores.accuracy
        if not blank:
            figures.update({kind: 100 * scores.right[kind] / count for kind, count in scores.asked.items()})
    return figures


def summary(runs: Sequence[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Mean, least and most over seeds of each figure."""
    return {
        name: {
            "mean": statistics.mean(run[name] for run in runs),
            "least": min(run[name] for run in runs),
            "most": max(run[name] for run in runs),
        }
        for name in runs[0]
    }


def compare(work: Path, sizes: Sizes, arms: Sequence[str], seeds: int, jobs: int) -> dict[str, Any]:
    for part, clips, seed in (("train", sizes.train, 1), ("test", sizes.test, 2)):
        if not (work / part).exists():
            make_questions(work / part, clips, seed=seed, kinds=sizes.kinds)
    tasks = [(arm, seed) for seed in range(seeds) for arm in arms]
    if jobs == 1:
        found = [run(work, sizes, *task) for task in tasks]
    else:
        with ProcessPoolExecutor(jobs) as pool:
            found = list(pool.map(run, [work] * len(tasks), [sizes] * len(tasks), *zip(*tasks, strict=True)))
    by_arm = {arm: [each for (name, _), each in zip(tasks, found, strict=True) if name == arm] for arm in arms}
    return {
        "chance": 100 / ANSWERS,
        "train_clips": sizes.train,
        "test_questions": sizes.test * len(sizes.kinds),
        "steps": sizes.steps,
        "seeds": seeds,
        "arms": {arm: summary(runs) for arm, runs in by_arm.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="a folder for data and runs")
    parser.add_argument("--out", type=Path, required=True, help="a JSON file for the figures")
    parser.add_argument("--quick", action="store_true", help="one type of question, fewer steps")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--seeds", type=int)
    parser.add_argument("--jobs", type=int, default=1)
    arguments = parser.parse_args()
    sizes = QUICK if arguments.quick else FULL
    arguments.work.mkdir(parents=True, exist_ok=True)
    found = compare(arguments.work, sizes, arguments.arms, arguments.seeds or sizes.seeds, arguments.jobs)
    arguments.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    for arm, figures in found["arms"].items():
        shown = ", ".join(
            f"{name} {each['mean']:.1f} ({each['least']:.1f}-{each['most']:.1f})" for name, each in figures.items()
        )
        print(f"{arm}: {shown}")


if __name__ == "__main__":
    main()
