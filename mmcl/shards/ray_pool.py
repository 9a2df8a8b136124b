"""Jobs on a Ray cluster, with the promises of ``run_jobs``: in order, a time limit each, a lost process costs one job.

Each actor holds one CPU and runs its jobs in a child process of its own, the same that the local pool starts: what
crashes or hangs is that child, and is named there. An actor that is lost itself (its node went away) has done no harm:
its job is given to another one.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import os
import socket
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import ray

from mmcl.shards.pool import Lost, RunJobs, run_jobs
from mmcl.types import ConfigError, RunError

_START_SECONDS = 120.0
_GRACE_SECONDS = 60.0
"""beyond a job's own limit, after which an actor is taken for lost"""
_MOST_TRIES = 3


@contextlib.contextmanager
def open_cluster(address: str = "") -> Iterator[tuple[RunJobs, int]]:
    """(what runs jobs there, CPUs of the cluster). Raises ``ConfigError`` where there is no cluster at ``address``.

    A cluster that this process is connected to already is used, and left connected.
    """
    connected = ray.is_initialized()
    if not connected:
        _check_address(address)
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        quiet: dict[str, Any] = {"log_to_driver": False, "configure_logging": False}
        # without an address Ray looks for RAY_ADDRESS, then starts a cluster of this machine
        local = {} if address or os.environ.get("RAY_ADDRESS") else {"include_dashboard": False}
        try:
            ray.init(address=address or None, **quiet, **local)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise ConfigError(f"address={address or 'local'}: {str(error).splitlines()[0][:200]}") from None
    try:
        processors = int(ray.cluster_resources().get("CPU", 0))
        if processors < 1:
            raise RunError("the Ray cluster has no CPU")
        yield run_jobs_on_ray, processors
    finally:
        if not connected:
            ray.shutdown()


def _check_address(address: str) -> None:
    """Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    if not port.isdigit() or "/" in host:
        return  # a name that Ray knows, e.g. "auto"
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=10.0):
            pass
    except (OSError, OverflowError) as error:
        raise ConfigError(f"address={address[:80]}: no Ray cluster answers there ({error})") from None


class _Runner:
    """Lives on one CPU of the cluster."""

    def __init__(self, function: Callable[[Any], Any], timeout_seconds: float, preload: str) -> None:
        self._job: Any = None
        self._results = run_jobs(
            function, self._jobs(), workers=1, timeout_seconds=timeout_seconds, ahead=1, preload=preload
        )

    def _jobs(self) -> Iterator[Any]:
        while True:
            yield self._job

    def ready(self) -> None:
        """Answers once the actor runs."""

    def run(self, job: Any) -> tuple[bool, Any]:
        """(whether it is an error of ours, what came of the job)."""
        self._job = job
        try:
            return False, next(self._results)
        except Exception as error:  # handed to the driver, which raises it
            return True, error


@dataclass(slots=True)
class _Actor:
    handle: Any
    answer: Any
    """reference of what is waited for"""
    deadline: float
    ticket: int = -2
    """number of the job it has; −1: none; −2: it is still starting"""


def run_jobs_on_ray(
    function: Callable[[Any], Any],
    jobs: Iterable[Any],
    *,
    workers: int,
    timeout_seconds: float,
    preload: str = "",
    ahead: int = 10_000,
) -> Generator[Any, None, None]:
    """As ``run_jobs``, on at most ``workers`` CPUs of the cluster that this process is connected to.

    Raises ``RunError`` where no actor could be started, and what ``function`` raises.
    """
    work = _Work(function, list(jobs), timeout_seconds, preload)
    try:
        work.actors = [work.start() for _ in range(min(workers, len(work.jobs)))]
        wanted = 0
        while wanted < len(work.jobs):
            for actor in work.actors:
                if actor.ticket == -1 and work.pending and work.pending[0] < wanted + ahead:
                    work.send(actor)
            work.collect()
            while wanted in work.results:
                yield work.results.pop(wanted)
                wanted += 1
    finally:
        for actor in work.actors:
            ray.kill(actor.handle)


class _Work:
    """Who has which job, and what came of the others."""

    def __init__(self, function: Callable[[Any], Any], jobs: list[Any], timeout_seconds: float, preload: str) -> None:
        self.jobs, self.timeout_seconds = jobs, timeout_seconds
        self.actors: list[_Actor] = []
        self.pending = collections.deque(range(len(jobs)))
        self.results: dict[int, Any] = {}
        self._tries: collections.Counter[int] = collections.Counter()
        self._failed_starts = 0
        """since the last one that did start"""
        self._idle_since = time.monotonic()
        remote = ray.remote(num_cpus=1, max_restarts=0)(_Runner)
        self._create = functools.partial(remote.remote, function, timeout_seconds, preload)

    def start(self) -> _Actor:
        handle = self._create()
        # It may have to wait until a CPU is free, which is no fault of its own: see `collect`.
        return _Actor(handle, handle.ready.remote(), float("inf"))

    def send(self, actor: _Actor) -> None:
        actor.ticket = self.pending.popleft()
        self._tries[actor.ticket] += 1
        actor.answer = actor.handle.run.remote(self.jobs[actor.ticket])
        actor.deadline = time.monotonic() + self.timeout_seconds + _GRACE_SECONDS

    def collect(self) -> None:
        """Waits for the next thing to happen, and replaces actors that are lost."""
        busy = {actor.answer: actor for actor in self.actors if actor.ticket != -1}
        ready, _ = ray.wait(list(busy), num_returns=1, timeout=1.0)
        for answer in ready:
            self._take(busy[answer])
        now = time.monotonic()
        if any(actor.ticket != -2 for actor in self.actors):
            self._idle_since = now
        elif now - self._idle_since > _START_SECONDS:
            raise RunError(f"no CPU of the Ray cluster became free within {_START_SECONDS:g} s")
        for actor in busy.values():
            if now > actor.deadline:
                self._replace(actor, Lost("timeout", f"took longer than {self.timeout_seconds:g} s"))

    def _take(self, actor: _Actor) -> None:
        try:
            answer = ray.get(actor.answer)
        except ray.exceptions.RayActorError as error:
            self._replace(actor, Lost("worker_died", f"its actor was lost: {_last_line(error)}"))
            return
        except ray.exceptions.RayError as error:
            raise RunError(f"Ray: {_last_line(error)}") from None
        if actor.ticket >= 0:
            failed, result = answer
            if failed:
                raise result
            self.results[actor.ticket] = result
        self._failed_starts = 0
        actor.ticket = -1

    def _replace(self, actor: _Actor, lost: Lost) -> None:
        with contextlib.suppress(ray.exceptions.RayError):
            ray.kill(actor.handle)
        if actor.ticket >= 0:
            if lost.reason == "worker_died" and self._tries[actor.ticket] < _MOST_TRIES:
                self.pending.appendleft(actor.ticket)
            else:
                self.results[actor.ticket] = lost
        else:
            self._failed_starts += 1
            if self._failed_starts > _MOST_TRIES * len(self.actors):
                raise RunError(f"actors cannot start on the Ray cluster: {lost.detail}")
        self.actors[self.actors.index(actor)] = self.start()


def _last_line(error: Exception) -> str:
    """Ray's messages end with the reason."""
    lines = str(error).strip().splitlines()
    return lines[-1].strip()[:300] if lines else type(error).__name__
