"""Reading and decoding shards beside others in one run, as JSON; the last lines are the ratios, better above 1.

    python tools/bench/loader.py --quick

``decode``: two clips of 8 frames at 112 px and 2 s of log-mel of each sample, from the same shards, by several loaders.
``source``: the same tensors from source files (keyframe every 250) by the plain loop, and by us from the shards that
``mmcl shards make`` writes of them with its defaults. ``read``: the bytes of every sample of an indexed local shard.
``scale``: a manifest of 10⁶ shards and 10¹⁰ samples, opened in a fresh process at draw 5·10⁹.
Sides take turns, one thread each; CPU and wall seconds are medians of ``--repeats`` turns after one that does not
count.
Parts that other files of this folder measure (``PARTS``) follow where they are there.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import loader_sides as sides
import torch
from loader_media import encode_clip, write_media_shard, write_shard
from loader_split import split

from mmcl.shards import load_manifest
from mmcl.shards.index import index_shards
from mmcl.shards.make import make_shards
from mmcl.shards.make_options import MakeOptions
from mmcl.shards.reader import ShardReader
from mmcl.types import Decoder

PARTS = {"remote": "loader_remote", "make": "loader_make"}
"""name → module with ``measure(quick) -> dict``; a key that ends in ``ratio`` is printed with the others"""
RESULTS = Path(__file__).parent / "results" / "loader.json"
DECODERS: tuple[Decoder, ...] = ("pyav", "decord", "torchcodec")
OTHERS = ("torchcodec", "torchcodec approximate", "spdl")


def cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def take_turns(calls: dict[str, Callable[[], int]], repeats: int) -> dict[str, dict[str, float]]:
    """Medians per sample of calls that each say how many samples they read."""
    figures: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for turn in range(repeats + 1):
        for name, call in calls.items():
            cpu, wall = cpu_seconds(), time.perf_counter()
            rows = call()
            if turn:
                figures[name].append(((cpu_seconds() - cpu) / rows, (time.perf_counter() - wall) / rows))
    report: dict[str, dict[str, float]] = {}
    for name, turns in figures.items():
        cpu, wall = (statistics.median(column) for column in zip(*turns, strict=True))
        report[name] = {"cpu_ms": 1e3 * cpu, "wall_ms": 1e3 * wall, "samples_per_cpu_second": 1 / cpu}
    return report


def of(side: sides.Side, folder: Path, count: int) -> Callable[[], int]:
    def call() -> int:
        rows = side(folder, count)
        assert rows == count, f"{rows} of {count} samples"
        return rows

    return call


def measure_decode(work: Path, clips: list[bytes], samples: int, repeats: int) -> dict[str, Any]:
    folder = write_media_shard(work / "decode", clips, samples, sides.CLIP_SECONDS)
    loops = {
        "plain": sides.plain(sides._resized_frames),
        "plain, resized as one tensor": sides.plain(sides._resized_clip),
        "plain, opened once": sides.plain_one_open,
        "torchcodec": sides.torchcodec("exact"),
        "torchcodec approximate": sides.torchcodec("approximate"),
        "spdl": sides.spdl,
    }
    calls = {f"mmcl {decoder}": of(sides.ours(decoder), folder, samples) for decoder in DECODERS}
    calls |= {name: of(sides.through_webdataset(decode), folder, samples) for name, decode in loops.items()}
    report: dict[str, Any] = dict(take_turns(calls, repeats))
    for decoder in DECODERS:
        mine = report[f"mmcl {decoder}"]["cpu_ms"]
        report[f"{decoder}, plain ratio"] = report["plain"]["cpu_ms"] / mine
        report[f"{decoder}, plain as one tensor ratio"] = report["plain, resized as one tensor"]["cpu_ms"] / mine
        report[f"{decoder}, best other ratio"] = min(report[name]["cpu_ms"] for name in OTHERS) / mine
        report[f"{decoder} split"] = split(sides.ours(decoder), folder, 4 * samples)
        report[f"{decoder}, share that is not decoding"] = report[f"{decoder} split"]["not_decoding"]
    return report


def measure_source(work: Path, clips: list[bytes], samples: int, repeats: int) -> dict[str, Any]:
    """Sources as they come, through the plain loop; and through ``make`` once, then read by us."""
    sources = write_media_shard(work / "source", clips, samples, sides.CLIP_SECONDS)
    files = work / "files"
    files.mkdir()
    for number in range(samples):
        Path(files, f"{number:04d}.mp4").write_bytes(clips[number % len(clips)])
        Path(files, f"{number:04d}.txt").write_text(f"clip {number}", encoding="utf-8")
    (made,) = make_shards(files, work / "made", MakeOptions(workers=2)).folders
    calls = {f"mmcl {decoder}": of(sides.ours(decoder), made, samples) for decoder in DECODERS}
    plain = sides.through_webdataset(sides.plain(sides._resized_frames))
    tensor = sides.through_webdataset(sides.plain(sides._resized_clip))
    calls |= {"plain": of(plain, sources, samples), "plain, resized as one tensor": of(tensor, sources, samples)}
    report: dict[str, Any] = dict(take_turns(calls, repeats))
    for decoder in DECODERS:
        mine = report[f"mmcl {decoder}"]["cpu_ms"]
        report[f"{decoder}, plain ratio"] = report["plain"]["cpu_ms"] / mine
        report[f"{decoder}, plain as one tensor ratio"] = report["plain, resized as one tensor"]["cpu_ms"] / mine
    return report


def measure_read(work: Path, samples: int, repeats: int) -> dict[str, Any]:
    folder = work / "read"
    write_shard(folder / "0.tar", [{"mp4": bytes(4_000), "txt": b"a clip", "json": b"{}"}] * samples)
    index_shards(folder)

    def ours() -> int:
        manifest = load_manifest(folder)
        reader = ShardReader(manifest)
        return sum(len(reader.read(0, index).members) == 3 for index in range(int(manifest.sizes[0])))

    def plain() -> int:
        import webdataset as wds

        return sum(1 for _ in wds.WebDataset([str(folder / "0.tar")], shardshuffle=False))

    report: dict[str, Any] = dict(take_turns({"mmcl": ours, "plain": plain}, repeats))
    report["plain ratio"] = report["plain"]["cpu_ms"] / report["mmcl"]["cpu_ms"]
    return report


FRESH = """
import sys, time
def resident_mb(field):
    line, = (line for line in open("/proc/self/status") if line.startswith(field))
    return int(line.split()[1]) / 1024
