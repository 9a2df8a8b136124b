"""Worker processes: each decodes its part of every batch of its rank. Their death or standstill is noticed and named.

Underneath is a plain ``DataLoader``. What crosses from a worker is one tensor (see ``collate.pack``), so the message
that announces it is short enough for a pipe to take it whole or not at all: a worker that is killed while it sends
cannot leave half a message on which its parent would wait for ever.
"""

from __future__ import annotations

import gc
import itertools
import math
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.connection import wait
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from mmcl.data.collate import Row, collate, pack, unpack
from mmcl.data.journal import Journal, Note, short_name
from mmcl.data.plan import Plan
from mmcl.shards.ahead import ReadAhead, Stored
from mmcl.shards.files import is_remote
from mmcl.shards.members import parse_sample
from mmcl.shards.reader import RawSample, ShardReader
from mmcl.shards.sequential import Item, Problem, TarList
from mmcl.types import Batch, ConfigError, RunError, SampleError

Place: TypeAlias = tuple[int, int, int, int, int]
"""(draw, source, epoch, shard, index)"""

LOOK_SECONDS = 1.0
"""between two looks at whether workers live, while a batch is waited for"""


class PartStream(IterableDataset[Any]):
    """The parts that one worker decodes of batches ``first_step``, ``first_step + 1``, …

    In a worker process the items are packed; where a run cannot go on, the last one is the error that says why.
    """

    def __init__(self, plan: Plan, first_step: int, journal: Journal) -> None:
        self.plan, self.first_step, self.journal = plan, first_step, journal

    def __iter__(self) -> Iterator[Tensor]:
        info = get_worker_info()
        assert info is not None
        torch.set_num_threads(1)
        gc.freeze()  # what the imports left behind need not be walked through again and again
        # Ctrl-C reaches every process of a terminal; the trainer still wants batches for its last step
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        threading.Thread(target=_end_with_parent, name="parent-watch", daemon=True).start()
        self.journal.open(info.id)
        try:
            yield from map(pack, self.parts(info.id))
        except (RunError, ConfigError) as error:
            yield pack(error)

    def parts(self, worker: int) -> Iterator[Batch]:
        """Parts as batches."""
        plan, journal = self.plan, self.journal
        steps = self._planned(worker) if plan.tars is None else self._sequential(worker, plan.tars)
        with closing(steps):
            for step in steps:
                rows = []
                for draw, read in step:
                    if journal.stopped:
                        return
                    journal.begin(worker, draw)
                    rows.append(read(name=partial(journal.name, worker)))
                journal.clear(worker)
                yield collate(
                    rows,
                    plan.maker.views,
                    with_metadata=plan.with_metadata,
                    with_pools=plan.mixed,
                    blank=plan.maker.blank,
                )

    def _planned(self, worker: int) -> Generator[list[tuple[int, Callable[..., Row]]], None, None]:
        """Each draw of each batch with what reads it; remote samples are asked for ahead."""
        readers = [ShardReader(manifest, remote=self.plan.worker_remote()) for manifest in self.plan.manifests]
        ahead = self._read_ahead(worker, readers)
        try:
            for places in self._places(worker):
                yield [(place[0], partial(self._planned_row, readers, ahead, *place)) for place in places]
        finally:
            if ahead is not None:
                ahead.close()

    def _planned_row(
        self,
        readers: list[ShardReader],
        ahead: ReadAhead | None,
        draw: int,
        source: int,
        epoch: int,
        shard: int,
        index: int,
        *,
        name: Callable[[str], None],
    ) -> Row:
        if index < 0 or (self.plan.last_draw is not None and draw >= self.plan.last_draw):
            return Row(draw)
        stored = Stored(readers[source], shard, index) if ahead is None else ahead.next()
        row = read_row(self.plan, stored, draw, self.plan.place(source, shard, index), epoch, name=name)
        return replace(row, pool=self.plan.pool(shard, index))

    def _places(self, worker: int) -> Iterator[list[Place]]:
        """What a worker reads, batch by batch: a pure function of the plan."""
        plan, order = self.plan, self.plan.order()
        for step in itertools.count(self.first_step):
            if step >= plan.steps:
                return
            draws = plan.draws(step, worker)
            yield list(zip(draws.tolist(), *(part.tolist() for part in order.locate(draws)), strict=True))

    def _read_ahead(self, worker: int, readers: list[ShardReader]) -> ReadAhead | None:
        """Along the same plan; None where nothing of it is remote."""
        plan = self.plan
        if not any(is_remote(manifest.url) for manifest in plan.manifests):
            return None
        end = math.inf if plan.last_draw is None else plan.last_draw
        places = (
            (source, shard, index)
            for step in self._places(worker)
            for draw, source, _, shard, index in step
            if draw < end and index >= 0
        )
        first = plan.global_batch // plan.world_size // plan.workers
        return ReadAhead(readers, places, first=first, skip=plan.is_quarantined)

    def _sequential(self, worker: int, tars: TarList) -> Generator[list[tuple[int, Callable[..., Row]]], None, None]:
        """As ``_planned``, of tars without an index: a worker reads its own from the start, over what was drawn."""
        plan = self.plan
        per_step = plan.global_batch // plan.world_size // plan.workers
        readers, number = plan.world_size * plan.workers, plan.rank * plan.workers + worker
        with closing(
            replace(tars, remote=plan.worker_remote()).items(number, readers, skip=self.first_step * per_step)
        ) as items:
            for step in itertools.count(self.first_step):
                yield [(draw, partial(self._sequential_row, items, draw)) for draw in plan.draws(step, worker).tolist()]

    def _sequential_row(self, items: Iterator[tuple[int, Item]], draw: int, *, name: Callable[[str], None]) -> Row:
        epoch, item = next(items)
        source = None if isinstance(item, Problem) else item.source
        place = self.plan.place_of(draw) if source is None else self.plan.place(0, source.shard, source.index)
        return read_row(self.plan, item, draw, place, epoch, name=name)


