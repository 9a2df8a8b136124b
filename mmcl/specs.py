"""What towers eat: one specification for each kind of input. ``mmcl.types`` has the same names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol, TypeAlias

if TYPE_CHECKING:
    from torch import Tensor

Modality: TypeAlias = str
"""An open set of names: ``video``, ``audio``, ``text``; later ``image``, ``motion``, ``points``, …"""


class Tokenizer(Protocol):
    """Text to token numbers; hashable (equal ones make equal views) and picklable (it runs in workers).

    It may have ``cut(texts) -> list[bool]``, which of them are longer than it takes (without: none are counted).
    For augmentation it may also have ``special_ids``, numbers that are never changed (none), ``mask_id``, what stands
    for a masked token (None: masks are refused), and ``vocabulary``, how many numbers there are.
    """

    def __call__(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Returns ids int64 ``(B, L)`` and mask bool ``(B, L)``; every row keeps at least one unmasked token."""
        ...

    def __hash__(self) -> int: ...


@dataclass(frozen=True, slots=True)
class VideoSpec:
    """What a video tower eats. A picture is a video of one frame."""

    frames: int = 8
    size: int = 64
    """pixels, height = width"""
    fps: float = 4.0
    """frames per second at which the window is sampled; the window is ``frames / fps`` seconds"""
    fit: Literal["crop", "squash", "crop_start", "crop_end"] = "crop"
    """how a picture becomes square: scale the short side and crop the centre, or scale both sides; the start or end
    of the long side in place of the centre are views of evaluation"""
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.25, 0.25, 0.25)
    stride: int | None = None
    """take every such frame of the source instead: ``fps`` is then its mean frame rate / ``stride``, and holds for
    pictures alone"""
    keyframe: bool = False  # take the nearest keyframes of the source instead
    modality: Modality = field(default="video", init=False)

    @property
    def seconds(self) -> float:
        return self.frames / self.fps


@dataclass(frozen=True, slots=True)
class MotionSpec:
    """What a tower of motion eats: float32 ``(T, 2, S, S)``, velocities (x, y) in pixels per frame of the source."""

    frames: int = 8
    size: int = 64
    """pixels, height = width, of the picture that moves: velocities are in these pixels"""
    cell: float = 4.0
    """of these pixels, that one velocity stands for"""
    fps: float = 25.0
    fit: Literal["crop", "squash"] = "crop"
    stride: int | None = 1
    """take every such frame of the source instead, as :class:`VideoSpec` has it"""
    keyframes: Literal["hold", "zero"] = "hold"
    """they have no motion of their own: that of the frame before, or none"""
    corrected: bool = True
    """velocities are scaled with the picture and turned round with a flip; false: neither"""
    modality: Modality = field(default="motion", init=False)

    @property
    def side(self) -> int:  # S
        return max(1, round(self.size / self.cell))

    @property
    def seconds(self) -> float:
        return self.frames / self.fps


@dataclass(frozen=True, slots=True)
class AudioSpec:
    """What an audio tower eats: a mono wave, float32 ``(S,)`` with ``S = round(seconds * sample_rate_hz)``."""

    sample_rate_hz: int = 16_000
    seconds: float = 2.0
    modality: Modality = field(default="audio", init=False)

    @property
    def samples(self) -> int:
        return round(self.seconds * self.sample_rate_hz)


@dataclass(frozen=True, slots=True)
class TextSpec:
    """What a text tower eats."""

    tokenizer: Tokenizer
    modality: Modality = field(default="text", init=False)

    @property
    def seconds(self) -> float:
        return 0.0


@dataclass(frozen=True, slots=True)
class VectorSpec:
    """What a tower eats that passes stored embeddings on: the member ``NAME.npy`` of a sample, float32 ``(D,)``."""

    member: str
    """NAME; it is the modality too"""
    width: int
    """``D``"""

    @property
    def modality(self) -> Modality:
        return self.member

    @property
    def seconds(self) -> float:
        return 0.0


@dataclass(frozen=True, slots=True)
class QuestionSpec:
    """What a text tower reads of a multiple-choice question: "question | answer" of each candidate, then the sentences
    of the subtitles, each a text of its own.
    """

    tokenizer: Tokenizer
    candidates: int = 5
    """``K``"""
    sentences: int = 8
    """``J``; of more, neighbours are joined"""
    part: Literal["answers", "truth", "questions"] = "answers"
    """the question with each answer; with the right one alone; or, without one, among questions about other clips"""
    modality: Modality = field(default="questions", init=False)

    @property
    def seconds(self) -> float:
        return 0.0

    @property
    def heads(self) -> int:
        """candidates that are read"""
        return 1 if self.part == "truth" else self.candidates

    @property
    def texts(self) -> int:
        """of one row"""
        return self.heads + self.sentences


TimedSpec: TypeAlias = VideoSpec | AudioSpec | MotionSpec
Spec: TypeAlias = TimedSpec | TextSpec | VectorSpec | QuestionSpec

TIMED = (VideoSpec, AudioSpec, MotionSpec)
"""specs of what lies in time: their views are windows"""

READ = (TextSpec, QuestionSpec)
"""specs of what is read: their views are tokens"""
