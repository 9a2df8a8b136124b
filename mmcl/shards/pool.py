"""Worker processes that may hang or die: each job has a time limit, and a lost process costs one job, which is named.

``concurrent.futures`` cannot do this: one dead process breaks its whole pool without saying which job killed it, and
a hanging one cannot be ended alone. Here every worker has its own pipe, so the parent knows who has which job.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.connection
import operator
import signal
import time
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from mmcl.types import RunError

_START_SECONDS = 120.0


@dataclass(slots=True)
class _Worker:
    process: Any
    pipe: Any
    deadline: float
    ticket: int = -2
    """number of the job it has; −1: none; −2: it is still starting"""


class RunJobs(Protocol):
    """What ``run_jobs`` does, here or on a cluster."""

    def __call__(
        self,
        function: Callable[[Any], Any],
        jobs: Iterable[Any],
        *,
        workers: int,
        timeout_seconds: float,
        preload: str = "",
    ) -> Generator[Any, None, None]: ...


@dataclass(frozen=True, slots=True)
class Lost:
    """What came of a job whose worker had to be ended, or ended by itself."""

    reason: str
    """``timeout`` or ``worker_died``"""
    detail: str


def run_jobs(
    function: Callable[[Any], Any],
    jobs: Iterable[Any],
    *,
    workers: int,
    timeout_seconds: float,
    ahead: int = 10_000,
    preload: str = "",
) -> Generator[Any, None, None]:
    """``function(job)`` for each job, in worker processes, yielded in the order of the jobs; ``Lost`` where one failed.

    ``function`` is importable and returns something small. Jobs are taken when there is a worker for them; at most
    ``ahead`` are started beyond the one that is waited for. An exception in ``function`` is raised here. ``preload``
    names the module that workers start with.
    """
    context = _context(preload)
    pool: list[_Worker] = []
    results: dict[int, Any] = {}
    pending = enumerate(jobs)
    sent, wanted, ended = 0, 0, False
    try:
        pool = [_start(context, function) for _ in range(min(workers, operator.length_hint(jobs, workers)))]
        while not ended or wanted < sent:
            for worker in pool:
                if worker.ticket != -1 or ended or sent >= wanted + ahead:
                    continue
                numbered = next(pending, None)
                if numbered is None:
                    ended = True
                else:
                    _send(worker, *numbered, timeout_seconds)
                    sent += 1
            if not pool or (ended and wanted == sent):
                return
            _collect(pool, results, context, function, timeout_seconds)
            while wanted in results:
                yield results.pop(wanted)
                wanted += 1
    finally:
        for worker in pool:
            worker.process.kill()
            worker.pipe.close()
        for worker in pool:
            worker.process.join()


def _send(worker: _Worker, ticket: int, job: Any, timeout_seconds: float) -> None:
    worker.ticket, worker.deadline = ticket, time.monotonic() + timeout_seconds
    # A pipe that is already broken is noticed where results are collected.
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        worker.pipe.send(job)


def _collect(pool: list[_Worker], results: dict[int, Any], context: Any, function: Any, timeout_seconds: float) -> None:
    """Waits for the next thing to happen, and replaces workers that are lost."""
    busy = [worker for worker in pool if worker.ticket != -1]
    patience = max(0.0, min(worker.deadline for worker in busy) - time.monotonic())
    ready = multiprocessing.connection.wait([worker.pipe for worker in busy], patience)
    for number, worker in enumerate(pool):
        if worker.ticket == -1:
            continue
        lost = None
        if worker.pipe in ready:
            try:
                failed, result = worker.pipe.recv()
                if failed:
                    raise result
                if worker.ticket >= 0:
                    results[worker.ticket] = result
                worker.ticket = -1
                continue
            except (EOFError, ConnectionResetError):
                worker.process.join()
                lost = Lost("worker_died", f"its process ended with {_exit_name(worker.process.exitcode)}")
        elif time.monotonic() >= worker.deadline:
            worker.process.kill()
            worker.process.join()
            lost = Lost("timeout", f"took longer than {timeout_seconds if worker.ticket >= 0 else _START_SECONDS:g} s")
        if lost is not None:
            if worker.ticket == -2:  # another one would fare no better
                raise RunError(f"a worker process could not start: {lost.detail}")
            results[worker.ticket] = lost
            worker.pipe.close()
            pool[number] = _start(context, function)


def _exit_name(code: int | None) -> str:
    if code is not None and code < 0:
        try:
            return signal.Signals(-code).name
        except ValueError:
            return f"signal {-code}"
    return f"exit code {code}"


def _context(preload: str) -> Any:
    if "forkserver" in multiprocessing.get_all_start_methods():
        context = multiprocessing.get_context("forkserver")
        if preload:
            context.set_forkserver_preload([preload])
        return context
    return multiprocessing.get_context("spawn")


def _start(context: Any, function: Callable[[Any], Any]) -> _Worker:
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(theirs, function), daemon=True)
    try:
        process.start()
    except OSError as error:
        raise RunError(f"cannot start a worker process: {error.strerror or error}") from None
    theirs.close()
    return _Worker(process, ours, time.monotonic() + _START_SECONDS)


def _work(pipe: Any, function: Callable[[Any], Any]) -> None:
    # Ctrl-C reaches the whole group; the parent decides what happens.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    pipe.send((False, None))  # ready
    while True:
        try:
            job = pipe.recv()
        except (EOFError, OSError):
            return  # the parent is gone
        try:
            answer = (False, function(job))
        except Exception as error:  # handed to the parent, which raises it
            answer = (True, error)
        try:
            pipe.send(answer)
        except (BrokenPipeError, ConnectionResetError):
            return
