"""When checkpoints are taken, and writing them while the run goes on."""

from __future__ import annotations

import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist

from mmcl.distributed import Comm
from mmcl.distributed.sharded import FOLDER, write_sharded
from mmcl.recipe import TrainOptions
from mmcl.training.checkpoint import partial_folder
from mmcl.training.run_folder import RunFolder
from mmcl.training.snapshot import Snapshot
from mmcl.types import RunError


class Saver:
    """Writes snapshots in a thread of its own, one at a time: before the next is taken, the last one is written.

    A disk that cannot take one costs that checkpoint alone, and is said; only of the last one of a run it is an error.
    """

    def __init__(self, folder: RunFolder, options: TrainOptions, comm: Comm, *, sharded: bool) -> None:
        self.folder, self.options, self.comm = folder, options, comm
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._writing: Future[bool] | None = None
        self._last_seconds = time.monotonic()
        self._missed: set[str] = set()
        # its exchanges must not mix with those of the steps that go on meanwhile
        timeout = timedelta(seconds=options.timeout_seconds)
        group = dist.new_group(backend="gloo", timeout=timeout) if sharded else None
        self._group = group if isinstance(group, dist.ProcessGroup) else None

    def __enter__(self) -> Saver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown()

    def due(self, step: int) -> bool:
        """Whether a checkpoint is wanted after this step; by the clock of this rank, so ranks have to agree."""
        minutes = self.options.checkpoint_minutes
        by_clock = minutes is not None and time.monotonic() - self._last_seconds >= 60 * minutes
        return by_clock or step % self.options.checkpoint_every == 0

    def save(self, snapshot: Snapshot, *, last: bool) -> None:
        """Takes a snapshot to be written; every rank calls it. ``last``: waits for it.

        Raises:
            RunError: the last one could not be written.
        """
        self.wait()
        self._last_seconds = time.monotonic()
        if self.folder.writer:
            self._remark(snapshot.state["metrics"])
            self._writing = self._pool.submit(self._write, snapshot)
        elif snapshot.sharded:
            self._writing = self._pool.submit(self._write_part, snapshot)
        if last and not self.comm.all_agree(self.wait()):
            raise RunError(f"the checkpoint of step {snapshot.step}, the last one, was not written")

    def wait(self) -> bool:
        """Waits for what is being written; whether it is there."""
        writing, self._writing = self._writing, None
        return writing is None or writing.result()

    def _write(self, snapshot: Snapshot) -> bool:
        begun = False

        def write(folder: Path) -> None:
            nonlocal begun
            begun = True
            self._begin(True)
            if snapshot.sharded:
                write_sharded(folder / FOLDER, snapshot.sharded, self._group)
            snapshot.write(folder)

        options = self.options
        written = self.folder.checkpoint(snapshot.step, write, keep=options.keep_checkpoints, best=options.best)
        if not begun:
            self._begin(False)
        return written

    def _write_part(self, snapshot: Snapshot) -> bool:
        """Of a rank that is not the first: what it holds of a run that is split over ranks."""
        if not self._begin(True):
            return False
        try:
            folder = partial_folder(self.folder.path / "checkpoints", snapshot.step)
            write_sharded(folder / FOLDER, snapshot.sharded, self._group)
        except OSError:
            return False  # the first rank says so
        return True

    def _begin(self, ready: bool) -> bool:
        """Rank 0 tells the others whether there is a folder to write into."""
        if self._group is None:
            return ready
        flag = torch.tensor(int(ready))
        dist.broadcast(flag, 0, group=self._group)
        return bool(flag)

    def _remark(self, metrics: Mapping[str, Any]) -> None:
        best = self.options.best
        if best is not None and best.metric not in metrics and best.metric not in self._missed:
            self._missed.add(best.metric)
            print(
                f"warning: train.best.metric: {best.metric!r} is not among what was logged so far, no checkpoint is "
                f"the best; there are: {', '.join(metrics) or 'none'}",
                flush=True,
            )
