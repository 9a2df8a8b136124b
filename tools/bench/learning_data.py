"""Shards of game recordings for ``learning.py``: 'still' cameras with sound and captions, and 'wandering' cameras.

Recorded screens of one game are alike to the pixel, so an untrained network names the game. Here every recording is
seen through a camera of its own that shows a part of the screen: the same part throughout, or one that wanders.
"""

from __future__ import annotations

import csv
import math
import multiprocessing
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np

from mmcl.demo.record import HELD_OUT, PICTURES_HZ, caption_of, list_games, record_games, write_mp4
from mmcl.shards.make import make_shards
from mmcl.shards.make_options import MakeOptions
from mmcl.shards.transcode import MediaOptions

SCREEN = (160, 210)
"""width and height of a recording in pixels"""
SHARE = (0.4, 0.7)
"""of the screen's width and height that a camera shows, uniform"""
PERIOD_SECONDS = (8.0, 24.0)
"""of a wandering camera's way to and fro, uniform, for each axis"""
FILM = (64, 84)
"""width and height of a film in pixels"""


@dataclass(frozen=True)
class Takes:
    """What is recorded."""

    games: int | None
    """the first so many; None: all that the demo trains on"""
    seeds: int
    """recordings per game to learn from, each played at random with a seed of its own"""
    test_seeds: int
    """recordings per game for the test"""
    seconds: float

    def splits(self) -> Iterator[tuple[str, str, int]]:
        """(name, the recorder's split, seed)"""
        yield from ((f"train_{seed}", "train", seed) for seed in range(self.seeds))
        yield from (("test", "test", seed) for seed in range(self.test_seeds))


def prepare(work: Path, takes: Takes, workers: int, *, wandering: bool) -> None:
    """Records, films and makes what is not there yet: ``work/still/shards`` and ``work/wandering/shards``."""
    games = [game for game in list_games() if game not in HELD_OUT][: takes.games]
    for seed in range(max(takes.seeds, takes.test_seeds)):
        folder = work / "recordings" / str(seed)
        if not (folder / "clips.csv").exists():
            record_games(
                folder,
                games=games,
                seed=seed,
                train_seconds=takes.seconds,
                test_seconds=takes.seconds,
                workers=workers,
            )
    media = MediaOptions(short_side=64, fps=4, gop=4, audio_rate_hz=16_000)
    for camera in ("still", "wandering") if wandering else ("still",):
        folder = work / camera
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "shards" / "test" / "index.json").exists():
            rows = list(_rows(work, takes, games, camera))
            if camera == "wandering":
                _film_all(work, rows, workers)
            _write_table(folder / "clips.csv", rows)
            make_shards(folder / "clips.csv", folder / "shards", MakeOptions(media=media, workers=workers))


def _rows(work: Path, takes: Takes, games: list[str], camera: str) -> Iterator[dict[str, object]]:
    """Rows of a table in ``work/CAMERA``; paths are relative, since keys, and all that is drawn by them, come from
    them.
    """
    for split, take, seed in takes.splits():
        for game in games:
            recording = Path("recordings", str(seed), take, f"{game}.mp4")
            if not (work / recording).exists():  # some games end their process
                continue
            row: dict[str, object] = {"split": split, "label": game, "caption": caption_of(game)}
            if camera == "wandering":
                yield {"path": Path("films", f"{take}_{seed}", f"{game}.mp4"), **row}
                continue
            chance = random.Random(f"{seed} {take} {game}")
            width, height = (round(side * chance.uniform(*SHARE)) // 2 * 2 for side in SCREEN)
            x, y = chance.randrange(SCREEN[0] - width + 1), chance.randrange(SCREEN[1] - height + 1)
            yield {"path": Path("..", recording), **row, "crop_x": x, "crop_y": y, "crop_w": width, "crop_h": height}


def _write_table(path: Path, rows: list[dict[str, object]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        table.writeheader()
        table.writerows(rows)


def _film_all(work: Path, rows: list[dict[str, object]], workers: int) -> None:
    jobs = []
    for row in rows:
        film = Path(str(row["path"]))
        take, seed = film.parent.name.split("_")
        if not (work / "wandering" / film).exists():
            jobs.append((work / "recordings" / seed / take / film.name, work / "wandering" / film, f"{seed} {take}"))
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        for _ in pool.imap_unordered(_film, jobs, 4):
            pass


def _film(job: tuple[Path, Path, str]) -> None:
    """One recording through a camera that wanders, without sound."""
    source, target, words = job
    chance = random.Random(f"{words} {source.stem}")
    share = chance.uniform(*SHARE)
    starts = [chance.random() for _ in SCREEN]
    periods = [chance.uniform(*PERIOD_SECONDS) for _ in SCREEN]
    pictures = []
    with av.open(str(source)) as container:
        for number, frame in enumerate(container.decode(video=0)):
            screen = frame.to_ndarray(format="rgb24")
            picture = screen
            for axis, pixels in enumerate(FILM[::-1]):
                side = round(screen.shape[axis] * share)
                turn = starts[axis] + number / PICTURES_HZ / periods[axis]
                first = round((screen.shape[axis] - side) * (0.5 + 0.5 * math.sin(2 * math.pi * turn)))
                picture = picture.take(first + np.arange(pixels) * side // pixels, axis=axis)
            pictures.append(picture)
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{os.getpid()}-{target.name}")
    write_mp4(part, np.stack(pictures), np.zeros(1, dtype=np.float32))
    part.replace(target)
