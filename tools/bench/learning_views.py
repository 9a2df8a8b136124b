"""MV-DHEL with 2, 3 and 4 views: effective rank of what is learned, and retrieval, on recorded games, over seeds.

    python tools/bench/learning_views.py --work learning-work --jobs 2 --out tools/bench/results/learning_views.json

``draws``: one video tower; the views are draws of one augmentation. Retrieval: the nearest recording of the bank is of
the query's game. As further views cost further forwards, 2 views are also trained for twice the steps.
``modalities``: picture and caption; with sound; with sound and a second draw of the picture.

Recordings, towers, augmentation and optimizer are those of ``learning.py``; all arms of an experiment start from the
same first weights, take the same batches, and nothing was tuned for one of them.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from learning import AUDIO, AUGMENTATIONS, TEXT, UNTRAINED, VIDEO, Job, Sizes, embed, job_of, retrieval, run, run_all
from learning_data import Takes, prepare
from learning_report import Figures, Tree, summary, table

FULL = Sizes(
    Takes(games=None, seeds=4, test_seeds=2, seconds=16.0),
    steps={"draws": 300, "modalities": 200},
    batch={"draws": 64, "modalities": 32},
    seeds=3,
)
QUICK = Sizes(
    Takes(games=8, seeds=2, test_seeds=1, seconds=4.0),
    steps={"draws": 12, "modalities": 12},
    batch={"draws": 16, "modalities": 16},
    seeds=3,
)
TOWERS: Tree = {"video": VIDEO, "text": TEXT, "audio": AUDIO}
TEMPERATURE = 0.2
JOINT_WIDTH = 64
TWICE = "2 views, twice the steps"
COMPARED = [("3 views", "2 views"), ("4 views", "2 views"), ("4 views", "3 views"), ("4 views", TWICE)]


def arms(experiment: str, steps: int) -> Iterator[tuple[str, Tree]]:
    """(arm, tree) of an experiment whose runs take so many steps."""
    if experiment == "draws":
        chosen: dict[str, Tree] = {UNTRAINED: {"video": 2}, **{f"{n} views": {"video": n} for n in (2, 3, 4)}}
        chosen[TWICE] = {"video": 2}
    else:
        chosen = {
            "2 views": {"video": 1, "text": 1},
            "3 views": {"video": 1, "text": 1, "audio": 1},
            "4 views": {"video": 2, "text": 1, "audio": 1},
        }
    for arm, views in chosen.items():
        term = {
            "name": "multi_view",
            "method": "mv_dhel",
            "views": views,
            "temperature": TEMPERATURE,
            "augmentation": {"video": "strong"},
            # captions would be labels where only pictures are compared
            "mask_false_negatives": experiment == "modalities",
        }
        model = {"towers": {name: TOWERS[name] for name in views}, "joint_width": JOINT_WIDTH}
        more = {"steps": 2 * steps, "checkpoint_every": 2 * steps} if arm == TWICE else {}
        yield arm, {"model": model, "objectives": [term], "train": more}


def jobs_of(experiment: str, sizes: Sizes, work: Path) -> list[Job]:
    """As in ``learning.py``: the fewer recordings, the more a further modality has to add."""
    bank = tuple(f"train_{seed}" for seed in range(sizes.takes.seeds if experiment == "draws" else 1))
    return [
        job_of(f"views_{experiment}", arm, seed, tree, _named(sizes, experiment), work, "still", bank, experiment)
        for arm, tree in arms(experiment, sizes.steps[experiment])
        for seed in range(sizes.seeds)
    ]


def _named(sizes: Sizes, experiment: str) -> Sizes:
    """Runs lie beside those of ``learning.py``, under names of their own."""
    name = f"views_{experiment}"
    return replace(sizes, steps={name: sizes.steps[experiment]}, batch={name: sizes.batch[experiment]})


def measured(model: Any, job: Job) -> Figures:
    """Effective ranks of the test's joint embeddings, and retrieval."""
    from mmcl.evaluation.diagnostics import effective_rank
    from mmcl.evaluation.probes import neighbour_accuracy

    test = embed(model, job, "test", "joint")
    ranks = {f"effective rank, {name}": effective_rank(rows) for name, rows in test.rows.items()}
    if job.measure == "modalities":
        found = retrieval(model, job)
        both = (found["video→text"] + found["text→video"]) / 2
        return {"R@1, picture and caption": both, **ranks, **found}
    banks = [embed(model, job, split, "joint") for split in job.bank]

    def rows(each: list[Any]) -> tuple[torch.Tensor, torch.Tensor]:
        labels = [torch.tensor([item.label for item in e.items])[e.owners["video"]] for e in each]
        return torch.cat([e.rows["video"] for e in each]), torch.cat(labels)

    return {"R@1": neighbour_accuracy(*rows([test]), *rows(banks), neighbours=1), **ranks}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for recordings, shards and runs")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that everything runs; means nothing")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, one core each")
    parser.add_argument("--seeds", type=int, help="seeds 0, 1, …; default: 3")
    parser.add_argument("--out", type=Path, help="JSON")
    options = parser.parse_args()
    sizes = QUICK if options.quick else FULL
    sizes = sizes if options.seeds is None else replace(sizes, seeds=options.seeds)
    work = (options.work / "quick" if options.quick else options.work).absolute()
    prepare(work, sizes.takes, options.jobs, wandering=False)
    with ProcessPoolExecutor(options.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        summaries = {
            experiment: summary(
                run_all(jobs_of(experiment, sizes, work), pool, partial(run, measure=measured)), COMPARED
            )
            for experiment in sizes.steps
        }
    print(table(summaries))
    if options.out is not None:
        settings = {
            **asdict(sizes),
            "towers": TOWERS,
            "joint_width": JOINT_WIDTH,
            "temperature": TEMPERATURE,
            "augmentations": AUGMENTATIONS,
        }
        text = json.dumps({"settings": settings, **summaries}, indent=1, ensure_ascii=False)
        options.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
