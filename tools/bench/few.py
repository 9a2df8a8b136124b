"""Where a contrastive loss of few rows is cheaper whole on every rank than shared between them.

    python tools/bench/few.py --out tools/bench/results/few.json

Three pairs of modalities, forward and backward, on 2 and 3 processes over gloo, a thread each: the two ways take turns,
and the median of the pairs' wall times counts. ``mmcl.distributed.few.FEW_ROWS`` is chosen by it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from mmcl.distributed import Comm, Pair, contrastive_pairs, few

WIDTH, ROUNDS, STEPS = 256, 7, 20
ROWS = (48, 96, 192, 384, 768)
"""of all ranks"""
WAYS = {"whole": max(ROWS), "shared": 0}


def milliseconds(rows: int, comm: Comm) -> dict[str, float]:
    """Of a step, both ways."""
    own = rows // comm.world_size
    sides = [torch.randn(own, WIDTH, requires_grad=True) for _ in range(3)]
    groups = comm.index(own)[:, None]

    def step() -> None:
        pairs = [Pair(sides[k], sides[k - 1], 10.0, groups=groups) for k in range(3)]
        torch.stack([loss for loss, _ in contrastive_pairs(pairs, comm=comm)]).sum().backward()

    seen: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(ROUNDS):
        for way, few.FEW_ROWS in WAYS.items():
            step()
            start = time.perf_counter()
            for _ in range(STEPS):
                step()
            seen[way].append(1000 * (time.perf_counter() - start) / STEPS)
    return {way: round(statistics.median(times), 2) for way, times in seen.items()}


def as_rank(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    found = {rows: milliseconds(rows, Comm.current()) for rows in ROWS}
    dist.destroy_process_group()
    if rank == 0:
        Path(folder, "found.json").write_text(json.dumps(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    options = parser.parse_args()
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    report: dict[str, Any] = {"cores": os.cpu_count(), "torch": torch.__version__, "limit": few.FEW_ROWS}
    for world in (2, 3):
        with tempfile.TemporaryDirectory() as folder:
            mp.spawn(as_rank, (world, folder), nprocs=world)
            report[str(world)] = json.loads(Path(folder, "found.json").read_text())
        for rows, each in report[str(world)].items():
            print(
                f"{rows:>4} rows on {world} processes: {each['whole']:6.2f} ms whole on each, "
                f"{each['shared']:6.2f} ms shared: {each['whole'] / each['shared']:.2f} ×"
            )
    if options.out is not None:
        options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
