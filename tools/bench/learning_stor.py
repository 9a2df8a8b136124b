"""Do background erasing and STOR learn what changes: two small comparisons on generated clips, on CPUs, over seeds.

    python tools/bench/learning_stor.py --work learning-work --jobs 2 --out tools/bench/results/learning_stor.json

Each clip shows a square before a background that stands still; how the square changes is the label, which a single
picture tells in part at most. ``background_erasing``: MoCo on clips whose background tells the label (``telling``), as
it is, with erased queries, with another time of the video as a negative, and with both. ``stor``: clips whose
background never tells (``neutral``): BYOL on two clips, with heads for speed and turn, with heads for the overlap in
space and time, and with all of them. ``labels`` is the same tower with a classifier, for what could be learned.

Test clips have backgrounds that tell nothing. Asked is the nearest of the clips of a split (``5-NN``) and a linear map
fitted to their features (``linear``). With ``telling`` clips to go by, whoever looks at the background is led astray;
with ``neutral`` ones, the figures say what the features hold of the change. Chance is one in six.

All arms of a comparison take the same steps of the same batch with the same tower and optimizer, from the same first
weights, and nothing was tuned for one of them. The set-up was changed after first runs of one seed, for all arms alike.
Squares that differed in where they went were not told apart: this tower, which averages over places before it looks
along time, did not learn it from labels either, and one with convolutions along time learned it from labels but, in so
few steps, not without. And with colours that were hardly changed, MoCo and BYOL held far less than the untrained tower;
so clips are turned in hue, by all of the circle where the background does not matter and as in MoCo v2 where it does,
and are sometimes grey.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from learning import UNTRAINED, Job, data_and_train, labelled, looked_up, mapped, run, run_all, run_folder
from learning_clips import CHANGES, prepare
from learning_report import Figures, Tree, summary, table

VIDEO: Tree = {"name": "tiny_video", "width": 64, "channels": 16, "size": 32, "frames": 8, "fps": 10}
AUGMENTATIONS: Tree = {
    "cropped": {"video": {"oversample": 1.5, "crop": {"area": [0.5, 1.0]}, "flip": 0.5, "jitter": {}, "grey": 0.2}},
    "coloured": {"video": {"flip": 0.5, "jitter": {"hue": 0.5}, "grey": 0.2}},
}
LABELS: Tree = {"name": "classification", "classes": len(CHANGES)}


@dataclass(frozen=True)
class Sizes:
    clips_per_kind: int
    test_clips_per_kind: int
    seconds: float
    steps: int
    batch: int
    seeds: int


FULL = Sizes(clips_per_kind=128, test_clips_per_kind=60, seconds=4.0, steps=300, batch=32, seeds=3)
QUICK = Sizes(clips_per_kind=6, test_clips_per_kind=4, seconds=4.0, steps=10, batch=16, seeds=2)


def background_erasing() -> Iterator[tuple[str, Tree]]:
    moco = {"name": "moco", "hidden": 256, "out": 64, "queue": 256, "temperature": 0.1}
    for arm, erase, hard in (
        (UNTRAINED, None, False),
        ("moco", None, False),
        ("moco, erased", {}, False),
        ("moco, hard negatives", None, True),
        ("moco, erased, hard negatives", {}, True),
    ):
        method = {**moco, "hard_negative": hard}
        yield arm, {"name": "intra_modal", "augmentation": "cropped", "erase": erase, "method": method}
    yield "labels", {**LABELS, "augmentation": "cropped"}


def stor() -> Iterator[tuple[str, Tree]]:
    heads = {"hidden": 256, "out": 64, "predictor_hidden": 256, "head_hidden": 128}
    pairs = {"speeds": [1, 2], "area": [0.3, 0.45]}
    none = {"space": 0, "time": 0, "speed": 0, "rotation": 0}
    for arm, left_out in (
        (UNTRAINED, {}),
        ("prediction alone", {**none, "byol": 1.0}),
        ("prediction, speed, turns", {"space": 0, "time": 0}),
        ("overlap alone", {"speed": 0, "rotation": 0}),
        ("whole", {}),
    ):
        yield arm, {"name": "stor", "augmentation": "coloured", **heads, **pairs, **left_out}
    yield "labels", {**LABELS, "augmentation": "coloured"}


ARMS = {"background_erasing": background_erasing, "stor": stor}
LEARNED_FROM = {"background_erasing": "telling", "stor": "neutral"}
ASKED_OF = {"background_erasing": ("telling", "neutral"), "stor": ("neutral",)}
"""splits whose labels a test clip is told by"""
COMPARED = {
    "background_erasing": [
        ("moco, erased", "moco"),
        ("moco, hard negatives", "moco"),
        ("moco, erased, hard negatives", "moco, hard negatives"),
    ],
    "stor": [("whole", "prediction, speed, turns"), ("whole", "prediction alone"), ("overlap alone", UNTRAINED)],
}


def jobs_of(experiment: str, sizes: Sizes, work: Path, shards: Path) -> list[Job]:
    split = LEARNED_FROM[experiment]
    found = []
    for seed in range(sizes.seeds):
        for arm, term in ARMS[experiment]():
            folder = run_folder(work, experiment, arm, seed)
            whole = data_and_train([shards / split], folder, sizes.steps, sizes.batch, seed)
            whole["data"] |= {"augmentations": AUGMENTATIONS, "sampling": {"overlap": False}}
            whole["train"]["momentum"] = {"start": 0.99}
            tree = {"model": {"towers": {"video": VIDEO}}, "objectives": [{"tower": "video", **term}], **whole}
            found.append(Job(experiment, arm, seed, tree, folder, shards, ASKED_OF[experiment], "linear"))
    return found


def measured(model: Any, job: Job) -> Figures:
    """Percent of test clips that each split tells alone, by its nearest clips and by a linear map fitted to it."""
    test, figures = labelled(model, job, ["test"]), {}
    for split in job.bank:
        bank = labelled(model, job, [split])
        told = {**looked_up(test, bank), **mapped(test, bank)}
        figures.update({f"{name}, {split}": value for name, value in told.items()})
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for clips, shards and runs")
    for name in ARMS:
        parser.add_argument(f"--{name.replace('_', '-')}", action="store_true", help="this one; default: both")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that everything runs; means nothing")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, one core each")
    parser.add_argument("--seeds", type=int, help="seeds 0, 1, …; default: 3")
    parser.add_argument("--steps", type=int, help="of each run; default: 300")
    parser.add_argument("--out", type=Path, help="JSON")
    options = parser.parse_args()
    given = {name: getattr(options, name) for name in ("seeds", "steps") if getattr(options, name) is not None}
    sizes = replace(QUICK if options.quick else FULL, **given)
    work = (options.work / ("quick-motion" if options.quick else "motion")).absolute()
    work.mkdir(parents=True, exist_ok=True)
    shards = prepare(work, sizes.clips_per_kind, sizes.test_clips_per_kind, sizes.seconds, options.jobs)
    summaries: Tree = {}
    with ProcessPoolExecutor(options.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        for experiment in [name for name in ARMS if getattr(options, name)] or ARMS:
            jobs = jobs_of(experiment, sizes, work, shards)
            summaries[experiment] = summary(run_all(jobs, pool, partial(run, measure=measured)), COMPARED[experiment])
    print(table(summaries))
    if options.out is not None:
        settings = {**asdict(sizes), "tower": VIDEO, "augmentations": AUGMENTATIONS, "changes": CHANGES}
        text = json.dumps({"settings": settings, **summaries}, indent=1, ensure_ascii=False)
        options.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
