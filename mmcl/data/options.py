"""What a configuration says about the stream."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from mmcl.config import Options

PositiveInt = Annotated[int, Field(ge=1)]


class SourceOptions(Options):
    """One part of a mixture."""

    shards: str
    """folder or URL that holds ``index.json``"""
    weight: PositiveInt = 1
    """share of the draws in whole numbers: 7 and 3, not 0.7 and 0.3"""


class DataOptions(Options):
    """Where samples come from and how they are read."""

    shards: str | None = None
    """folder or URL that holds ``index.json``"""
    sources: tuple[SourceOptions, ...] = ()
    """several of them, mixed by weight, each with its own epochs; instead of ``shards``"""
    workers: Annotated[int, Field(ge=0)] = 2
    """decoding processes per rank; lowered to a divisor of the rank's rows. 0 still decodes in one child process"""
    in_process: bool = False
    """decode in the training process itself: for debugging, a crash of a decoder then ends the run"""
    decoder: Literal["decord", "pyav", "torchcodec"] = "decord"
    streams: PositiveInt = 64
    """runs into which an epoch is cut; choose a multiple of the largest ranks × workers"""
    block: PositiveInt = 256
    """samples permuted together inside a run"""
    allow_shared_streams: bool = False
    """let several workers read each run of remote shards, where ranks × workers do not divide ``streams``"""
    timeout_seconds: Annotated[float, Field(gt=0)] = 120.0
    """a worker that is at one sample for longer is ended; the sample is never decoded again"""
    short: Literal["loop", "hold"] = "loop"
    """what fills a window that is longer than its source: start again, or stay on the last frame (audio: silence)"""
    max_skipped_in_a_row: PositiveInt = 100
    """bad samples in a row on one rank that stop the run"""
    max_skipped_rate: Annotated[float, Field(gt=0, le=1)] = 0.2
    """share of bad samples among the last 1,000 draws of a rank that stops the run"""

    @model_validator(mode="after")
    def _one_way_to_name_shards(self) -> DataOptions:
        if (self.shards is None) == (not self.sources):
            raise ValueError("needs either shards (one folder or URL) or sources (a list of shards and weight)")
        return self

    @property
    def weighted(self) -> tuple[tuple[str, int], ...]:
        """(folder or URL, weight) of each source, however they were given."""
        if self.shards is not None:
            return ((self.shards, 1),)
        return tuple((source.shards, source.weight) for source in self.sources)
