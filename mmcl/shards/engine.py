"""Where jobs run: in processes of this machine, or on a Ray cluster. The results are the same."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from mmcl.shards.pool import RunJobs, run_jobs
from mmcl.shards.scan import cores
from mmcl.types import ConfigError

ENGINES = ("pool", "ray")


def check_engine(name: str, address: str) -> None:
    """Raises ``ConfigError`` on an engine that is unknown or not installed, and on an address that none uses."""
    if name not in ENGINES:
        raise ConfigError(f"engine={name[:40]}: {' or '.join(ENGINES)}")
    if name == "ray" and importlib.util.find_spec("ray") is None:
        raise ConfigError('engine=ray: Ray is not installed. pip install "mmcl[ray]"')
    if address and name != "ray":
        raise ConfigError(f"address={address[:80]}: only with engine=ray")


@dataclass(frozen=True, slots=True)
class Crew:
    """Who does the work, how many at a time, and how long each job may take."""

    run: RunJobs
    workers: int
    timeout_seconds: float

    def __call__(self, function: Callable[[Any], Any], jobs: Sequence[Any]) -> Generator[Any, None, None]:
        """``function(job)`` for each job, in order; ``Lost`` where its process died or took too long."""
        return self.run(
            function,
            jobs,
            workers=self.workers,
            timeout_seconds=self.timeout_seconds,
            preload="mmcl.shards.prepare",
        )


@contextlib.contextmanager
def open_engine(
    name: str = "pool", address: str = "", workers: int | None = None, timeout_seconds: float = 300.0
) -> Iterator[Crew]:
    """``workers`` None: as many as there are cores (CPUs of the cluster)."""
    if name == "pool":
        yield Crew(run_jobs, workers or cores(), timeout_seconds)
        return
    from mmcl.shards.ray_pool import open_cluster

    with open_cluster(address) as (run, processors):
        yield Crew(run, min(workers or processors, processors), timeout_seconds)
