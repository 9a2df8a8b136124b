"""The values that flow through ``mmcl``, each checked where it is made.

Shape letters, used in every signature and name of the project:

``B`` rows of this rank · ``N`` rows of all ranks · ``T`` frames · ``C`` channels · ``H W`` pixels ·
``S`` audio samples · ``M`` mels · ``L`` tokens · ``D`` embedding width
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from mmcl.specs import READ as READ
from mmcl.specs import TIMED as TIMED
from mmcl.specs import AudioSpec as AudioSpec
from mmcl.specs import Modality as Modality
from mmcl.specs import MotionSpec as MotionSpec
from mmcl.specs import QuestionSpec as QuestionSpec
from mmcl.specs import Spec as Spec
from mmcl.specs import TextSpec as TextSpec
from mmcl.specs import TimedSpec as TimedSpec
from mmcl.specs import Tokenizer as Tokenizer
from mmcl.specs import VectorSpec as VectorSpec
from mmcl.specs import VideoSpec as VideoSpec

if TYPE_CHECKING:  # the values of preparation need neither; torch alone costs seconds and half a gigabyte
    import numpy as np
    import torch
    from torch import Tensor

Level: TypeAlias = str
"""What of a tower an objective sees: ``joint``, ``pooled``, ``tokens``, ``joint_tokens`` or ``stage:NAME``."""

Kind: TypeAlias = Literal["online", "momentum"]

Decoder: TypeAlias = Literal["decord", "pyav", "torchcodec"]

DEFAULT_DECODER: Decoder = "pyav"
"""It raises on damaged files where decord ends the process, and takes less time (``tools/bench/loader.py``)."""


_PASSWORD = re.compile(r"(?<=://)[^/?#\s]*@")
_SIGNATURE = re.compile(
    r"(?i)([?&](?:x-(?:amz|goog)-(?:signature|credential|security-token)|[a-z_-]*(?:token|key|secret|password)|"
    r"sig|signature)=)[^&#\s'\"]+"
)


def redact(text: str) -> str:
    """A text without the passwords and signatures of URLs in it.

    >>> redact("https://me:secret@host/a.tar?sig=abc&x=1 is missing")
    'https://…@host/a.tar?sig=…&x=1 is missing'
    """
    return _SIGNATURE.sub(r"\1…", _PASSWORD.sub("…@", text)) if "://" in text else text


class MmclError(Exception):
    """An error with a message for people; the command line prints it on one line and exits with ``exit_code``.

    What URLs hold of passwords and signatures is left out of it.
    """

    exit_code = 1

    def __init__(self, *args: object) -> None:
        super().__init__(*(redact(arg) if isinstance(arg, str) else arg for arg in args))


class RunError(MmclError):
    """A run that cannot go on."""


class ConfigError(MmclError, ValueError):
    """Wrong usage or configuration: names the path, the value and what is allowed."""

    exit_code = 2


class SampleError(Exception):
    """Data that cannot be used: the sample becomes a hole in training, a line of ``failures.jsonl`` in preparation.

    ``reason`` is a short stable slug to count by (``decode``, ``truncated``, ``empty``, ``no_video_stream``, …);
    ``detail`` is for people.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        self.reason, self.detail = reason, redact(detail)
        super().__init__(self.reason, self.detail)

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}" if self.detail else self.reason


@dataclass(frozen=True, slots=True)
class Source:
    """Where a sample lies: the shard's number in its manifest and the sample's number in that shard."""

    shard: int
    index: int


@dataclass(frozen=True, slots=True, eq=False)
class Clip:
    """One decoded time window of a sample; video and audio cover the same half-open interval of seconds."""

    key: str
    video: np.ndarray | None = None
    """uint8 ``(T, C, H, W)``"""
    frame_times_seconds: np.ndarray | None = None
    """float64 ``(T,)``, ascending, on the clock of the source file"""
    audio: np.ndarray | None = None
    """float32 ``(S,)`` in [−1, 1], mono"""
    sample_rate_hz: int | None = None
    audio_start_seconds: float = 0.0
    text: str | None = None
    source: Source | None = None

    def __post_init__(self) -> None:
        if self.video is not None:
            if self.video.dtype != "uint8" or self.video.ndim != 4:
                raise ValueError(f"video must be uint8 (T, C, H, W), got {self.video.dtype} {self.video.shape}")
            if self.frame_times_seconds is None or self.frame_times_seconds.shape != self.video.shape[:1]:
                raise ValueError("frame_times_seconds must hold one time per frame")
        if self.audio is not None:
            if self.audio.dtype != "float32" or self.audio.ndim != 1:
                raise ValueError(f"audio must be float32 (S,), got {self.audio.dtype} {self.audio.shape}")
            if not self.sample_rate_hz:
                raise ValueError("audio needs sample_rate_hz")


