"""What a configuration says about the stream."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from mmcl.config import Options

PositiveInt = Annotated[int, Field(ge=1)]


class DataOptions(Options):
    """Where samples come from and how they are read."""

    shards: str
    """folder or URL that holds ``index.json``"""
    workers: Annotated[int, Field(ge=0)] = 2
    """decoding processes per rank; lowered to a divisor of the rank's rows. 0 still decodes in one child process"""
    in_process: bool = False
    """decode in the training process itself: for debugging, a crash of a decoder then ends the run"""
    decoder: Literal["decord", "pyav", "torchcodec"] = "decord"
    streams: PositiveInt = 64
    """runs into which an epoch is cut; choose a multiple of the largest ranks × workers"""
    block: PositiveInt = 256
    """samples permuted together inside a run"""
    short: Literal["loop", "hold"] = "loop"
    """what fills a window that is longer than its source: start again, or stay on the last frame (audio: silence)"""
    max_skipped_in_a_row: PositiveInt = 100
    """bad samples in a row on one rank that stop the run"""
    max_skipped_rate: Annotated[float, Field(gt=0, le=1)] = 0.2
    """share of bad samples among the last 1,000 draws of a rank that stops the run"""
