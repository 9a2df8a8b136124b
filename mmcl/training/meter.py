"""What is counted between two log lines."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from mmcl.data.health import skip_records
from mmcl.objectives.base import Term
from mmcl.types import Batch


class Meter:
    """Rates between two log lines, and the bad samples of this rank since the last one."""

    def __init__(self) -> None:
        self.note = ""
        """the latest figures, for the progress bar"""
        self._steps, self._wait_seconds = 0, 0.0
        self._start = time.perf_counter()
        self._skipped: list[tuple[int, str, str, str]] = []
        self._cut = 0

    def timed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        while True:
            start = time.perf_counter()
            batch = next(batches)
            self._wait_seconds += time.perf_counter() - start
            yield batch

    def count(self, batches: list[Batch]) -> None:
        self._steps += 1
        for batch in batches:
            self._skipped += batch.skipped
            texts = [view for view in batch.views.values() if "cut" in view.params]
            self._cut += sum(int((view.params["cut"] & view.present).sum()) for view in texts)

    def rates(self, samples_per_step: int) -> dict[str, float]:
        """Since the last call."""
        seconds = max(time.perf_counter() - self._start, 1e-9)
        rates = {
            "samples_per_second": self._steps * samples_per_step / seconds,
            "data_wait_fraction": min(self._wait_seconds / seconds, 1.0),
        }
        self._steps, self._wait_seconds, self._start = 0, 0.0, time.perf_counter()
        return rates

    def take_skipped(self) -> list[dict[str, Any]]:
        records = skip_records(self._skipped)
        self._skipped = []
        return records

    def take_cut(self) -> int:
        """Captions of this rank that were longer than their tower takes, since the last call."""
        cut, self._cut = self._cut, 0
        return cut


def mean_term(terms: list[Term]) -> Term:
    """Losses and metrics of the parts of one step, averaged, for the log."""
    if len(terms) == 1:
        return terms[0]
    loss = torch.stack([term.loss.detach() for term in terms]).mean()
    metrics: Mapping[str, Tensor] = {
        name: torch.stack([term.metrics[name].float() for term in terms]).mean() for name in terms[0].metrics
    }
    return Term(loss, metrics)
