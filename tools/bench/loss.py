"""Contrastive losses, forward and backward, beside open_clip's, as JSON: time and extra peak memory.

    python tools/bench/loss.py                    # all of it, a few minutes
    python tools/bench/loss.py --only beside --losses siglip --rows 1024

``beside``: InfoNCE and SigLIP on 2 processes beside ``ClipLoss(local_loss=True, gather_with_grad=True)`` and
``SigLipLoss``. ``doubled``: our extra memory at twice the rows. ``one``: that of one process of 32,768 rows.
``table``: value and gradients of every way to gather (``clip_table.py``).

Each loss runs in fresh processes of one thread each (gloo), so that one leaves no warm memory to the other; ours and
the peer take turns. Seconds are of the fastest call, by the clock and of the CPU; of the slowest process. Extra memory
is the peak of the resident set above what it was before the first call.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import clip_table
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor

Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
STARTS = {"infonce": (1 / 0.07, 0.0), "siglip": (10.0, -10.0)}
"""scale and bias of each loss, where training starts"""


def ours(loss: str) -> Loss:
    from mmcl.distributed import Comm, Form, contrastive

    comm, form = Comm.current(), Form(loss)  # type: ignore[arg-type]
    return lambda a, b, scale, bias: contrastive(a, b, scale=scale, bias=bias, comm=comm, form=form)


def open_clip_loss(loss: str) -> Loss:
    from open_clip.loss import ClipLoss, SigLipLoss

    ranks = {"rank": dist.get_rank(), "world_size": dist.get_world_size()}
    if loss == "siglip":
        siglip = SigLipLoss(**ranks)
        return lambda a, b, scale, bias: siglip(F.normalize(a, dim=1), F.normalize(b, dim=1), scale, bias)
    clip = ClipLoss(local_loss=True, gather_with_grad=True, cache_labels=True, **ranks)
    return lambda a, b, scale, bias: clip(F.normalize(a, dim=1), F.normalize(b, dim=1), scale)


SIDES = {"mmcl": ours, "open_clip": open_clip_loss}


@dataclass(frozen=True)
class Case:
    """One loss of one side at one size."""

    side: str
    loss: str
    rows: int
    width: int
    processes: int
    repeats: int


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


class PeakMemory:
    """The highest resident set while it runs, looked at every 2 ms."""

    def __enter__(self) -> PeakMemory:
        self.start_bytes = self.peak_bytes = resident_bytes()
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()
        return self

    def _watch(self) -> None:
        while not self.done.wait(0.002):
            self.peak_bytes = max(self.peak_bytes, resident_bytes())

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self.thread.join()


def measure(rank: int, case: Case, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=case.processes)
    torch.manual_seed(rank)
    a, b = (torch.randn(case.rows, case.width, requires_grad=True) for _ in range(2))
    scale, bias = (torch.tensor(x, requires_grad=True) for x in STARTS[case.loss])
    loss = SIDES[case.side](case.loss)
    loss(a[:8], b[:8], scale, bias).backward()  # loads libraries, opens connections
    a.grad, b.grad = torch.zeros_like(a), torch.zeros_like(b)
    seconds, cpu_seconds, value = [], [], 0.0
    with PeakMemory() as memory:
        for _ in range(case.repeats):
            dist.barrier()
            start, cpu_start = time.perf_counter(), time.process_time()
            out = loss(a, b, scale, bias)
            out.backward()
            seconds.append(time.perf_counter() - start)
            cpu_seconds.append(time.process_time() - cpu_start)
            value = float(out.detach())
            del out
    extra_bytes = memory.peak_bytes - memory.start_bytes
    result = {"seconds": min(seconds), "cpu_seconds": min(cpu_seconds), "extra_bytes": extra_bytes, "loss": value}
    Path(folder, f"{rank}.json").write_text(json.dumps(result))
    dist.destroy_process_group()


def run(case: Case) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(measure, (case, folder), case.processes)
        ranks = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(case.processes)]
    slowest = {name: max(r[name] for r in ranks) for name in ("seconds", "cpu_seconds", "extra_bytes")}
    return {**slowest, "loss": statistics.mean(r["loss"] for r in ranks)}


def summary(runs: list[dict[str, float]]) -> dict[str, float]:
    return {
        "seconds": round(min(r["seconds"] for r in runs), 3),
        "cpu_seconds": round(min(r["cpu_seconds"] for r in runs), 3),
        "extra_megabytes": round(statistics.median(r["extra_bytes"] for r in runs) / 1e6, 1),
        "loss": runs[0]["loss"],
    }


def beside(loss: str, options: argparse.Namespace) -> dict[str, Any]:
    """Ours and the peer's, in turns."""
    sizes = (loss, options.rows, options.width, 2, options.repeats)
    rounds = [{side: run(Case(side, *sizes)) for side in SIDES} for _ in range(options.rounds)]
    found: dict[str, Any] = {side: summary([r[side] for r in rounds]) for side in SIDES}
    for figure in ("seconds", "cpu_seconds", "extra_megabytes"):
        found[f"{figure}_ratio"] = round(found["mmcl"][figure] / found["open_clip"][figure], 3)
    return found


def doubled(loss: str, options: argparse.Namespace) -> dict[str, Any]:
    """Extra memory of ours at twice the rows over that at once; the tile's share is the same in both."""
    found = {rows: run(Case("mmcl", loss, rows, options.width, 2, 1)) for rows in (options.rows, 2 * options.rows)}
    megabytes = {str(rows): round(r["extra_bytes"] / 1e6, 1) for rows, r in found.items()}
    first, second = megabytes.values()
    return {"extra_megabytes": megabytes, "ratio": round(second / first, 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4096, help="of each of 2 processes")
    parser.add_argument("--rows-of-one", type=int, default=32_768, help="of one process")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=2, help="calls per round; the fastest counts")
    parser.add_argument("--rounds", type=int, default=3, help="how often ours and the peer take turns")
    parser.add_argument("--losses", nargs="+", default=list(STARTS), choices=list(STARTS))
    parts = ("beside", "doubled", "one", "table")
    parser.add_argument("--only", nargs="+", default=list(parts), choices=parts)
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)
    os.environ["PYTHONWARNINGS"] = "ignore::FutureWarning"  # the peer's, in every process
    report: dict[str, Any] = {"rows": options.rows, "width": options.width, "processes": 2}
    for loss in options.losses:
        report[loss] = {}
        if "beside" in options.only:
            report[loss] = beside(loss, options)
        if "doubled" in options.only:
            report[loss]["doubled_rows"] = doubled(loss, options)
        if "one" in options.only:
            alone = run(Case("mmcl", loss, options.rows_of_one, options.width, 1, 1))
            report[loss]["one_process"] = {"rows": options.rows_of_one, **summary([alone])}
    if "table" in options.only:
        report["table"] = clip_table.measure(2)
        print(clip_table.as_text(report["table"]))
    text = json.dumps(report, indent=1)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
