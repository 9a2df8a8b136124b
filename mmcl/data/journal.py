"""What each decoding worker is at, in memory that it shares with its parent: known also after the worker has died."""

from __future__ import annotations

import multiprocessing
import os
from dataclasses import dataclass

NAME_BYTES = 1024
_PID, _DRAW, _LENGTH, _FIELDS = 0, 1, 2, 3


def short_name(text: str) -> str:
    """A key as the journal holds it: cut to what fits into its line."""
    return text.encode("utf-8", "replace")[:NAME_BYTES].decode("utf-8", "ignore")


@dataclass(frozen=True, slots=True)
class Note:
    """What a worker was decoding."""

    draw: int
    key: str | None
    """None: it had not come as far as the key"""


class Journal:
    """One line per worker, written by it alone; picklable only on the way to a worker that is being started."""

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self._numbers = multiprocessing.RawArray("q", _FIELDS * workers)
        self._names = multiprocessing.RawArray("B", NAME_BYTES * workers)
        self._stop = multiprocessing.RawValue("b", 0)

    def open(self, worker: int) -> None:
        """A worker says that it lives."""
        self.clear(worker)
        self._numbers[_FIELDS * worker + _PID] = os.getpid()

    def begin(self, worker: int, draw: int) -> None:
        """A worker begins with a draw."""
        self._numbers[_FIELDS * worker + _LENGTH] = 0
        self._numbers[_FIELDS * worker + _DRAW] = draw + 1

    def name(self, worker: int, key: str) -> None:
        """The key of the draw, as soon as it is known and before any of its bytes are looked at."""
        content = short_name(key).encode("utf-8")
        start = NAME_BYTES * worker
        self._names[start : start + len(content)] = list(content)
        self._numbers[_FIELDS * worker + _LENGTH] = len(content) + 1  # last: a name is read whole or not at all

    def clear(self, worker: int) -> None:
        """A worker decodes nothing."""
        self._numbers[_FIELDS * worker + _DRAW] = 0

    def pid(self, worker: int) -> int:
        """The process of a worker; 0 before it has opened its line."""
        return int(self._numbers[_FIELDS * worker + _PID])

    def note(self, worker: int) -> Note | None:
        """What a worker is decoding, or was when it died."""
        draw, length = (int(self._numbers[_FIELDS * worker + field]) for field in (_DRAW, _LENGTH))
        if draw == 0:
            return None
        start = NAME_BYTES * worker
        name = bytes(self._names[start : start + length - 1]).decode("utf-8", "replace") if length else None
        return Note(draw - 1, name)

    def stop(self) -> None:
        """Asks all workers to end after the sample that they are at."""
        self._stop.value = 1

    @property
    def stopped(self) -> bool:
        return bool(self._stop.value)
