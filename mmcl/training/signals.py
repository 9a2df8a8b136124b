"""Asking a run to save and end: a file in its folder, or a signal to a rank."""

from __future__ import annotations

import signal
from pathlib import Path
from types import FrameType, TracebackType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Within the context, SIGINT, SIGTERM and SIGUSR1 ask for a stop at the next step, as ``touch RUN/stop`` does.

    A second SIGINT ends the process at once.
    """

    def __init__(self, stop_file: Path) -> None:
        self.stop_file = stop_file
        self._signalled = False
        self._before: dict[signal.Signals, object] = {}

    @property
    def requested(self) -> bool:
        return self._signalled or self.stop_file.exists()

    def __enter__(self) -> StopRequest:
        for number in SIGNALS:
            self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._signalled and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._signalled = True