def read_row(
    plan: Plan, stored: Stored | Item, draw: int, place: str, epoch: int, *, name: Callable[[str], None]
) -> Row:
    """One draw, decoded; a bad sample becomes a hole that carries its reason. ``name`` is told the key first."""
    key = place
    try:
        if key in plan.quarantine:
            raise SampleError("quarantined", "stopped a decoding worker before")
        key = stored.key() if isinstance(stored, Stored) else stored.key
        name(key)
        if short_name(key) in plan.quarantine:
            raise SampleError("quarantined", "stopped a decoding worker before")
        sample = parse_sample(stored if isinstance(stored, RawSample) else stored.read())
        values, caption = plan.maker(sample, epoch=epoch, batch=draw // plan.global_batch)
    except SampleError as error:
        return Row(draw, skipped=(key, error.reason, error.detail))
    return Row(
        draw,
        key=key,
        values=values,
        group=sample.group,
        label=-1 if sample.label is None else sample.label,
        caption=caption,
        captions=sample.captions,
        metadata=sample.metadata if plan.with_metadata else {},
    )


@dataclass(frozen=True, slots=True)
class Loss:
    """A worker that is no more."""

    note: Note | None
    """what it was decoding; None: nothing"""
    reason: str
    """``worker_died`` or ``worker_hung``"""
    detail: str


class WorkersLostError(Exception):
    """Workers died, or stood still and were ended."""

    def __init__(self, losses: list[Loss]) -> None:
        super().__init__("; ".join(loss.detail for loss in losses))
        self.losses = losses


class PartLoader:
    """The parts of a rank's batches from ``first_step`` on, from worker processes.

    Workers start by forkserver: decoders are opened inside the worker, never before a fork, and a worker is no child of
    the training process, so its death is noticed where its batch is waited for and never in the middle of a step.
    """

    def __init__(self, plan: Plan, first_step: int, *, in_process: bool, timeout_seconds: float) -> None:
        self.plan = plan
        self._journal = Journal(plan.workers)
        stream = PartStream(plan, first_step, self._journal)
        self._watch = _Watch(self._journal, timeout_seconds)
        self._processes: list[Any] = []
        self._in_process, self._closing = in_process, threading.Event()
        if in_process:
            self._parts: Iterator[Any] = stream.parts(0)
            return
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["mmcl.data.loader"])  # a worker then starts in milliseconds, again and again
        loader = DataLoader(
            stream,
            batch_size=None,
            num_workers=plan.workers,
            multiprocessing_context=context,
            prefetch_factor=2,
            timeout=LOOK_SECONDS,  # it then raises a RuntimeError; asked again, it goes on waiting for the same part
        )
        before = set(multiprocessing.active_children())
        self._parts = iter(loader)
        self._processes = [process for process in multiprocessing.active_children() if process not in before]
        self._watch.start()
        # a busy worker is slow to hand over what it has: that is waited for beside the step
        self._receiver = ThreadPoolExecutor(1, "receiver")
        self._coming = self._receiver.submit(self._receive)

    def next_batch(self) -> list[Batch]:
        """The parts of the next batch, one of each worker; none at the end of a finite stream.

        Raises:
            WorkersLostError: workers are gone; this loader is of no more use.
            RunError, ConfigError: shards are missing or are not what they were.
        """
        if self._in_process:
            part = next(self._parts, None)
            return [] if part is None else [part]
        parts = self._coming.result()
        self._coming = self._receiver.submit(self._receive)
        return parts

    def _receive(self) -> list[Batch]:
        parts = (self._next_part() for _ in range(self.plan.workers))
        return [part for part in parts if part is not None]

    def _next_part(self) -> Batch | None:
        while not self._closing.is_set():
            try:
                packed = next(self._parts, None)
                break
            except (RuntimeError, OSError, EOFError) as error:
                # a worker that dies fails its parent as a RuntimeError of the loader, or in the middle of a transfer
                patience_seconds = 0.0 if isinstance(error, RuntimeError) else 2.0
                losses = self._losses(patience_seconds)
                if not losses and not str(error).startswith("DataLoader timed out"):
                    raise
            if losses:
                raise WorkersLostError(losses)
        else:
            return None
        part = None if packed is None else unpack(packed, self.plan.maker.views)
        if isinstance(part, Exception):
            raise part
        return part

    def _losses(self, patience_seconds: float) -> list[Loss]:
        wait([process.sentinel for process in self._processes], patience_seconds)
        workers = {self._journal.pid(worker): worker for worker in range(self.plan.workers)}
        losses = []
        for process in self._processes:
            if process.exitcode is None:
                continue
            note = self._journal.note(workers[process.pid]) if process.pid in workers else None
            if process.pid in self._watch.ended:
                limit = f"{self._watch.timeout_seconds:g} s (data.timeout_seconds)"
                losses.append(Loss(note, "worker_hung", f"took longer than {limit}"))
            else:
                detail = f"its decoding process ended with {_exit_name(process.exitcode)}"
                losses.append(Loss(note, "worker_died", detail))
        # one that died before it could be counted was at nothing
        unseen = self.plan.workers - len(self._processes)
        return losses + [Loss(None, "worker_died", "its decoding process ended as it started")] * unseen

    def close(self) -> None:
        """Ends the workers, each after the sample that it is at."""
        self._closing.set()
        self._journal.stop()
        if not self._in_process:
            self._receiver.shutdown()
        self._watch.done.set()
        self._parts = iter(())


