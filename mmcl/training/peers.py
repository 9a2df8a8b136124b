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

LEFT = "left"


class Peers:
    """Within the context, this rank counts, several times within ``timeout_seconds``.

    Where one computer loses its power or its network, nothing tells the others: their next exchange waits for ever. So
    the first rank of each computer also looks whether the others count, and ends this one when one has not for
    ``timeout_seconds``; its launcher ends the rest. Of processes that die, the next exchange fails at once, and
    :meth:`explain` names them.
    """

    def __init__(self, comm: Comm, timeout_seconds: float) -> None:
        self.comm, self.timeout_seconds = comm, timeout_seconds
        self.beat_seconds = min(max(timeout_seconds / 10, 0.2), 5.0)
        self._over = threading.Event()

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
            self._thread = threading.Thread(target=self._beat, name="peers", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        if self.comm.world_size > 1:
            self._thread.join(timeout=self.beat_seconds)
        if value is not None and self.comm.world_size > 1 and isinstance(value, (RuntimeError, OSError)):
            raise self.explain(value) from value

    def explain(self, error: BaseException) -> BaseException:
        """The error of an exchange as one that names the ranks that are gone; the same error where none is."""
        try:
            before = self._counts()
            time.sleep(2.5 * self.beat_seconds)
            after = self._counts()
        except (RuntimeError, OSError):
            where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            return self._gone([0], f"and with it the store at {where}", error)
        gone = [
            rank for rank, (a, b) in enumerate(zip(before, after, strict=True)) if a == b and rank != self.comm.rank
        ]
        return self._gone(gone, "", error) if gone else error

    def _gone(self, ranks: list[int], more: str, error: BaseException) -> RunError:
        names = ", ".join(map(str, ranks))
        said = " ".join(str(error).split())[:200]
        return RunError(
            f"rank {names} of {self.comm.world_size} is gone{' ' if more else ''}{more}, and this one cannot go on "
            f"without it ({said}); --resume auto goes on from the last checkpoint, on any number of processes"
        )

    def _key(self, rank: int) -> str:
        return f"mmcl/beat/{rank}"

    def _counts(self) -> list[bytes]:
        counts: list[bytes] = self._store.multi_get([self._key(rank) for rank in range(self.comm.world_size)])
        return counts

    def _beat(self) -> None:
        """Counts until the run is over, also while another thread waits for a verdict."""
        number, seen, since = 0, [b""] * self.comm.world_size, [time.monotonic()] * self.comm.world_size
        looks = os.environ.get("LOCAL_RANK", "0") == "0"
        while True:
            number += 1
            try:
                over = self._over.wait(self.beat_seconds)
                self._store.set(self._key(self.comm.rank), LEFT if over else str(number))
                if over:
                    return
                counts = self._counts() if looks else []
            except (RuntimeError, OSError):
                return  # the store went with its rank: the next exchange fails
            now = time.monotonic()
            for rank, count in enumerate(counts):
                if count != seen[rank] or count == LEFT.encode():
                    seen[rank], since[rank] = count, now
            silent = [rank for rank, last in enumerate(since) if looks and now - last > self.timeout_seconds]
            if silent:
                error = self._gone(silent, "", TimeoutError(f"no sign of it for {self.timeout_seconds:g} s"))
                print(f"[rank {self.comm.rank}] error: {error}", file=sys.stderr, flush=True)
                os._exit(1)
