"""Progress for people: a bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeAlias

Progress: TypeAlias = Callable[[int, int, str], None]
"""called with (done, total, note)"""

PLAIN_SECONDS = 2.0


def failures(count: int) -> str:
    """The note that counts what failed; empty for none."""
    return f"{count} failed" if count else ""


def on_terminal() -> bool:
    return sys.stderr.isatty()


@contextmanager
def show_progress(title: str, unit: str, *, quiet: bool = False, plain: bool = True) -> Iterator[Progress]:
    """Yields what to call with (done, total, note).

    Without a terminal a line is printed at every tenth, not more often than every two seconds; ``plain=False`` leaves
    even that to the caller. ``quiet`` shows nothing at all.
    """
    if quiet or not on_terminal():
        yield _plain_lines(title, unit) if plain and not quiet else lambda done, total, note: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn(title), BarColumn(), MofNCompleteColumn(), TextColumn(unit), TimeRemainingColumn())
    with Bar(*columns, TextColumn("{task.fields[note]}"), console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=None, note="")
        yield lambda done, total, note: bar.update(task, completed=done, total=total, note=note)


def _plain_lines(title: str, unit: str) -> Progress:
    tenth, last = 0, time.monotonic()

    def show(done: int, total: int, note: str) -> None:
        nonlocal tenth, last
        reached, now = 10 * done // max(total, 1), time.monotonic()
        if reached > tenth and now - last >= PLAIN_SECONDS:
            tenth, last = reached, now
            print(f"{title}: {done} of {total} {unit}" + (f", {note}" if note else ""), file=sys.stderr, flush=True)

    return show
