"""What ``ObjectiveMix`` costs beside its terms: five objectives in one mix, and the same five one after the other.

    python tools/bench/mix.py --out tools/bench/results/mix.json

Both sides work on the same rows of one process and one thread, forward and backward; they take turns, each first in
every other pair. Overhead is the ratio of their CPU seconds less one, and its median over the pairs counts.

A mix holds five graphs at once. Where glibc gives what one call frees back to the system and the next has to fault it
in again, that larger heap costs time of its own, which is no work of the mix: so it is measured both ways, first as
glibc has it, then with freed memory kept. The bar is for the second.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import resource
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmcl.config import build
from mmcl.distributed import Comm
from mmcl.model import MultimodalModel
from mmcl.objectives.base import ObjectiveMix
from mmcl.recipe import RunConfig, build_model
from mmcl.types import Batch, Embeddings, ViewBatch

TREE: dict[str, Any] = {
    "model": {
        "towers": {"video": {"name": "tiny_video"}, "audio": {"name": "tiny_audio"}, "text": {"name": "tiny_text"}},
    },
    "objectives": [
        {"name": "cross_modal"},
        {"name": "intra_modal", "tower": "video", "method": {"name": "simclr", "hidden": 512}},
        {"name": "intra_modal", "tower": "audio", "method": {"name": "vicreg", "hidden": 512, "out": 512}},
        {"name": "persistency", "tower": "video", "method": {"name": "moco", "hidden": 512, "queue": 4096}},
        {"name": "mutual", "towers": ["video", "audio"], "keys": "online", "queue": 0},
    ],
    "data": {"shards": "none"},
    "train": {"out": "none", "steps": 1, "global_batch": 1},
}
BAR = 0.03


def keep_freed_memory() -> bool:
    """Whether this process now keeps what it frees; glibc alone can."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    trim_threshold, mmap_threshold = -1, -3
    return mallopt is not None and bool(mallopt(mmap_threshold, 1 << 30) and mallopt(trim_threshold, -1))


def page_faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def random_embeddings(model: MultimodalModel, mix: ObjectiveMix, rows: int) -> Embeddings:
    """Leaves for everything that the mix needs."""
    present = torch.ones(rows, dtype=torch.bool)
    none = torch.full((rows,), -1)
    views = {need.view: ViewBatch(torch.zeros(rows, 1), present) for need in mix.needs}
    batch = Batch(views, tuple(map(str, range(rows))), torch.arange(rows), none[:, None], none)
    widths = {"joint": model.options.joint_width}
    infos = model.tower_infos()
    values = {
        (need.tower, need.view, level, need.kind): torch.randn(
            rows, widths.get(level, infos[need.tower].width), requires_grad=need.kind == "online"
        )
        for need in mix.needs
        for level in need.levels
    }
    return Embeddings(values, batch, {name: scale.detach() for name, scale in model.scales().items()})


def cpu_seconds(losses: Any) -> tuple[float, float]:
    """Of the forward and backward of each loss, and the sum of their values."""
    value, start = 0.0, time.process_time()
    for make in losses:
        loss: Tensor = make()
        torch.autograd.backward(loss)
        value += float(loss.detach())
    return time.process_time() - start, value


def measure(rows: int, pairs: int, calls: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, mix = build_model(build(RunConfig, TREE, where="mix"))
    embeddings, comm = random_embeddings(model, mix, rows), Comm()
    whole = [lambda: mix(embeddings, comm).loss] * calls
    each = [lambda o=o: o(embeddings, comm).loss for o in mix.objectives.values()] * calls
    cpu_seconds([*whole[:2], *each[:10]])
    sides = {"mix": whole, "sum": each}
    found, faults = [], dict.fromkeys(sides, 0)
    for number in range(pairs):
        taken = {}
        for name in list(sides) if number % 2 == 0 else list(sides)[::-1]:
            before = page_faults()
            taken[name] = cpu_seconds(sides[name])
            faults[name] += page_faults() - before
        assert abs(taken["mix"][1] / taken["sum"][1] - 1) < 1e-4, "both sides compute the same losses"
        found.append({name: seconds / calls for name, (seconds, _) in taken.items()})
    overheads = sorted(pair["mix"] / pair["sum"] - 1 for pair in found)
    return {
        "rows": rows,
        "terms": list(mix.objectives),
        "pairs": pairs,
        "calls": calls,
        "seconds_sum": statistics.median(pair["sum"] for pair in found),
        "overhead": statistics.median(overheads),
        "overhead_quartiles": statistics.quantiles(overheads, n=4)[::2],
        "page_faults_per_call": {name: count // (pairs * calls) for name, count in faults.items()},
        "bar": BAR,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[64, 256, 1024])
    parser.add_argument("--pairs", type=int, default=31)
    parser.add_argument("--calls", type=int, help="of each side in a pair; default: by rows, a fifth of a second or so")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    results = {}
    for memory, prepare in (("memory as glibc has it", lambda: True), ("freed memory kept", keep_freed_memory)):
        if prepare():
            calls = [options.calls or max(1, 512 // rows) for rows in options.rows]
            sizes = zip(options.rows, calls, strict=True)
            results[memory] = [measure(rows, options.pairs, calls) for rows, calls in sizes]
    print(json.dumps(results, indent=1))
    if options.out is not None:
        options.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
