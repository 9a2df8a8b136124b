"""Whether memory stays flat over very many decoded samples, in the decoding process and in the one that reads from it.

    python tools/bench/soak.py --out tools/bench/results/soak.json

Resident memory is read between batches. Growth is the median of the last tenth over the median of the first tenth
after the warm-up. Some of the samples are damaged: what an error leaves behind counts too. Exit 1 where growth
reaches ``--limit``.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from loader_media import encode_clip, write_media_shard

from mmcl.data import ClipStream
from mmcl.media.video import Decoder
from mmcl.shards import load_manifest
from mmcl.types import AudioSpec, VideoSpec, View

VIEWS = (
    View(VideoSpec(frames=8, size=112, fps=6.25), 0),
    View(VideoSpec(frames=8, size=112, fps=6.25), 1),
    View(AudioSpec(sample_rate_hz=16_000, seconds=2.0)),
)


def resident_mb(pid: int) -> float:
    """Resident memory of a process."""
    for line in Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"process {pid} has no memory")


def write_shards(folder: Path, *, clips: int = 6, samples: int = 64, seconds: float = 4.0) -> None:
    """Sound clips, and after every seven of them one that is damaged: noise in its pictures, or its end cut off."""
    good = [encode_clip(seconds, seed, gop=25) for seed in range(clips)]
    noise = bytearray(good[0])
    noise[2_000:20_000] = np.random.default_rng(0).integers(0, 256, 18_000, np.uint8).tobytes()
    cycle = [good[n % clips] for n in range(7)] + [bytes(noise)]
    cycle += [good[n % clips] for n in range(7)] + [good[1][: len(good[1]) // 2]]
    write_media_shard(folder, cycle, samples, seconds)


def soak(
    folder: Path, *, samples: int, warm_up: int, decoder: Decoder, batch: int = 8, every: int = 10, part: int = 10
) -> dict[str, Any]:
    """Resident MB of both processes over so many samples, and how they grew after the warm-up.

    Memory is read after ``every`` batches; growth is from the first to the last ``1 / part`` of these.
    """
    others = set(multiprocessing.active_children())
    stream = ClipStream(load_manifest(folder), VIEWS, global_batch=batch, workers=1, decoder=decoder, seed=0)
    seen: dict[str, list[tuple[int, float]]] = {"worker": [], "trainer": []}
    started, holes, loads = time.perf_counter(), 0, [os.getloadavg()[0]]
    batches = iter(stream)
    for number, given in enumerate(itertools.islice(batches, samples // batch), 1):
        holes += len(given.skipped)
        if number % every == 0:
            (worker,) = set(multiprocessing.active_children()) - others
            seen["worker"].append((number * batch, resident_mb(worker.pid or 0)))
            seen["trainer"].append((number * batch, resident_mb(os.getpid())))
            loads.append(os.getloadavg()[0])
    batches.close()  # type: ignore[attr-defined]
    report: dict[str, Any] = {
        "samples": samples,
        "warm_up": warm_up,
        "decoder": decoder,
        "damaged": holes,
        "seconds": round(time.perf_counter() - started, 1),
        "machine": {"cores": os.cpu_count(), "median_load": round(statistics.median(loads), 1)},
    }
    for name, points in seen.items():
        after = [megabytes for count, megabytes in points if count > warm_up]
        ends = max(1, len(after) // part)
        first, last = statistics.median(after[:ends]), statistics.median(after[-ends:])
        step = max(1, len(points) // 40)
        report[name] = {
            "first_mb": round(first, 1),
            "last_mb": round(last, 1),
            "growth": round(last / first - 1, 4),
            "resident_mb": [(count, round(megabytes, 1)) for count, megabytes in points[::step]],
        }
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=20_000, help="of each decoder")
    parser.add_argument("--warm-up", type=int, default=2_000)
    parser.add_argument("--decoder", choices=get_args(Decoder), action="append", help="default: decord and pyav")
    parser.add_argument("--limit", type=float, default=0.05, help="growth that fails")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    options = parser.parse_args()
    torch.set_num_threads(1)
    reports = []
    with tempfile.TemporaryDirectory() as work:
        write_shards(Path(work))
        for decoder in options.decoder or ("decord", "pyav"):
            report = soak(Path(work), samples=options.samples, warm_up=options.warm_up, decoder=decoder)
            reports.append(report)
            for name in ("worker", "trainer"):
                grown = report[name]
                print(
                    f"{decoder} {name}: {grown['first_mb']} → {grown['last_mb']} MB, {grown['growth']:+.1%}", flush=True
                )
    if options.out is not None:
        options.out.write_text(json.dumps({"limit": options.limit, "runs": reports}) + "\n", encoding="utf-8")
    sys.exit(any(report[name]["growth"] >= options.limit for report in reports for name in ("worker", "trainer")))


if __name__ == "__main__":
    main()
