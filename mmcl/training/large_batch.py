"""How one ``train.global_batch`` is shared out: among processes, into micro-batches, over losses of a step."""

from __future__ import annotations

from mmcl.data.order import rows_of_rank
from mmcl.recipe import TrainOptions
from mmcl.types import ConfigError


def describe_split(options: TrainOptions, processes: int) -> str:
    """The arithmetic of a step in words, e.g. ``64 rows = 2 processes × 4 micro-batches × 8 rows``.

    Raises:
        ConfigError: rows do not divide among the processes, or a rank's rows into micro-batches of equal size; names
            what would.
    """
    rows = rows_of_rank(options.global_batch, processes)
    micro = min(options.micro_batch or rows, rows)
    if rows % micro:
        fits = [size for size in range(1, rows + 1) if rows % size == 0]
        below = max(size for size in fits if size < micro)
        above = min(size for size in fits if size > micro)
        raise ConfigError(
            f"train.micro_batch: {options.global_batch} rows / {processes} process(es) = {rows} rows of a rank, / "
            f"{micro} rows = {rows / micro:.4g} micro-batches; nearest: {below} or {above}, or train.global_batch="
            f"{processes * micro * max(1, round(rows / micro))}"
        )
    parts = [f"{processes} process(es)", *([f"{rows // micro} micro-batches"] if micro < rows else []), f"{micro} rows"]
    words = f"{options.global_batch} rows = {' × '.join(parts)}"
    if options.accumulate > 1:
        samples = options.global_batch * options.accumulate
        words += f", {options.accumulate} such losses per step: {samples} samples"
    return words