Place: TypeAlias = Literal["window", "after", "elsewhere", "near"]
"""of a view: in its clip's window; after it; apart from what lies after; at most 5 frames off the window"""


@dataclass(frozen=True, slots=True)
class Overlap:
    """How the two clips of a pair are drawn: ``mmcl.media.windows.overlap_clips``."""

    rates: tuple[float, ...] = (1.0, 0.8, 0.6, 0.4, 0.2)
    """shares of a clip's time, and of its picture's area, that the other shows too; a rate's place is its class"""
    speeds: tuple[int, ...] = (1, 2, 4, 8)
    """a clip takes every such frame of the source at the tower's rate; a speed's place is its class"""
    turned: bool = True
    """each clip is turned by 0 to 3 quarters, after it was cropped"""
    area: tuple[float, float] = (0.15, 0.35)
    """share of the picture that a clip shows, uniform"""
    aspect: tuple[float, float] = (0.75, 4 / 3)
    """width ÷ height of that, log-uniform"""
    oversample: float = 2.0
    """decode pictures this many times larger than the view"""


DEFAULT_OVERLAP = Overlap()


@dataclass(frozen=True, slots=True)
class Erase:
    """One frame of a clip, drawn for each clip, is laid over all of them (``mmcl.media.augment.background_erase``)."""

    strength: tuple[float, float] = (0.0, 0.3)
    """share of that frame, uniform"""
    per: Literal["sample", "batch"] = "sample"
    """each sample draws a share of its own, or all rows of a global batch have the same"""


@dataclass(frozen=True, slots=True)
class View:
    """What one objective wants to see of a sample. Equal views are made once and shared.

    Views with the same ``clip`` number look at the same time window of their sample, whatever their modality.
    """

    spec: Spec
    clip: int = 0
    augmentation: str = "none"
    """a name in ``data.augmentations``"""
    copy: int = 0
    """views that differ in this alone are independent draws of the same augmentation"""
    erase: Erase | None = None
    """background erasing, after the augmentation; the other draws are those of the view without"""
    overlap: Overlap | None = None
    """the clips 0 and 1 of such a pair lie and are cropped as this says, not as ``data.sampling`` does"""
    place: Place = "window"
    gap_frames: int = 0
    """at the spec's rate, between the window and what lies after it"""

    @property
    def modality(self) -> Modality:
        return self.spec.modality

    def __str__(self) -> str:
        suffix = "" if self.augmentation == "none" else f",{self.augmentation}"
        suffix += ",erased" * (self.erase is not None) + ",overlap" * (self.overlap is not None)
        place = "" if self.place == "window" else f" {self.place}"
        return f"{self.modality}[{self.clip}{place}{suffix}{f'#{self.copy}' if self.copy else ''}]"


@dataclass(frozen=True, slots=True, eq=False)
class ViewBatch:
    """One view of every row: padded values, who has it, and the parameters it was made with."""

    data: Tensor
    """uint8 ``(B, T, C, H, W)`` | float32 ``(B, S)``, ``(B, D)`` or ``(B, T, 2, S, S)`` | int64 ``(B, L)``, or
    ``(B, K + J, L)`` of questions"""
    present: Tensor
    """bool ``(B,)``; rows that are not present hold zeros"""
    mask: Tensor | None = None
    """bool, the shape of ``data``, text only: True at tokens"""
    params: Mapping[str, Tensor] = field(default_factory=dict)
    """``start_seconds (B,)`` and what else the view was made with, one row each"""

    def __len__(self) -> int:
        return len(self.data)

    def map(self, function: Any) -> ViewBatch:
        """The same view with ``function`` applied to every tensor."""
        return ViewBatch(
            function(self.data),
            function(self.present),
            None if self.mask is None else function(self.mask),
            {name: function(value) for name, value in self.params.items()},
        )


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """The rows of one rank, in draw order. A missing modality or a bad sample is an absent row, never a dropped one."""

    views: Mapping[View, ViewBatch]
    keys: tuple[str, ...]
    """"" for a hole"""
    draws: Tensor
    """int64 ``(B,)``: the draw number of each row"""
    groups: Tensor
    """int64 ``(B, G)``: rows that share a number in any column are never each other's negatives; −1: none"""
    labels: Tensor
    """int64 ``(B,)``, −1: none"""
    skipped: tuple[tuple[int, str, str, str], ...] = ()
    """(draw, key or position, reason, detail) of the bad samples of these rows"""
    metadata: tuple[Mapping[str, Any], ...] = ()
    """what the sample's JSON held, one mapping per row; only where the stream was asked for it"""
    captions: tuple[tuple[str, ...], ...] = ()
    """all captions of each row; only where the stream was asked for metadata"""

    pools: Tensor | None = None
    """int64 ``(B,)``: only rows of an equal number are each other's negatives, −1: of none; None: no matter"""

    def __len__(self) -> int:
        return len(self.keys)

    def map(self, function: Any) -> Batch:
        """The same batch with ``function`` applied to every tensor."""
        return replace(
            self,
            views={view: values.map(function) for view, values in self.views.items()},
            draws=function(self.draws),
            groups=function(self.groups),
            labels=function(self.labels),
            pools=None if self.pools is None else function(self.pools),
        )

    def to(self, device: torch.device | str) -> Batch:
        return self.map(lambda tensor: tensor.to(device, non_blocking=True))


