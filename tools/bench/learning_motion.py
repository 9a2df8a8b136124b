"""Does motion prediction teach motion? Clips in which nothing but the direction of movement tells the class.

    python tools/bench/learning_motion.py --work learning-motion --jobs 2 --out tools/bench/results/learning_motion.json

A textured patch goes left, right, up or down over a textured background and comes in again on the other side; every
clip has textures and a starting point of its own, so no single frame tells the direction, and a test clip looks like
no training clip. The same video tower learns without labels by context matching alone, by motion prediction alone, by
both and, as a plain method beside them, by SimCLR on two crops; ``untrained`` has the same first weights. Then its
``pooled`` features of the test clips are looked up among those of the training clips: percent whose nearest neighbours
go the same way (chance is 25). Motion in these clips is steady, so further motion of the same video is the positive
once more: an arm with such negatives shows what they do here.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import av
import numpy as np
from learning import UNTRAINED, Job, data_and_train, run, run_all, run_folder
from learning_report import Tree, summary, table

from mmcl.media.motion_file import extract_motion
from mmcl.shards import ShardWriter, write_manifest

EXPERIMENT = "motion"
SIDE, FPS, PATCH = 64, 25, 28
SPEED = 4
"""pixels per frame"""
DIRECTIONS = ((-SPEED, 0), (SPEED, 0), (0, -SPEED), (0, SPEED))
"""(x, y) of each class"""
TOWERS: Tree = {
    "video": {"name": "tiny_video", "width": 64, "channels": 16, "size": 32, "frames": 8, "stride": 2},
    "motion": {"name": "tiny_motion", "width": 64, "channels": 16, "size": 32, "cell": 4, "frames": 8, "limit": 4.0},
}
AUGMENTATIONS: Tree = {
    "crops": {"video": {"oversample": 1.25, "crop": {"area": [0.6, 1.0]}, "jitter": {}, "grey": 0.2}}
}
DECOUPLING: Tree = {
    "name": "motion_decoupling",
    "augmentation": "crops",
    "points": 4,
    "negatives": 0,
    "mask_false_negatives": False,
    "width": 64,
    "heads": 4,
    "feed_forward": 128,
    "encoder_layers": 0,
    "decoder_layers": 1,
    "hidden": 256,
    "out": 64,
}
SIMCLR: Tree = {
    "name": "intra_modal",
    "tower": "video",
    "augmentation": "crops",
    "method": {"name": "simclr", "hidden": 256, "out": 64, "mask_false_negatives": False},
}
ARMS: dict[str, Tree] = {
    UNTRAINED: DECOUPLING,
    "SimCLR": SIMCLR,
    "context": {**DECOUPLING, "terms": "context"},
    "motion": {**DECOUPLING, "terms": "motion"},
    "context and motion": DECOUPLING,
    "context and motion, 3 negatives": {**DECOUPLING, "negatives": 3},
}
COMPARED = [
    ("context and motion", "context"),
    ("motion", UNTRAINED),
    ("motion", "SimCLR"),
    ("context and motion, 3 negatives", "context and motion"),
]


@dataclass(frozen=True)
class Sizes:
    clips: int
    """to learn from"""
    test_clips: int
    frames: int
    steps: int
    batch: int
    seeds: int
    arms: tuple[str, ...]


FULL = Sizes(clips=512, test_clips=256, frames=75, steps=800, batch=32, seeds=3, arms=tuple(ARMS))
QUICK = Sizes(clips=192, test_clips=64, frames=60, steps=450, batch=32, seeds=1, arms=(UNTRAINED, "context", "motion"))


def _texture(random: np.random.Generator, side: int, coarse: int) -> np.ndarray:
    """uint8 ``(side, side, 3)``: soft blots of random colours."""
    blots = random.integers(0, 256, (coarse, coarse, 3), np.uint8)
    frame = av.VideoFrame.from_ndarray(blots, format="rgb24").reformat(side, side, interpolation="BICUBIC")
    texture: np.ndarray = frame.to_ndarray()
    return texture


def film(number: int, label: int, frames: int) -> bytes:
    """An MP4 of one clip."""
    random = np.random.default_rng(number)
    background = 96 + _texture(random, SIDE, 6) // 4
    patch = _texture(random, PATCH, 5)
    x, y = random.integers(0, SIDE, 2)
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=FPS, options={"preset": "veryfast", "crf": "20", "bf": "0"})
        stream.width = stream.height = SIDE
        stream.pix_fmt, stream.gop_size = "yuv420p", 8
        stream.codec_context.thread_count = 1
        for i in range(frames):
            columns = (x + DIRECTIONS[label][0] * i + np.arange(PATCH)) % SIDE
            rows = (y + DIRECTIONS[label][1] * i + np.arange(PATCH)) % SIDE
            picture = background.copy()
            picture[np.ix_(rows, columns)] = patch
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    return file.getvalue()


def prepare(shards: Path, sizes: Sizes) -> None:
    """``shards/train`` and ``shards/test``, with the vectors of each film beside it."""
    first = 0
    for split, count in (("train", sizes.clips), ("test", sizes.test_clips)):
        folder = shards / split
        if not (folder / "index.json").exists():
            with ShardWriter(folder, max_count=256) as writer:
                for number in range(first, first + count):
                    label = number % len(DIRECTIONS)
                    video = film(number, label, sizes.frames)
                    facts = json.dumps({"label": label, "duration_seconds": sizes.frames / FPS}).encode()
                    members = {"mp4": video, "motion.npy": extract_motion(video), "json": facts}
                    writer.write(f"{number:06d}", members)
            write_manifest(folder, writer.entries)
        first += count


def jobs_of(sizes: Sizes, work: Path, shards: Path) -> list[Job]:
    found = []
    for arm in sizes.arms:
        towers = {name: tower for name, tower in TOWERS.items() if name == "video" or ARMS[arm] is not SIMCLR}
        for seed in range(sizes.seeds):
            folder = run_folder(work, EXPERIMENT, arm, seed)
            whole = data_and_train([shards / "train"], folder, sizes.steps, sizes.batch, seed)
            data = {**whole["data"], "augmentations": AUGMENTATIONS}
            tree = {**whole, "data": data, "model": {"towers": towers}, "objectives": [ARMS[arm]]}
            found.append(Job(EXPERIMENT, arm, seed, tree, folder, shards, ("train",), "neighbours"))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for shards and runs; what is there is kept")
    parser.add_argument("--quick", action="store_true", help="three arms, one seed: under three minutes with --jobs 2")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, one core each")
    parser.add_argument("--seeds", type=int, help="seeds 0, 1, …; default: 3, quick 1")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), help="default: all, quick three")
    parser.add_argument("--out", type=Path, help="JSON")
    options = parser.parse_args()
    chosen = QUICK if options.quick else FULL
    given = {name: value for name, value in (("seeds", options.seeds), ("arms", options.arms)) if value is not None}
    sizes = Sizes(**{**asdict(chosen), **given})
    work = (options.work / "quick" if options.quick else options.work).absolute()
    prepare(work / "shards", sizes)
    jobs = jobs_of(sizes, work, work / "shards")
    with ProcessPoolExecutor(options.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        found = {EXPERIMENT: summary(run_all(jobs, pool, run), COMPARED)}
    print(table(found))
    if options.out is not None:
        settings = {**asdict(sizes), "towers": TOWERS, "augmentations": AUGMENTATIONS, "arms": ARMS}
        text = json.dumps({"settings": settings, **found}, indent=1, ensure_ascii=False)
        options.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
