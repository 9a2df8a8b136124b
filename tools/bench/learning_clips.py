"""Shards of generated clips for ``learning_stor.py``: how a square changes is the label; what is behind it may tell.

The changes look the same turned, mirrored and in any colour, and a single picture tells them in part at most. The
background is a soft pattern of one hue that stands still; in ``telling`` clips its hue goes with the label, in the
others it is anything.
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
CHANGES = ("still", "pulse", "stretch", "blink", "flash", "fade")
MIDDLE = (22, 42)
"""where the square's centre may be"""
BEATS_HZ = 1.6
"""how often a square does the same again, at its middle pace"""
SPLITS = ("telling", "neutral", "test")
"""what is learned from with a background that tells the label, or does not, and what is asked"""


def prepare(work: Path, per_kind: int, test_per_kind: int, seconds: float, workers: int) -> Path:
    """The folder with the shards of each split; makes what is not there yet."""
    shards = work / "shards"
    if (shards / "test" / "index.json").exists():
        return shards
    jobs, rows = [], []
    for split in SPLITS:
        for change in CHANGES:
            for number in range(test_per_kind if split == "test" else per_kind):
                path = work / "clips" / split / f"{change}-{number}.mp4"
                path.parent.mkdir(parents=True, exist_ok=True)
                jobs.append((path, change, split, round(seconds * PICTURES_HZ)))
                rows.append({"path": path.relative_to(work), "split": split, "label": change, "caption": change})
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
    path, change, split, count = job
    write_mp4(path, film(change, split, path.stem, count), np.zeros(1, dtype=np.float32))


def film(change: str, split: str, name: str, count: int) -> np.ndarray:
    """uint8 ``(T, H, W, 3)``: the clip of this name, always the same."""
    random = np.random.default_rng([*f"{split} {name}".encode()])
    hue = CHANGES.index(change) / len(CHANGES) if split == "telling" else float(random.random())
    pictures = np.repeat(background(hue, random)[None], count, 0)
    for picture, (top, bottom, left, right, shade) in zip(pictures, squares(change, count, random), strict=True):
        picture[top:bottom, left:right] = shade
    return pictures


def background(hue: float, random: np.random.Generator) -> np.ndarray:
    """uint8 ``(H, W, 3)``: waves in shades of one hue."""
    y, x = np.mgrid[:SIDE, :SIDE].astype(float)
    light = np.zeros_like(y)
    for down, right, phase in zip(*random.uniform(-0.5, 0.5, (2, 4)), random.uniform(0, 2 * math.pi, 4), strict=True):
        light += np.sin(down * y + right * x + phase)
    colour = np.array(colorsys.hsv_to_rgb(hue + random.uniform(-0.04, 0.04), 0.8, 200.0))
    picture: np.ndarray = (colour * (0.7 + 0.03 * light)[..., None]).clip(0, 255).astype(np.uint8)
    return picture


def squares(change: str, count: int, random: np.random.Generator) -> Iterator[tuple[int, int, int, int, int]]:
    """Borders (top, bottom, left, right) and shade of the square in each picture."""
    y, x = random.uniform(*MIDDLE, 2)
    half, phase = random.uniform(9, 12), random.random()
    pace, light, dark = BEATS_HZ * random.uniform(0.8, 1.25), random.uniform(220, 250), random.uniform(10, 40)
    for number in range(count):
        beat = math.sin(2 * math.pi * (phase + pace * number / PICTURES_HZ))
        high = wide = half
        shade = light
        if change == "pulse":
            high = wide = half * (1 + 0.5 * beat)
        elif change == "stretch":
            high, wide = half * (1 + 0.5 * beat), half * (1 - 0.5 * beat)
        elif change == "blink" and beat < 0:
            high = wide = 0
        elif change == "flash" and beat < 0:
            shade = dark
        elif change == "fade":
            shade = dark + (light - dark) * (0.5 + 0.5 * beat)
        yield round(y - high), round(y + high), round(x - wide), round(x + wide), round(shade)
