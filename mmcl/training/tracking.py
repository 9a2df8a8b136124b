"""Writing and rewinding JSON-lines files of a run."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any


def append_lines(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Appends records as JSON lines: all of them, or, where the disk is full, none.

    Raises:
        OSError: none was written.
    """
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()
    if not text:
        return
    with path.open("ab", buffering=0) as file:
        before = file.tell()
        try:
            if file.write(text) < len(text):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            file.truncate(before)
            raise


def keep_lines(path: Path, keep: Callable[[Mapping[str, Any]], bool]) -> None:
    """Drops the lines of a JSON-lines file that a resumed run will write again; a torn last line goes too."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if keep(record):
            kept.append(line + "\n")
    temporary = path.with_name(path.name + ".partial")
    temporary.write_text("".join(kept), encoding="utf-8")
    temporary.replace(path)


def write_json(path: Path, value: Any) -> None:
    """Writes JSON under a temporary name and renames it."""
    temporary = path.with_name(path.name + ".partial")
    temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(path)
