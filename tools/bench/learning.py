"""Do the objectives learn, not only compute: three small comparisons on recorded games, on CPUs, over several seeds.

    python tools/bench/learning.py --work learning-work --jobs 2 --out tools/bench/results/learning.json

``persistency``: one tower, no labels: clips of one recording at two times (rho 2) against one clip twice (rho 1).
``intra_modal``: three towers, one recording per game: cross-modal contrast with and without SimCLR on video and sound.
``distillation``: a video student with labels: alone, with plain distillation, with compositional distillation; the
teacher is a tower of sound, or of single pictures, that earlier learned the names of the games from more recordings.

All arms of a comparison take the same steps of the same batch with the same towers and optimizer, from the same first
weights, and nothing was tuned for one of them. Everything is kept in ``--work``: what is there is not made again.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shutil
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from learning_data import Takes, prepare
from learning_report import Figures, Measured, Tree, summary, table

VIDEO: Tree = {"name": "tiny_video", "width": 64, "channels": 16, "size": 32, "frames": 4, "fps": 2}
AUDIO: Tree = {"name": "tiny_audio", "width": 128, "channels": 16, "mels": 32, "seconds": 2.0}
TEXT: Tree = {"name": "tiny_text", "width": 64, "depth": 1}
TEACHERS: Tree = {"audio": AUDIO, "image": {**VIDEO, "width": 128, "channels": 32, "frames": 1}}
AUGMENTATIONS: Tree = {
    "strong": {
        "video": {"oversample": 1.5, "crop": {"area": [0.3, 1.0]}, "flip": 0.5, "jitter": {}, "grey": 0.2},
        "audio": {"gain_db": [-6, 6], "shift_seconds": 0.5, "time_masks": 2},
    }
}
TAUGHT_BY = {"audio": "sound", "image": "pictures"}
CLASSES = 128
"""outputs of a classifier: at least as many as there are games"""
NEIGHBOURS = 5
RIDGE = 0.1
"""of a linear map: a share of the variance of a feature"""
UNTRAINED = "untrained"


@dataclass(frozen=True)
class Sizes:
    takes: Takes
    steps: dict[str, int]
    batch: dict[str, int]
    seeds: int


FULL = Sizes(
    Takes(games=None, seeds=4, test_seeds=2, seconds=16.0),
    steps={"persistency": 300, "intra_modal": 200, "distillation": 300, "teacher": 200},
    batch={"persistency": 64, "intra_modal": 32, "distillation": 64, "teacher": 64},
    seeds=3,
)
QUICK = Sizes(
    Takes(games=8, seeds=2, test_seeds=1, seconds=4.0),
    steps=dict.fromkeys(FULL.steps, 4),
    batch=dict.fromkeys(FULL.steps, 8),
    seeds=2,
)


class Job(NamedTuple):
    """One training run and what is measured of it."""

    experiment: str
    arm: str
    seed: int
    tree: Tree
    folder: Path
    shards: Path
    bank: tuple[str, ...]
    """splits that nearest neighbours are looked for in"""
    measure: str
    """``neighbours`` (of the first tower), ``classes`` (these, and the student's own) or ``retrieval``"""


# --- the arms ---------------------------------------------------------------------------------------------------------


def persistency() -> Iterator[tuple[str, str, Tree]]:
    """(camera, arm, tree) of rho 1 and rho 2 under both cameras; clips lie anywhere in a recording."""
    method = {"name": "simclr", "hidden": 256, "out": 64, "mask_false_negatives": False}  # captions would be labels
    for camera in ("still", "wandering"):
        for arm, rho in ((UNTRAINED, 1), ("rho 1", 1), ("rho 2", 2)):
            term = {"name": "persistency", "tower": "video", "rho": rho, "augmentation": "strong", "method": method}
            yield camera, f"{camera} camera, {arm}", {"model": {"towers": {"video": VIDEO}}, "objectives": [term]}


def intra_modal() -> Iterator[tuple[str, str, Tree]]:
    model = {"towers": {"video": VIDEO, "audio": AUDIO, "text": TEXT}, "joint_width": 64}
    method = {"name": "simclr", "hidden": 256, "out": 64}
    terms = [
        {"name": "intra_modal", "tower": tower, "augmentation": "strong", "method": method}
        for tower in ("video", "audio")
    ]
    for arm, more in (("cross-modal", []), ("cross-modal and intra-modal", terms)):
        yield "still", arm, {"model": model, "objectives": [{"name": "cross_modal"}, *more]}


def distillation(work: Path, teachers: Sequence[str]) -> Iterator[tuple[str, str, Tree]]:
    composed = {"name": "compositional_distillation", "classes": CLASSES}
    plain = {"name": "distillation", "method": "knowledge_distillation", "classes": CLASSES}
    arms = [(UNTRAINED, teachers[0], composed), ("labels alone", teachers[0], {**composed, "teacher_weight": 0.0})]
    for name in teachers:
        arms += [
            (f"plain, from {TAUGHT_BY[name]}", name, plain),
            (f"compositional, from {TAUGHT_BY[name]}", name, composed),
        ]
    for arm, name, term in arms:
        earlier = str(run_folder(work, "teacher", name, 0))
        model = {"towers": {"video": VIDEO, name: {**TEACHERS[name], "pretrained": earlier, "lock": "with_head"}}}
        named = {"teacher": name} if term is plain else {"teachers": [name]}
        yield "still", arm, {"model": model, "objectives": [{**term, **named}]}


def teacher(teachers: Sequence[str]) -> Iterator[tuple[str, str, Tree]]:
    for name in teachers:
        towers = {name: TEACHERS[name], "text": TEXT}
        yield "still", name, {"model": {"towers": towers}, "objectives": [{"name": "cross_modal"}]}


def run_folder(work: Path, experiment: str, arm: str, seed: int) -> Path:
    return work / "runs" / f"{experiment}-{arm}-{seed}".replace(" ", "_").replace(",", "")


COMPARED = {
    "persistency": [
        ("still camera, rho 2", "still camera, rho 1"),
        ("wandering camera, rho 2", "wandering camera, rho 1"),
    ],
    "intra_modal": [("cross-modal and intra-modal", "cross-modal")],
    "distillation": [
        ("compositional, from sound", "labels alone"),
        ("compositional, from sound", "plain, from sound"),
        ("compositional, from pictures", "labels alone"),
        ("compositional, from pictures", "plain, from pictures"),
    ],
}


def jobs_of(experiment: str, sizes: Sizes, work: Path, teachers: Sequence[str] = ("audio",)) -> list[Job]:
    arms = {
        "persistency": persistency,
        "intra_modal": intra_modal,
        "distillation": lambda: distillation(work, teachers),
        "teacher": lambda: teacher(teachers),
    }[experiment]()
    # the fewer recordings, the more a second objective has to add
    learned = {"intra_modal": 1, "distillation": 2}.get(experiment, sizes.takes.seeds)
    bank = tuple(f"train_{seed}" for seed in range(learned))
    measure = {"intra_modal": "retrieval", "distillation": "classes"}
    found = []
    for camera, arm, tree in arms:
        for seed in range(1 if experiment == "teacher" else sizes.seeds):
            how = measure.get(experiment, "neighbours")
            found.append(job_of(experiment, arm, seed, tree, sizes, work, camera, bank, how))
    return found


def job_of(
    experiment: str,
    arm: str,
    seed: int,
    tree: Tree,
    sizes: Sizes,
    work: Path,
    camera: str,
    bank: tuple[str, ...],
    measure: str,
) -> Job:
    """The run of an arm that trains on the splits of ``bank``."""
    shards, folder = work / camera / "shards", run_folder(work, experiment, arm, seed)
    sources = [shards / split for split in bank]
    common = data_and_train(sources, folder, sizes.steps[experiment], sizes.batch[experiment], seed)
    whole = {**tree, **common, "train": {**common["train"], **tree.get("train", {})}}
    return Job(experiment, arm, seed, whole, folder, shards, bank, measure)


def data_and_train(sources: Sequence[Path], folder: Path, steps: int, batch: int, seed: int) -> Tree:
    """What all runs have in common."""
    data = {
        "sources": [{"shards": str(source)} for source in sources],
        "augmentations": AUGMENTATIONS,
        "in_process": True,
        "decoder": "pyav",
    }
    train = {
        "out": str(folder),
        "steps": steps,
        "global_batch": batch,
        "seed": seed,
        "threads": 1,
        "checkpoint_every": steps,
        "optimizer": {"learning_rate": 2e-3},
    }
    return {"data": data, "train": train}


# --- one run ----------------------------------------------------------------------------------------------------------


def run(job: Job, measure: Callable[[Any, Job], Figures] | None = None) -> tuple[Job, Figures]:
    """Trains, unless an earlier call did with the same configuration, and measures (None: as the job says)."""
    torch.set_num_threads(1)
    job.folder.parent.mkdir(parents=True, exist_ok=True)
    with job.folder.with_suffix(".log").open("a") as log, redirect_stdout(log), redirect_stderr(log):
        model, cpu_seconds = _trained(job)
        known = {"retrieval": retrieval, "classes": classes}
        figures = (measure or known.get(job.measure, neighbours))(model, job)
    return job, {**figures, "cpu_seconds": cpu_seconds}


def _trained(job: Job) -> tuple[Any, float]:
    from mmcl.config import build
    from mmcl.model import MultimodalModel
    from mmcl.recipe import RunConfig, build_model
    from mmcl.training.launch import pretrain

    config = build(RunConfig, job.tree, where=str(job.folder))
    if job.arm.endswith(UNTRAINED):
        torch.manual_seed(job.seed)
        return build_model(config)[0], 0.0
    done = job.folder / "trained.json"
    before = json.loads(done.read_text(encoding="utf-8")) if done.exists() else {}
    if before.get("tree") != job.tree:
        if job.folder.exists():
            shutil.rmtree(job.folder)
        start = time.process_time()
        if not pretrain(config):
            raise SystemExit(f"{job.folder}: stopped before the last step")
        before = {"tree": job.tree, "cpu_seconds": round(time.process_time() - start, 1)}
        done.write_text(json.dumps(before, indent=1) + "\n", encoding="utf-8")
    return MultimodalModel.from_pretrained(job.folder), before["cpu_seconds"]


def embed(model: Any, job: Job, split: str, level: Any) -> Any:
    from mmcl.evaluation.embed import embed_shards

    return embed_shards(model, str(job.shards / split), level=level, in_process=True, decoder="pyav")


Labelled = tuple[torch.Tensor, torch.Tensor]


def labelled(model: Any, job: Job, splits: Iterable[str]) -> Labelled:
    """Features of the first tower and the labels of their recordings."""
    modality = next(iter(model.tower_infos().values())).modality
    each = [embed(model, job, split, "pooled") for split in splits]
    labels = [torch.tensor([item.label for item in e.items])[e.owners[modality]] for e in each]
    return torch.cat([e.rows[modality] for e in each]), torch.cat(labels)


def neighbours(model: Any, job: Job) -> Figures:
    """Percent of test recordings whose nearest recordings in the bank are of the same game."""
    return looked_up(labelled(model, job, ["test"]), labelled(model, job, job.bank))


def looked_up(test: Labelled, bank: Labelled) -> Figures:
    """Percent of rows whose nearest in the bank have the same label."""
    from mmcl.evaluation.probes import neighbour_accuracy

    return {f"{NEIGHBOURS}-NN": neighbour_accuracy(*test, *bank, neighbours=NEIGHBOURS)}


def mapped(test: Labelled, bank: Labelled) -> Figures:
    """Percent of rows whose label a linear map tells, fitted to the bank by ridge regression."""
    (rows, labels), (asked, answers) = bank, test
    mean, std = rows.double().mean(0), rows.double().std(0).clamp_min(1e-6)
    x, y = ((part.double() - mean) / std for part in (rows, asked))
    targets = torch.nn.functional.one_hot(labels).double()
    weight = torch.linalg.solve(x.T @ x + len(x) * RIDGE * torch.eye(x.shape[1]), x.T @ (targets - targets.mean(0)))
    named = (y @ weight + targets.mean(0)).argmax(1)
    return {"linear": 100 * float((named == answers).double().mean())}


def classes(model: Any, job: Job) -> Figures:
    """The same, and percent of test recordings that the student's own classifier names."""
    from mmcl.training.checkpoint import find_checkpoint, load_tensors

    figures = neighbours(model, job)
    checkpoint = find_checkpoint(job.folder)
    if checkpoint is None or job.arm == UNTRAINED:
        return figures
    owned = load_tensors(checkpoint / "objectives.safetensors")
    weight, bias = (
        owned[f"objectives.{job.tree['objectives'][0]['name']}.classify.{part}"] for part in ("weight", "bias")
    )
    test = embed(model, job, "test", "pooled")
    labels = torch.tensor([item.label for item in test.items])[test.owners["video"]]
    named = (test.rows["video"] @ weight.T + bias).argmax(1)
    return {"classifier": 100 * float((named == labels).float().mean()), **figures}


def retrieval(model: Any, job: Job) -> Figures:
    """R@1 of all directions among the test recordings; everything of the query's game is right."""
    from mmcl.evaluation import retrieval_metrics

    test = embed(model, job, "test", "joint")
    labels = torch.tensor([item.label for item in test.items])
    figures = {}
    for asked, queries in test.rows.items():
        for given, gallery in test.rows.items():
            if asked != given:
                answers = labels[test.owners[given]]
                right = [(answers == label).nonzero()[:, 0].tolist() for label in labels[test.owners[asked]]]
                figures[f"{asked}→{given}"] = float(retrieval_metrics(queries, gallery, right)["R@1"])
    return {"R@1, mean of directions": statistics.mean(figures.values()), **figures}


def run_all(jobs: Sequence[Job], pool: Executor, run: Callable[[Job], tuple[Job, Figures]]) -> Measured:
    """What all jobs gave, in their order; each is printed as it ends."""
    measured: Measured = {}
    for future in as_completed([pool.submit(run, job) for job in jobs]):
        job, figures = future.result()
        measured[job.arm, job.seed] = figures
        shown = "  ".join(f"{name} {value:.1f}" for name, value in figures.items())
        print(f"{job.experiment}: {job.arm}, seed {job.seed}: {shown}", flush=True)
    return {(job.arm, job.seed): measured[job.arm, job.seed] for job in jobs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for recordings, shards and runs")
    for name in COMPARED:
        parser.add_argument(f"--{name.replace('_', '-')}", action="store_true", help="this one; default: all three")
    parser.add_argument("--teachers", nargs="+", choices=list(TEACHERS), default=["audio"], help="of the distillation")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that everything runs; means nothing")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, one core each")
    parser.add_argument("--seeds", type=int, help="seeds 0, 1, …; default: 3")
    parser.add_argument("--out", type=Path, help="JSON")
    options = parser.parse_args()
    sizes = QUICK if options.quick else FULL
    if options.seeds is not None:
        sizes = Sizes(sizes.takes, sizes.steps, sizes.batch, options.seeds)
    chosen = [name for name in COMPARED if getattr(options, name)] or list(COMPARED)
    work = (options.work / "quick" if options.quick else options.work).absolute()
    prepare(work, sizes.takes, options.jobs, wandering="persistency" in chosen)
    summaries: Tree = {}
    with ProcessPoolExecutor(options.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        for experiment in (["teacher"] if "distillation" in chosen else []) + chosen:
            jobs = jobs_of(experiment, sizes, work, options.teachers)
            summaries[experiment] = summary(run_all(jobs, pool, run), COMPARED.get(experiment, []))
    print(table(summaries))
    if options.out is not None:
        settings = {
            **asdict(sizes),
            "towers": [VIDEO, AUDIO, TEXT],
            "teachers": TEACHERS,
            "augmentations": AUGMENTATIONS,
            "neighbours": NEIGHBOURS,
            "recordings learned from, per game": {"persistency": 4, "intra_modal": 1, "distillation": 2, "teacher": 4},
        }
        found = {"settings": settings, **summaries}
        options.out.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
