"""Asking a run to save and end: a file in its folder, a signal to a rank, or the end of its launcher."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType, TracebackType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
ECHO_SECONDS = 1.0
"""A terminal sends Ctrl-C to a launcher and its ranks, and the launcher sends it to its ranks again: that is one."""
ORPHAN_SECONDS = 8.0
"""what a rank without a launcher has left to save and end"""


class StopRequest:
    """Within the context, SIGINT, SIGTERM and SIGUSR1 ask for a stop at the next step, as do ``touch RUN/stop`` and the
    end of the launcher.

    A second Ctrl-C ends the process at once, wherever it is: a thread reads the signals, since the main thread may wait
    for other ranks inside a library, where Python handles none.
    """

    def __init__(self, stop_file: Path) -> None:
        self.stop_file = stop_file
        self._signalled = threading.Event()
        self._before: dict[signal.Signals, object] = {}
        self._old_wakeup = -1

    @property
    def requested(self) -> bool:
        return self._signalled.is_set() or self.stop_file.exists()

    def __enter__(self) -> StopRequest:
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._old_wakeup = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        for number in SIGNALS:
            self._before[number] = signal.signal(number, _leave_to_the_thread)
        threading.Thread(target=self._read_signals, name="signals", daemon=True).start()
        self._over = threading.Event()
        if has_launcher(os.environ):
            threading.Thread(target=self._watch_launcher, args=(os.getppid(),), name="launcher", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.set_wakeup_fd(self._old_wakeup)
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._over.set()
        self._writer.close()  # the thread reads the end and ends

    def _read_signals(self) -> None:
        first_interrupt: float | None = None
        with self._reader as reader:
            while received := reader.recv(1):
                if received[0] not in SIGNALS:
                    continue
                self._signalled.set()
                if received[0] != signal.SIGINT:
                    continue
                now = time.monotonic()
                if first_interrupt is None:
                    first_interrupt = now
                elif now - first_interrupt > ECHO_SECONDS:
                    print(
                        "stopped at once; --resume auto goes on from the last checkpoint", file=sys.stderr, flush=True
                    )
                    os._exit(130)

    def _watch_launcher(self, launcher: int) -> None:
        while os.getppid() == launcher:
            if self._over.wait(0.5):
                return
        print(f"the launcher (process {launcher}) is gone: saving and ending", file=sys.stderr, flush=True)
        self._signalled.set()
        if not self._over.wait(ORPHAN_SECONDS):
            os._exit(1)


def has_launcher(environment: Mapping[str, str]) -> bool:
    """Whether accelerate or torchrun started this process and waits for it."""
    return "LOCAL_RANK" in environment or "ACCELERATE_MIXED_PRECISION" in environment


def _leave_to_the_thread(number: int, frame: FrameType | None) -> None:
    """A handler of Python's own has to be there for the signal to be written to the wake-up socket."""


def started_at() -> float:
    """Seconds since 1970 at which this run was started: its launcher, where it has one, or this process."""
    pid = os.getppid() if has_launcher(os.environ) else os.getpid()
    try:
        ticks = int(Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19])
        lines = Path("/proc/stat").read_text(encoding="ascii").splitlines()
        booted = next(int(line.split()[1]) for line in lines if line.startswith("btime"))
    except (OSError, ValueError, IndexError, StopIteration):
        return _IMPORTED
    return booted + ticks / os.sysconf("SC_CLK_TCK")


_IMPORTED = time.time()