def _end_with_parent() -> None:
    """Ends this worker when the process that reads from it is gone, killed for example.

    Its parent in the system is the fork server, which lives as long as its workers do, so nothing else would tell.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


class _Watch(threading.Thread):
    """Ends workers that are at one sample for too long.

    A thread, since the parent may itself be waiting inside a transfer from a worker that stands still. Time is counted
    in looks, so that a job or a machine that is put to sleep accuses nobody.
    """

    def __init__(self, journal: Journal, timeout_seconds: float) -> None:
        super().__init__(name="decoding-watch", daemon=True)
        self.timeout_seconds = timeout_seconds
        self.done = threading.Event()
        self.ended: set[int] = set()
        """processes"""
        self._journal = journal

    def run(self) -> None:
        look_seconds = min(LOOK_SECONDS, self.timeout_seconds / 5)
        seen: dict[int, tuple[int, int]] = {}  # worker → its draw, how often it was seen at it
        while not self.done.wait(look_seconds):
            for worker in range(self._journal.workers):
                note, pid = self._journal.note(worker), self._journal.pid(worker)
                draw, looks = seen.get(worker, (-1, 0))
                looks = looks + 1 if note is not None and note.draw == draw else 0
                seen[worker] = (-1 if note is None else note.draw, looks)
                if looks * look_seconds >= self.timeout_seconds and pid not in self.ended:
                    self.ended.add(pid)
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)


def _exit_name(code: int) -> str:
    if code < 0:
        with suppress(ValueError):
            return signal.Signals(-code).name
    return f"exit code {code}"