@dataclass(frozen=True, slots=True, eq=False)
class Features:
    """What a tower returns for the rows it was given."""

    pooled: Tensor
    """``(B, D)``, before any head, not normalised"""
    tokens: Tensor | None = None
    """``(B, L, D)``"""
    token_mask: Tensor | None = None
    """bool ``(B, L)``; None: all tokens are real"""
    grid: tuple[int, ...] | None = None
    """how ``L`` unfolds, e.g. ``(T, H, W)`` or ``(time, frequency)``"""
    stages: Mapping[str, Tensor] = field(default_factory=dict)
    """feature maps by name, channels last, ``(B, …grid…, D)``"""


@dataclass(frozen=True, slots=True)
class TowerInfo:
    """What an objective may know of a tower when it is built."""

    name: str
    spec: Spec
    width: int
    """``D`` of ``pooled`` and ``tokens``"""
    joint_width: int
    """``D`` of ``joint``"""
    trainable: bool = True
    """whether weights of the tower itself learn"""
    stages: tuple[tuple[str, int], ...] = ()
    """(name, ``D``) of the feature maps that it offers as levels ``stage:NAME``"""
    trainable_head: bool = False
    """whether its head learns where the tower itself does not"""
    causal_patch: tuple[int, ...] | None = None
    """what part of the input each token stands for, where no token sees what comes later; None: they may"""

    @property
    def modality(self) -> Modality:
        return self.spec.modality


@dataclass(frozen=True, slots=True)
class Need:
    """One demand of an objective: these levels of this tower on this view."""

    tower: str
    view: View
    levels: tuple[Level, ...] = ("joint",)
    kind: Kind = "online"


@dataclass(frozen=True, slots=True, eq=False)
class Embeddings:
    """What objectives see: levels of towers on views, and the batch they came from. Absent rows hold zeros."""

    values: Mapping[tuple[str, View, Level, Kind], Tensor]
    batch: Batch
    scales: Mapping[str, Tensor] = field(default_factory=dict)
    """the model's multipliers of the cosine (1 / temperature), 0-d, clamped, by name"""
    fusions: Mapping[str, Callable[[Sequence[Tensor]], Tensor]] = field(default_factory=dict)
    """the model's learned fusions by name: ``(B, D)`` rows of each member to ``(B, D)``"""
    progress: float = 0.0
    """share of the run's optimizer steps that were taken before this one"""

    def get(self, need: Need, level: Level | None = None) -> Tensor:
        """The tensor that answers ``need``; ``level`` is only needed where it names several."""
        return self.values[(need.tower, need.view, level or need.levels[0], need.kind)]

    def fused(self, needs: Sequence[Need]) -> Tensor:
        """The rows ``(B, D)`` that answer ``needs`` of several towers as one, by the model's fusion of them; rows that
        lack any of the views are zero. Of one need its rows.
        """
        if len(needs) == 1:
            return self.get(needs[0])
        rows = self.fusions["+".join(need.tower for need in needs)]([self.get(need) for need in needs])
        return rows.masked_fill(~self.present(*(need.view for need in needs))[:, None], 0.0)

    def present(self, *views: View) -> Tensor:
        """bool ``(B,)``: rows that have all these views."""
        import torch

        return torch.stack([self.batch.views[view].present for view in views]).all(0)

    def __iter__(self) -> Iterator[tuple[str, View, Level, Kind]]:
        return iter(self.values)
