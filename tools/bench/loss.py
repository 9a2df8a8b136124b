"""Time and extra peak memory of the contrastive loss, forward and backward, beside open_clip's ``ClipLoss``, as JSON.

    python tools/bench/loss.py --processes 2 --rows 4096 --width 512

Each loss runs in fresh processes of one thread each (gloo), so that one leaves no warm memory to the other; the losses
take turns. Extra memory is the peak of the resident set above what it was before the first call.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def ours(tile: int | None) -> Loss:
    from mmcl.distributed import Comm, contrastive

    comm = Comm.current()
    return lambda a, b, scale: contrastive(a, b, scale=scale, comm=comm, tile=tile)


def open_clip_loss(tile: int | None) -> Loss:
    from open_clip.loss import ClipLoss

    rank, world = dist.get_rank(), dist.get_world_size()
    loss = ClipLoss(local_loss=True, gather_with_grad=True, cache_labels=True, rank=rank, world_size=world)
    return lambda a, b, scale: loss(F.normalize(a, dim=1), F.normalize(b, dim=1), scale)


LOSSES = {"mmcl": ours, "open_clip": open_clip_loss}


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


def measure(rank: int, name: str, options: argparse.Namespace, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=options.processes)
    torch.manual_seed(rank)
    a, b = (torch.randn(options.rows, options.width, requires_grad=True) for _ in range(2))
    scale = torch.tensor(options.scale, requires_grad=True)
    loss = LOSSES[name](options.tile)
    loss(a[:8], b[:8], scale).backward()  # loads libraries, opens connections
    a.grad, b.grad = torch.zeros_like(a), torch.zeros_like(b)
    seconds, value = [], 0.0
    with PeakMemory() as memory:
        for _ in range(options.repeats):
            dist.barrier()
            start = time.perf_counter()
            out = loss(a, b, scale)
            out.backward()
            seconds.append(time.perf_counter() - start)
            value = float(out.detach())
            del out
    result = {"seconds": min(seconds), "extra_bytes": memory.peak_bytes - memory.start_bytes, "loss": value}
    Path(folder, f"{rank}.json").write_text(json.dumps(result))
    dist.destroy_process_group()


def run(name: str, options: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(measure, (name, options, folder), options.processes)
        ranks = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(options.processes)]
    return {
        "seconds": max(r["seconds"] for r in ranks),
        "extra_bytes": max(r["extra_bytes"] for r in ranks),
        "loss": statistics.mean(r["loss"] for r in ranks),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rows", type=int, default=4096, help="of each process")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--scale", type=float, default=1 / 0.07)
    parser.add_argument("--repeats", type=int, default=3, help="calls per round; the fastest counts")
    parser.add_argument("--rounds", type=int, default=2, help="how often the losses take turns")
    parser.add_argument("--tile", type=int, help="of our loss")
    parser.add_argument("--losses", nargs="+", default=list(LOSSES), choices=list(LOSSES))
    options = parser.parse_args()
    rounds = [{name: run(name, options) for name in options.losses} for _ in range(options.rounds)]
    report: dict[str, Any] = {
        name: {
            "seconds": min(r[name]["seconds"] for r in rounds),
            "extra_megabytes": statistics.median(r[name]["extra_bytes"] for r in rounds) / 1e6,
            "loss": rounds[0][name]["loss"],
        }
        for name in options.losses
    }
    if set(options.losses) == set(LOSSES):
        for figure in ("seconds", "extra_megabytes"):
            report[f"{figure}_ratio"] = report["mmcl"][figure] / report["open_clip"][figure]
    print(json.dumps({**{k: v for k, v in vars(options).items() if k != "losses"}, **report}, indent=2))


if __name__ == "__main__":
    main()
