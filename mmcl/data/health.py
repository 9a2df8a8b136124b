"""Counting bad samples: every one is named, too many stop the run."""

from __future__ import annotations

import json
import os
from collections import Counter, deque
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mmcl.types import Batch, RunError

RATE_WINDOW = 1000


class SkipLimits:
    """Watches the holes of one rank.

    Raises :class:`RunError` when ``in_a_row`` samples fail one after the other, or when more than ``rate`` of the last
    1,000 draws failed (judged from 100 draws on, so that one bad sample at the start does not stop a run).
    """

    def __init__(self, *, in_a_row: int, rate: float) -> None:
        self.in_a_row, self.rate = in_a_row, rate
        self.reasons: Counter[str] = Counter()
        self._row = 0
        self._recent: deque[bool] = deque(maxlen=RATE_WINDOW)

    @property
    def skipped(self) -> int:
        """Bad samples seen so far."""
        return sum(self.reasons.values())

    def watch(self, batch: Batch) -> None:
        """Counts the holes of one batch of this rank."""
        bad = {draw: reason for draw, _, reason, _ in batch.skipped}
        for draw in batch.draws.tolist():
            reason = bad.get(draw)
            self._recent.append(reason is not None)
            if reason is None:
                self._row = 0
                continue
            self._row += 1
            self.reasons[reason] += 1
            if self._row >= self.in_a_row:
                raise RunError(
                    f"{self._row} bad samples in a row (data.max_skipped_in_a_row), {self._summary()}; "
                    f"last: {self._last(batch)}"
                )
        bad_share = sum(self._recent) / max(len(self._recent), 1)
        if len(self._recent) >= 100 and bad_share > self.rate:
            raise RunError(
                f"{bad_share:.0%} of the last {len(self._recent)} samples are bad (data.max_skipped_rate is "
                f"{self.rate:.0%}), {self._summary()}; last: {self._last(batch)}"
            )

    def _summary(self) -> str:
        return "reasons: " + ", ".join(f"{reason} {count}" for reason, count in self.reasons.most_common())

    @staticmethod
    def _last(batch: Batch) -> str:
        _, key, reason, detail = batch.skipped[-1]
        return f"{key}: {reason}" + (f" ({detail})" if detail else "")


def skip_records(skipped: Iterable[tuple[int, str, str, str]]) -> list[dict[str, object]]:
    """What ``skipped.jsonl`` holds of each bad sample."""
    return [{"draw": draw, "key": key, "reason": reason, "detail": detail} for draw, key, reason, detail in skipped]


def append_quarantine(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Adds lines to ``quarantine.jsonl``, on disk when this returns.

    Each is one write at the end of the file, so that ranks can share it. A disk that takes no more is said aloud and
    the run goes on: the keys are in memory and in the next checkpoint.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            for record in records:
                os.write(file, (json.dumps(record, ensure_ascii=False) + "\n").encode("utf-8", "replace"))
            os.fsync(file)
        finally:
            os.close(file)
    except OSError as error:
        print(f"{path} not written: {error.strerror or error}", flush=True)


def read_quarantine(path: Path) -> set[str]:
    """The keys in ``quarantine.jsonl``; a torn line names nobody."""
    if not path.exists():
        return set()
    keys = map(_quarantined_key, path.read_text(encoding="utf-8", errors="replace").split("\n"))
    return {key for key in keys if key is not None}


def _quarantined_key(line: str) -> str | None:
    try:
        return str(json.loads(line)["key"])
    except (ValueError, KeyError, TypeError):
        return None