started = time.perf_counter()
import numpy as np
from mmcl.data.order import MixedOrder
from mmcl.shards import load_manifest
imported, before = time.perf_counter(), resident_mb("VmRSS")
manifest = load_manifest(sys.argv[1])
order = MixedOrder([manifest.sizes], [1], seed=0, streams=64, block=256, shuffle=True)
places = order.locate(np.arange(int(sys.argv[2]), int(sys.argv[2]) + 256))
print(manifest.num_shards, manifest.num_samples, len(set(zip(*(part.tolist() for part in places)))),
      time.perf_counter() - imported, before, resident_mb("VmHWM"))
"""
"""the peak from /proc: a child's ru_maxrss begins at what its parent held"""


def measure_scale(work: Path, shards: int, repeats: int) -> dict[str, Any]:
    """The first 256 draws from the middle of an epoch; seconds with and without the imports of a fresh process."""
    from mmcl.shards.manifest import ShardEntry, write_manifest

    folder = work / "many"
    folder.mkdir()
    write_manifest(folder, (ShardEntry(f"{number:07d}.tar", 10_000, 1 << 30) for number in range(shards)))
    turns = []
    for _ in range(repeats):
        started = time.perf_counter()
        command = [sys.executable, "-c", FRESH, str(folder), str(shards * 10_000 // 2)]
        printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
        found, samples, places, opening, before, peak = (float(text) for text in printed)
        assert (found, samples, places) == (shards, shards * 10_000, 256), printed
        turns.append((opening, time.perf_counter() - started, before, peak))
    opening, whole, before, peak = (statistics.median(column) for column in zip(*turns, strict=True))
    return {
        "shards": shards,
        "samples": shards * 10_000,
        "first_draw": shards * 10_000 // 2,
        "opening_seconds": opening,
        "process_seconds": whole,
        "imports_resident_mb": before,
        "peak_resident_mb": peak,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer samples, under three minutes; writes no file")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help=f"where the JSON goes; default without --quick: {RESULTS}")
    options = parser.parse_args()
    torch.set_num_threads(1)
    clips, samples, files = (4, 8, 4_000) if options.quick else (12, 24, 20_000)
    report: dict[str, Any] = {"quick": options.quick, "repeats": options.repeats}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        short, long = ([encode_clip(sides.CLIP_SECONDS, seed, gop) for seed in range(clips)] for gop in (30, 250))
        report["decode"] = measure_decode(work, short, samples, options.repeats)
        report["source"] = measure_source(work, long, samples, options.repeats)
        report["read"] = measure_read(work, files, options.repeats)
        report["scale"] = measure_scale(work, 1_000_000, options.repeats)
    for name, module in PARTS.items():
        if importlib.util.find_spec(module) is not None:
            report[name] = importlib.import_module(module).measure(options.quick)
    text = json.dumps(report, indent=2)
    target = options.out or (None if options.quick else RESULTS)
    if target is not None:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text + "\n", encoding="utf-8")
    print(text)
    for line in summary(report):
        print(line)


def summary(report: dict[str, Any]) -> list[str]:
    lines = []
    for part, figures in report.items():
        if isinstance(figures, dict):
            for name, value in figures.items():
                if isinstance(value, float) and name.endswith(("ratio", "seconds", "mb", "not decoding")):
                    lines.append(f"{part}: {name}: {value:.2f}")
    lines.append(f"read: samples per CPU second: {report['read']['mmcl']['samples_per_cpu_second']:,.0f}")
    return lines


if __name__ == "__main__":
    main()
