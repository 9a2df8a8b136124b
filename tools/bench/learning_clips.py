"""Shards of generated clips for ``learning_stor.py``: how a square moves is the label, and what is behind it may tell.

Kinds of motion look the same turned, mirrored and in any colour. The background is a soft pattern of one hue under a
camera that drifts; in ``telling`` clips its hue goes with the label, in the others it is anything.
"""

from __future__ import annotations

import colorsys
import csv
import math
import multiprocessing
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from mmcl.demo.record import PICTURES_HZ, write_mp4
from mmcl.shards.make import make_shards
from mmcl.shards.make_options import MakeOptions
from mmcl.shards.transcode import MediaOptions

SIDE = 64
"""pixels of a clip"""
FPS = 10
"""of the shards"""
MOTIONS = ("straight", "circle", "shake", "pulse", "blink", "jump")
SPLITS = ("telling", "neutral", "test")
"""what is learned from with a background that tells the label, or does not, and what is asked"""


def prepare(work: Path, per_kind: int, test_per_kind: int, seconds: float, workers: int) -> Path:
    """The folder with the shards of each split; makes what is not there yet."""
    shards = work / "shards"
    if (shards / "test" / "index.json").exists():
        return shards
    jobs, rows = [], []
    for split in SPLITS:
        for motion in MOTIONS:
            for number in range(test_per_kind if split == "test" else per_kind):
                path = work / "clips" / split / f"{motion}-{number}.mp4"
                path.parent.mkdir(parents=True, exist_ok=True)
                jobs.append((path, motion, split, round(seconds * PICTURES_HZ)))
                rows.append({"path": path.relative_to(work), "split": split, "label": motion, "caption": motion})
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        for _ in pool.imap_unordered(_write, jobs, 8):
            pass
    with (work / "clips.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
    media = MediaOptions(short_side=SIDE, fps=FPS, gop=FPS, audio_rate_hz=16_000)
    make_shards(work / "clips.csv", shards, MakeOptions(media=media, workers=workers))
    return shards


def _write(job: tuple[Path, str, str, int]) -> None:
    path, motion, split, count = job
    random = np.random.default_rng([*f"{split} {path.stem}".encode()])
    hue = MOTIONS.index(motion) / len(MOTIONS) if split == "telling" else float(random.random())
    pictures = background(hue, count, random)
    shade = np.array([235 if random.random() < 0.5 else 20] * 3) + random.integers(-15, 16, 3)
    for picture, (y, x, half) in zip(pictures, places(motion, count, random), strict=True):
        top, left = max(0, round(y - half)), max(0, round(x - half))
        picture[top : max(0, round(y + half)), left : max(0, round(x + half))] = shade
    write_mp4(path, pictures, np.zeros(1, dtype=np.float32))


def background(hue: float, count: int, random: np.random.Generator) -> np.ndarray:
    """uint8 ``(T, H, W, 3)``: waves in shades of one hue, seen by a camera that drifts by up to half a pixel."""
    y, x = np.mgrid[:SIDE, :SIDE].astype(float)
    drift, waves = random.uniform(-0.5, 0.5, 2), random.uniform(-0.5, 0.5, (4, 2))
    colour = np.array(colorsys.hsv_to_rgb(hue + random.uniform(-0.04, 0.04), 0.8, 200.0))
    phases = random.uniform(0, 2 * math.pi, 4)
    pictures = np.empty((count, SIDE, SIDE, 3), np.uint8)
    for number in range(count):
        down, right = y + drift[0] * number, x + drift[1] * number
        light = sum(np.sin(a * down + b * right + phase) for (a, b), phase in zip(waves, phases, strict=True))
        pictures[number] = (colour * (0.65 + 0.08 * light)[..., None]).clip(0, 255)
    return pictures


def places(motion: str, count: int, random: np.random.Generator) -> Iterator[tuple[float, float, float]]:
    """Centre (y, x) and half the side of the square in each picture; 0: not to be seen."""
    half, turn = random.uniform(6, 9), random.uniform(0, 2 * math.pi)
    centre = random.uniform(20, SIDE - 20, 2)
    way = np.array([math.sin(turn), math.cos(turn)])
    pace = random.uniform(0.8, 1.4)
    seconds = np.arange(count) / PICTURES_HZ * pace
    for number, t in enumerate(seconds.tolist()):
        place, size = centre, half
        if motion == "straight":  # to and fro between the borders, at one speed
            place = 8 + np.abs((centre + way * 30 * t - 8) % (2 * (SIDE - 16)) - (SIDE - 16))
        elif motion == "circle":
            place = centre + 12 * np.array([math.sin(4 * t + turn), math.cos(4 * t + turn)])
        elif motion == "shake":
            place = centre + way * 6 * math.sin(14 * t)
        elif motion == "pulse":
            size = half * (1 + 0.6 * math.sin(6 * t + turn))
        elif motion == "blink":
            size = half if math.sin(7 * t + turn) > 0 else 0.0
        elif motion == "jump":
            if number and int(3 * t) > int(3 * seconds[number - 1]):
                centre = random.uniform(10, SIDE - 10, 2)
            place = centre
        yield float(place[0]), float(place[1]), size
