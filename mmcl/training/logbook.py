"""One line per logged step, of all ranks: in ``metrics.jsonl``, for trackers, for people."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from mmcl.distributed import Comm
from mmcl.progress import on_terminal
from mmcl.recipe import RunConfig
from mmcl.training.meter import Meter
from mmcl.training.nonfinite import jsonable
from mmcl.training.run_folder import RunFolder
from mmcl.training.snapshot import Progress
from mmcl.training.soundness import SilenceWatch
from mmcl.training.watching import CollapseAlarm


class Logbook:
    """What a run says of itself while it goes on."""

    def __init__(self, config: RunConfig, accelerator: Accelerator, comm: Comm, silence: SilenceWatch) -> None:
        self.config, self.accelerator, self.comm, self.silence = config, accelerator, comm, silence
        self.last: dict[str, Any] = {}
        """what was logged last, as JSON values"""
        self._alarm = CollapseAlarm(config.train.collapse)

    def write(
        self, folder: RunFolder, meter: Meter, progress: Progress, figures: Mapping[str, float], epochs: list[float]
    ) -> None:
        """Every rank calls it; ``figures`` are equal on all."""
        ranks = self.comm.gather_objects({"skipped": meter.take_skipped(), "cut": meter.take_cut(), **memory()})
        skipped = [record for rank in ranks for record in rank["skipped"]]
        progress.skipped += len(skipped)
        reasons = Counter(progress.skipped_by)
        reasons.update(str(record["reason"]) for record in skipped)
        progress.skipped_by = dict(sorted(reasons.items()))
        cut, before = sum(rank["cut"] for rank in ranks), progress.captions_cut
        progress.captions_cut += cut
        record = {
            "step": progress.step,
            "samples": progress.samples,
            **figures,
            **meter.rates(self.config.train.global_batch * self.config.train.accumulate),
            "skipped": progress.skipped,
            **{f"skipped/{reason}": count for reason, count in progress.skipped_by.items()},
            "captions_cut": progress.captions_cut,
            "nonfinite": progress.nonfinite,
            **({"overflowed": progress.overflowed} if self.config.train.precision == "fp16" else {}),
            **{name: max(rank[name] for rank in ranks) for name in memory()},
            **({"epoch": epochs[0]} if len(epochs) == 1 else {f"epoch/{n}": each for n, each in enumerate(epochs)}),
        }
        record["eta_seconds"] = (self.config.train.steps - progress.step) * meter.seconds_per_step
        self.last = {name: jsonable(value) for name, value in record.items()}
        if not self.accelerator.is_main_process:
            return
        last = progress.step == self.config.train.steps
        for line in [*self.silence.complaints(last=last), *self._alarm.lines(progress.step, figures)]:
            print(line, file=sys.stderr, flush=True)
        if cut and not before:
            print(f"{cut} captions were longer than their tower takes; captions_cut in metrics.jsonl counts them")
        folder.write_metrics(self.last)
        folder.write_skipped(sorted(skipped, key=lambda entry: int(entry["draw"])))
        self.accelerator.log({name: value for name, value in record.items() if name != "step"}, step=progress.step)
        meter.note = (
            f"loss {record['loss']:.3f}  {record['samples_per_second']:.0f} samples/s  "
            f"waiting for data {record['data_wait_fraction']:.0%}"
        ) + (f"  skipped {record['skipped']}" if record["skipped"] else "")
        if not on_terminal():
            print(f"step {record['step']}/{self.config.train.steps}  {meter.note}", flush=True)


def memory() -> dict[str, int]:
    """Bytes of this process: in memory now, and, with a GPU, the most that tensors ever had there."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    found = {"memory_bytes": pages * os.sysconf("SC_PAGE_SIZE")}
    if torch.cuda.is_available():
        found["cuda_peak_bytes"] = torch.cuda.max_memory_allocated()
    return found
