"""Knowing which rank is gone: every rank counts, in a store that all can read; those that stop counting are named."""

from __future__ import annotations

import os
import sys
import threading
import time
from datetime import timedelta
from types import TracebackType

import torch.distributed as dist

from mmcl.distributed import Comm
from mmcl.types import RunError

LEFT = b"left"


class Peers:
    """Within the context, this rank counts, several times within ``timeout_seconds``.

    Of processes that die, the next exchange fails at once; on the way out of the context that error becomes one that
    names them. Of a computer that loses its power or its network nothing is heard: every exchange waits. So the first
    rank of each computer watches, and ends this one when a rank, or the store, which lies with rank 0, has not
    answered for ``timeout_seconds``; its launcher ends the rest.
    """

    def __init__(self, comm: Comm, timeout_seconds: float) -> None:
        self.comm, self.timeout_seconds = comm, timeout_seconds
        self.beat_seconds = min(max(timeout_seconds / 10, 0.2), 5.0)
        self._over = threading.Event()
        self._watches = os.environ.get("LOCAL_RANK", "0") == "0"
        self._counts = [b""] * comm.world_size
        self._seen_at = [time.monotonic()] * comm.world_size
        """when each rank was last seen to count"""
        self._answered_at = time.monotonic()
        """when the store last answered"""

    def __enter__(self) -> Peers:
        if self.comm.world_size > 1:
            self._store = dist.TCPStore(  # type: ignore[attr-defined]
                os.environ["MASTER_ADDR"],
                int(os.environ["MASTER_PORT"]),
                is_master=False,
                timeout=timedelta(seconds=self.timeout_seconds),
            )
            self._store.set(self._key(self.comm.rank), "0")
            self.comm.barrier()
            # two, since a store that is out of reach keeps the first one waiting
            self._beating = threading.Thread(target=self._beat, name="beat", daemon=True)
            self._beating.start()
            threading.Thread(target=self._watch, name="peers", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.comm.world_size == 1:
            return
        if isinstance(value, (RuntimeError, OSError)):
            gone = self._gone_by_now()
            if gone:
                raise self._error(gone, " ".join(str(value).split())[:200]) from value
        self._over.set()
        self._beating.join(timeout=2 * self.beat_seconds)

    def _gone_by_now(self) -> list[int]:
        """Ranks that ended or do not count any more; goes on counting meanwhile, for others that ask the same."""
        self._watches, start = True, time.monotonic()
        time.sleep(2 * self.beat_seconds)
        ended = {rank for rank, count in enumerate(self._counts) if count == LEFT}  # those that ask too end later
        time.sleep(1.5 * self.beat_seconds)
        if self._answered_at < start:
            return [0]
        # the first look after the start may see for the first time what was counted before it
        late = start + 1.5 * self.beat_seconds
        stale = {rank for rank, seen in enumerate(self._seen_at) if seen < late}
        return sorted((stale | ended) - {self.comm.rank})

    def _error(self, ranks: list[int], why: str) -> RunError:
        store = f" and with it the store at {os.environ['MASTER_ADDR']}" if 0 in ranks else ""
        return RunError(
            f"rank {', '.join(map(str, ranks))} of {self.comm.world_size} is gone{store}, this one cannot go on alone "
            f"({why}); --resume auto goes on from the last checkpoint, on any number of processes"
        )

    def _key(self, rank: int) -> str:
        return f"mmcl/beat/{rank}"

    def _beat(self) -> None:
        number, keys = 0, [self._key(rank) for rank in range(self.comm.world_size)]
        while True:
            number += 1
            over = self._over.wait(self.beat_seconds)
            try:
                self._store.set(self._key(self.comm.rank), LEFT.decode() if over else str(number))
                counts = self._store.multi_get(keys) if self._watches and not over else []
            except (RuntimeError, OSError):
                return  # the store went with its rank
            if over:
                return
            self._answered_at = time.monotonic()
            for rank, count in enumerate(counts):
                if count != self._counts[rank] or count == LEFT:
                    self._counts[rank], self._seen_at[rank] = count, self._answered_at

    def _watch(self) -> None:
        while self._watches and not self._over.wait(self.beat_seconds):
            limit = time.monotonic() - self.timeout_seconds
            silent = [0] if self._answered_at < limit else [n for n, seen in enumerate(self._seen_at) if seen < limit]
            if silent:
                error = self._error(silent, f"no sign of it for {self.timeout_seconds:g} s")
                print(f"[rank {self.comm.rank}] error: {error}", file=sys.stderr, flush=True)
                os._exit(error.exit_code)
