"""What a configuration says about the stream."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from mmcl.config import Options
from mmcl.data.clusters import Clusters, read_clusters
from mmcl.media.augmentation import Augmentation
from mmcl.shards.remote import RemoteOptions
from mmcl.types import DEFAULT_DECODER, Decoder

PositiveInt = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]


class SamplingOptions(Options):
    """Where the clips of a sample lie in time. How many there are follows from the objectives' views."""

    rule: Literal["random", "even"] = "random"
    """drawn anew in each epoch, or evenly spaced over the source"""
    span_seconds: Annotated[float, Field(ge=0)] | None = None
    """from the start of the first clip to the start of the last, at most; null: as long as the source"""
    gap_seconds: tuple[float | None, float | None] = (None, None)
    """[min, max] from the end of a clip to the start of the next, negative where they overlap; null: no limit"""
    overlap: bool = True
    """clips may share instants; false is a gap of at least 0, and equal distances where the source is too short"""

    overlap_rate: tuple[Share, Share] | None = None
    """[least, most] share of a clip's time that the next clip shows too; instead of ``gap_seconds``. A least of 0
    allows any distance; a source too short for the rate asked for gives a larger one"""

    @field_validator("gap_seconds", "overlap_rate", mode="before")
    @classmethod
    def _pair(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    def gap_limits(self, length_seconds: float) -> tuple[float, float]:
        """Smallest and largest gap in seconds between clips of this length."""
        if self.overlap_rate is not None:
            lowest, highest = self.overlap_rate
            return -highest * length_seconds, -lowest * length_seconds if lowest else math.inf
        least, most = self.gap_seconds
        least = -math.inf if least is None else least
        return (least if self.overlap else max(0.0, least), math.inf if most is None else most)

    @model_validator(mode="after")
    def _meaningful(self) -> SamplingOptions:
        least, most = self.gap_limits(0.0)
        if self.overlap_rate is not None:
            if (self.gap_seconds, self.overlap) != ((None, None), True):
                raise ValueError("overlap_rate comes instead of gap_seconds and overlap")
            if self.overlap_rate[0] > self.overlap_rate[1]:
                raise ValueError("overlap_rate must be [least, most]")
        if least > most:
            raise ValueError(f"gap_seconds asks for at least {least:g} s and at most {most:g} s")
        random = (self.span_seconds, self.gap_seconds, self.overlap, self.overlap_rate)
        if self.rule == "even" and random != (None, (None, None), True, None):
            raise ValueError("span_seconds, gap_seconds, overlap and overlap_rate belong to rule 'random'")
        return self


class SourceOptions(Options):
    """One part of a mixture."""

    shards: str
    """folder or URL that holds ``index.json``"""
    weight: PositiveInt = 1
    """share of the draws in whole numbers: 7 and 3, not 0.7 and 0.3"""


class DataOptions(Options):
    """Where samples come from and how they are read."""

    shards: str | tuple[str, ...] | None = None
    """folder or URL (http, https, s3, gs, hf) that holds ``index.json``; or tars without one
    (``https://host/{000..099}.tar``, or a list). Logins belong in ``~/.netrc`` or the store's own settings, not in the
    URL: a configuration is kept with its run. ``http_proxy``, ``https_proxy``, ``no_proxy``, ``SSL_CERT_FILE`` count"""
    allow_pipe: bool = False
    """let ``shards`` be ``pipe:COMMAND``, whose output is a tar: it runs the command"""
    sources: tuple[SourceOptions, ...] = ()
    """several of them, mixed by weight, each with its own epochs; instead of ``shards``"""
    workers: Annotated[int, Field(ge=0)] = 2
    """decoding processes per rank; lowered to a divisor of the rank's rows. 0 still decodes in one child process"""
    in_process: bool = False
    """decode in the training process itself: for debugging, a crash of a decoder then ends the run"""
    decoder: Decoder = DEFAULT_DECODER
    """they give the same frames; decord ends its process on some damaged files, which then costs a worker"""
    streams: PositiveInt = 64
    """runs into which an epoch is cut; choose a multiple of the largest ranks × workers"""
    block: PositiveInt = 256
    """samples permuted together inside a run"""
    allow_shared_streams: bool = False
    """let several workers read each run of remote shards, where ranks × workers do not divide ``streams``"""
    timeout_seconds: Annotated[float, Field(gt=0)] = 120.0
    """a worker that is at one sample for longer is ended; the sample is never decoded again"""
    read_ahead_bytes: PositiveInt = 256 << 20
    """of remote shards: asked for and not yet decoded, at most, by all workers of a rank together"""
    connections: PositiveInt = 64
    """requests of a rank for remote shards at the same time"""
    retries: Annotated[int, Field(ge=0)] = 5
    """further tries of a remote read that failed, each after twice the pause, with jitter"""
    retry_seconds: Annotated[float, Field(gt=0)] = 60.0
    """after which a remote read that keeps failing is given up, and its sample is a hole; half of
    ``timeout_seconds`` at most"""
    stall_seconds: Annotated[float, Field(gt=0)] = 20.0
    """without any byte, then a remote read counts as failed; so does one that, after as long, has come slower than
    64 KiB per second as a whole; a quarter of ``timeout_seconds`` at most"""
    cache_dir: str | None = None
    """local folder that keeps what was read of remote shards; several ranks and runs may share it"""
    cache_bytes: PositiveInt = 64 << 30
    """that ``cache_dir`` holds at most; what was not used for longest goes first"""
    clusters: str | None = None
    """file of pseudo-labels that ``pipelines/multistage.py`` wrote of these shards: every batch then holds samples of
    one, with holes where they do not fill it; see ``cluster_batches``"""
    cluster_batches: Literal["pure", "mixed"] = "pure"
    """with ``clusters``: batches of one pseudo-label, or batches of all whose negatives keep to their own (cross_modal,
    and contrast of views)"""
    short: Literal["loop", "hold"] = "loop"
    """what fills a window that is longer than its source: start again, or stay on the last frame (audio: silence)"""
    sampling: SamplingOptions = SamplingOptions()
    """where the clips of a sample lie in time"""
    augmentations: dict[str, Augmentation] = Field(default_factory=dict)
    """by name; objectives name them in their views. "none" is built in"""
    max_skipped_in_a_row: PositiveInt = 100
    """bad samples in a row on one rank that stop the run"""
    max_skipped_rate: Annotated[float, Field(gt=0, le=1)] = 0.2
    """share of bad samples among the last 1,000 draws of a rank that stops the run"""

    @field_validator("shards", mode="before")
    @classmethod
    def _several(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    @model_validator(mode="after")
    def _one_way_to_name_shards(self) -> DataOptions:
        if (self.shards is None) == (not self.sources):
            raise ValueError("needs either shards (one folder or URL) or sources (a list of shards and weight)")
        return self

    @property
    def remote(self) -> RemoteOptions:
        """How remote shards are read: a worker gives a read up before it would itself count as hanging."""
        return RemoteOptions(
            read_ahead_bytes=self.read_ahead_bytes,
            connections=self.connections,
            retries=self.retries,
            retry_seconds=min(self.retry_seconds, self.timeout_seconds / 2),
            stall_seconds=min(self.stall_seconds, self.timeout_seconds / 4),
            cache_dir=self.cache_dir,
            cache_bytes=self.cache_bytes,
        )

    @property
    def pseudo_labels(self) -> Clusters | None:
        """What ``clusters`` names."""
        return None if self.clusters is None else read_clusters(Path(self.clusters))

    @property
    def weighted(self) -> tuple[tuple[str | tuple[str, ...], int], ...]:
        """(folder or URL, weight) of each source, however they were given."""
        if self.shards is not None:
            return ((self.shards, 1),)
        return tuple((source.shards, source.weight) for source in self.sources)
