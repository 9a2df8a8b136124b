"""Ranks of retrieval beside the bare matrix product and beside a dense implementation, as JSON.

    python tools/bench/retrieval.py --quick                  # under 3 minutes
    python tools/bench/retrieval.py                          # with 100,000 x 100,000 x 512: an hour of one core

``ratio``: both directions' ranks with ties and top 10, in CPU seconds, over the product of the same tiles alone; the
two take turns, and the median of the pairs is what counts. ``beside``: ours and the dense implementation, each in a
process of its own: CPU seconds, and the peak of the resident set above what it was when the rows were there.
``equal``: both on rows whose scores are exact in float32, so that every rank, tie and top list must be the same.
``out``: the dense implementation in a process that may take 4 GiB more.

One thread, rows of unit length, 512 wide; the partner of a row is the row with noise.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from torch import Tensor

from mmcl.evaluation.ranking import ranks_both
from mmcl.evaluation.streaming import TILE_COLUMNS, TILE_ROWS

WIDTH = 512
TOP = 10
LIMIT_BYTES = 4 << 30
MOST_RATIO, MOST_MEGABYTES = 1.5, 1500
RESULTS = Path(__file__).parent / "results" / "retrieval.json"


def rows_of(count: int, *, exact: bool = False) -> tuple[Tensor, Tensor]:
    """Pairs; ``exact``: small multiples of 1/16, whose products and sums float32 holds."""
    random = torch.Generator().manual_seed(0)
    a = torch.randn(count, WIDTH, generator=random)
    b = torch.randn(count, WIDTH, generator=random).mul_(4).add_(a)
    if exact:
        return (a / 2).round() / 16, (b / 8).round() / 16
    return tuple(x.div_(x.norm(dim=1, keepdim=True)) for x in (a, b))  # type: ignore[return-value]


def ours(a: Tensor, b: Tensor) -> list[np.ndarray]:
    return [
        column
        for result in ranks_both(a, b, top=TOP)
        for column in (result.better, result.tied, result.top_indices.astype(np.int64))
    ]


def dense(a: Tensor, b: Tensor) -> list[np.ndarray]:
    """All scores at once, counted and sorted as one writes it down; equal scores by rising number."""
    scores = a @ b.T
    columns = []
    for each in (scores, scores.T):
        own = each.diagonal()[:, None]
        top = each.sort(dim=1, descending=True, stable=True).indices[:, :TOP]
        columns += [(each > own).sum(1), (each == own).sum(1), top]
    return [column.numpy() for column in columns]


def bare(a: Tensor, b: Tensor) -> None:
    """The products of the tiles, and nothing else."""
    memory = a.new_empty(TILE_ROWS * TILE_COLUMNS)
    for i in range(0, len(a), TILE_ROWS):
        left = a[i : i + TILE_ROWS]
        for j in range(0, len(b), TILE_COLUMNS):
            right = b[j : j + TILE_COLUMNS]
            torch.mm(left, right.T, out=memory[: len(left) * len(right)].view(len(left), len(right)))


def cpu_seconds(call: Callable[[Tensor, Tensor], object], a: Tensor, b: Tensor) -> float:
    start = time.process_time()
    call(a, b)
    return time.process_time() - start


def ratio(count: int, pairs: int, save: Callable[[dict[str, Any]], None]) -> None:
    a, b = rows_of(count)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew, whatever ran before
    cpu_seconds(bare, a[:4000], b[:4000])
    times: list[tuple[float, float]] = []
    for number in range(pairs):
        times.append((cpu_seconds(bare, a, b), cpu_seconds(ours, a, b)))
        ratios = sorted(mine / alone for alone, mine in times)
        figures = {
            "rows": count,
            "pairs": number + 1,
            "product_seconds": statistics.median(alone for alone, _ in times),
            "ours_seconds": statistics.median(mine for _, mine in times),
            "ratio": statistics.median(ratios),
            "lowest": ratios[0],
            "highest": ratios[-1],
            "whole_process_megabytes": _peak_bytes() / 1e6,
        }
        save(figures)
    print(
        f"{count:,} x {count:,}: ours / product alone = {figures['ratio']:.2f} "
        f"({ratios[0]:.2f} to {ratios[-1]:.2f}, {pairs} pairs), "
        f"process {figures['whole_process_megabytes']:.0f} MB; allowed at 100,000: {MOST_RATIO}, {MOST_MEGABYTES} MB"
    )


def _peak_bytes() -> int:
    return _status_bytes("VmHWM")


def _status_bytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) * 1024


def child(side: str, count: int, limit: bool) -> None:
    """What a process of its own measures, as JSON on stdout."""
    a, b = rows_of(count)
    if limit:
        data = _status_bytes("VmData")
        resource.setrlimit(resource.RLIMIT_DATA, (data + LIMIT_BYTES, data + LIMIT_BYTES))
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = _peak_bytes()
    try:
        seconds = cpu_seconds({"ours": ours, "dense": dense}[side], a, b)
    except (RuntimeError, MemoryError) as error:
        print(json.dumps({"error": str(error).splitlines()[0][-160:]}))
        return
    print(json.dumps({"seconds": seconds, "extra_megabytes": (_peak_bytes() - before) / 1e6}))


def _in_child(side: str, count: int, *, limit: bool = False) -> dict[str, Any]:
    command = [sys.executable, __file__, "--child", side, "--rows", str(count), *(["--limit"] if limit else [])]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    figures: dict[str, Any] = json.loads(done.stdout)
    return figures


def beside(count: int) -> dict[str, Any]:
    figures = {side: _in_child(side, count) for side in ("ours", "dense")}
    for side, each in figures.items():
        print(f"{side:>6} {count:,}: {each['seconds']:.2f} s, {each['extra_megabytes']:.0f} MB more")
    return {"rows": count, **figures}


def equal(count: int) -> dict[str, Any]:
    a, b = rows_of(count, exact=True)
    mine, theirs = ours(a, b), dense(a, b)
    same = all(np.array_equal(left, right) for left, right in zip(mine, theirs, strict=True))
    tied = int((mine[1] > 1).sum())
    print(f"ranks, ties and top {TOP} of {count:,} in both directions equal: {same} ({tied} queries with ties)")
    if not same:
        raise SystemExit("ours and dense differ")
    return {"rows": count, "equal": same, "queries_with_ties": tied}


def out_of_memory(count: int) -> dict[str, Any]:
    figures = {"rows": count, "scores_gigabytes": count**2 * 4 / 1e9, **_in_child("dense", count, limit=True)}
    print(f" dense {count:,}: {figures['scores_gigabytes']:.0f} GB of scores; {figures.get('error', 'fits')}")
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a ratio of 12,000 rows alone; writes no file")
    parser.add_argument("--rows", type=int, help="of the ratio alone, nothing else is run")
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--out", type=Path, help=f"where the JSON goes; default without --quick: {RESULTS}")
    parser.add_argument("--child", choices=["ours", "dense"], help=argparse.SUPPRESS)
    parser.add_argument("--limit", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.child:
        child(args.child, args.rows, args.limit)
        return
    target = args.out or (None if args.quick else RESULTS)
    results = json.loads(target.read_text()) if target is not None and target.exists() else {}

    def save(name: str, figures: dict[str, Any]) -> None:
        results[name] = figures
        if target is not None:
            target.write_text(json.dumps(results, indent=1) + "\n")

    if not args.rows:
        save("equal", equal(4_000))
        save("beside", beside(6_000))
        save("out", out_of_memory(100_000))
    for count in [args.rows] if args.rows else [12_000] if args.quick else [12_000, 100_000]:
        ratio(count, args.pairs, lambda figures, count=count: save(f"ratio_{count}", figures))  # type: ignore[misc]


if __name__ == "__main__":
    main()
