"""A loss or gradient that is not finite: what is said of it, and what is written down."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmcl.distributed import Comm
from mmcl.objectives.base import Term
from mmcl.training.sharding import local
from mmcl.training.tracking import write_json
from mmcl.types import Batch, RunError


def describe_step(
    terms: Sequence[Term],
    grad_norm: Tensor,
    parameters: Iterable[tuple[str, nn.Parameter]],
    batches: Sequence[Batch],
    comm: Comm,
) -> dict[str, Any]:
    """The figures of each term, the keys and draws of the batch over all ranks, the gradients that are not finite.

    Every rank calls it.
    """
    bad = [name for name, p in parameters if p.grad is not None and not bool(local(p.grad).isfinite().all())]
    own = {
        "draws": [draw for batch in batches for draw in batch.draws.tolist()],
        "keys": [key for batch in batches for key in batch.keys],
        "gradients": bad,
    }
    ranks = comm.gather_objects(own)
    rows = sorted(pair for rank in ranks for pair in zip(rank["draws"], rank["keys"], strict=True))
    values = [{"loss": term.loss.detach(), **term.metrics} for term in terms]
    return {
        "draws": [draw for draw, _ in rows],
        "keys": [key for _, key in rows],
        "terms": [{name: jsonable(float(value)) for name, value in each.items()} for each in values],
        "grad_norm": jsonable(float(grad_norm)),
        "gradients": sorted({name for rank in ranks for name in rank["gradients"]}),
    }


def jsonable(value: float) -> float | str:
    """JSON knows no NaN.

    >>> jsonable(1.5), jsonable(math.inf)
    (1.5, 'inf')
    """
    return value if math.isfinite(value) else str(value)


def write_step(folder: Path, step: int, record: dict[str, Any]) -> Path:
    """Writes ``nonfinite/step_….json`` into a run folder; a disk that is full must not hide why it is written."""
    path = folder / "nonfinite" / f"step_{step:08d}.json"
    try:
        path.parent.mkdir(exist_ok=True)
        write_json(path, {"step": step, **record})
    except OSError as error:
        print(f"{path} not written: {error}", flush=True)
    return path


class NonFiniteLimit:
    """Skips up to ``limit`` such steps in a row; 0: the first one ends the run."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._in_a_row = 0

    def finite(self) -> None:
        self._in_a_row = 0

    def not_finite(self, step: int, wrong: str, keys: Iterable[str]) -> None:
        """Notes one more.

        Raises:
            RunError: that was one too many.
        """
        self._in_a_row += 1
        if self._in_a_row <= self.limit:
            print(f"step {step} skipped: not finite: {wrong}", flush=True)
            return
        before = f" ({self._in_a_row} steps in a row, train.nonfinite_limit: {self.limit})" if self.limit else ""
        raise RunError(
            f"step {step}: not finite: {wrong}{before}; nothing was changed by this step; "
            f"keys of its batch: {', '.join(sorted({key for key in keys if key}))}"
        )


def total_norm(gradients: Sequence[Tensor]) -> Tensor:
    """The norm of all gradients together, over all ranks where they are split."""
    norm: Tensor = nn.utils.get_total_norm(list(gradients))
    full = getattr(norm, "full_tensor", None)
    return norm if full is None else torch.as_tensor(full())
