"""A pool of three processes that run functions as the ranks of a real gloo group.

The processes start once, at the first use, and stay: a call costs milliseconds, not an import of torch.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import pytest

from mmcl.distributed.few import FEW_ROWS

PROCESSES = 3


class RankError(RuntimeError):
    """One or more ranks raised; holds their tracebacks."""


def _serve(connection: Connection) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo0" if sys.platform == "darwin" else "lo"
    import torch

    torch.set_num_threads(1)
    while True:
        try:
            path, rank, world, store, call = pickle.loads(connection.recv_bytes())
        except EOFError:
            return
        sys.path[:] = path  # test modules lie in folders that pytest adds as it finds them
        try:
            reply = (True, _as_rank(rank, world, store, call))
        except BaseException:
            reply = (False, traceback.format_exc())
        connection.send_bytes(pickle.dumps(reply))


def _as_rank(rank: int, world: int, store: str, call: bytes) -> Any:
    import torch
    import torch.distributed as dist

    from mmcl.distributed import few

    torch.manual_seed(0)
    torch.set_default_dtype(torch.float32)
    few.FEW_ROWS = FEW_ROWS  # what the call before has set is over
    function, args = pickle.loads(call)
    if world == 1:
        return function(rank, world, *args)
    try:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
        return function(rank, world, *args)
    finally:
        if dist.is_initialized():  # not where another rank was gone before all had joined
            dist.destroy_process_group()


class GlooPool:
    """``pool(world, function, *args)`` returns ``[function(rank, world, *args) for each rank]``.

    ``function`` lives at the top of a module; arguments and results are pickled. A rank that raises fails the call with
    the tracebacks of all that did; a call that takes longer than ``timeout_seconds`` kills these processes and fails.
    """

    def __init__(self) -> None:
        self.workers: list[tuple[Any, Connection]] = []

    def __call__(
        self, world: int, function: Callable[..., Any], *args: Any, timeout_seconds: float = 120.0
    ) -> list[Any]:
        if not 1 <= world <= PROCESSES:
            raise ValueError(f"the pool has {PROCESSES} processes, got a world of {world}")
        self._start()
        call = pickle.dumps((function, args))
        with tempfile.TemporaryDirectory(prefix="gloo") as folder:
            connections = [connection for _, connection in self.workers[:world]]
            for rank, connection in enumerate(connections):
                connection.send_bytes(pickle.dumps((sys.path, rank, world, str(Path(folder, "store")), call)))
            replies = self._collect(connections, time.monotonic() + timeout_seconds)
        failed = [f"rank {rank} of {world}:\n{reply}" for rank, (fine, reply) in enumerate(replies) if not fine]
        if failed:
            raise RankError("\n".join(failed))
        return [reply for _, reply in replies]

    def _start(self) -> None:
        if self.workers:
            return
        context = multiprocessing.get_context("forkserver")
        for _ in range(PROCESSES):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            self.workers.append((process, ours))

    def _collect(self, connections: list[Connection], deadline: float) -> list[tuple[bool, Any]]:
        replies: dict[int, tuple[bool, Any]] = {}
        while len(replies) < len(connections):
            waiting = {id(c): rank for rank, c in enumerate(connections) if rank not in replies}
            ready = wait([connections[rank] for rank in waiting.values()], max(0.0, deadline - time.monotonic()))
            if not ready:
                self.close()
                raise TimeoutError(f"ranks {sorted(waiting.values())} of {len(connections)} did not come back")
            for connection in ready:
                assert isinstance(connection, Connection)
                try:
                    replies[waiting[id(connection)]] = pickle.loads(connection.recv_bytes())
                except EOFError:
                    self.close()
                    raise RankError(f"rank {waiting[id(connection)]} of {len(connections)} died") from None
        return [replies[rank] for rank in range(len(connections))]

    def close(self) -> None:
        """Ends the processes; a later call starts new ones."""
        workers, self.workers = self.workers, []
        for process, connection in workers:
            connection.close()
            process.kill()
            process.join()


@pytest.fixture(scope="session")
def gloo() -> Iterator[GlooPool]:
    pool = GlooPool()
    yield pool
    pool.close()
