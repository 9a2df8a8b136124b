"""Options of multiple-choice video question answering, each term on its own switch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from mmcl.config import Options
from mmcl.objectives.views import NotNegative, PositiveFloat, PositiveInt
from mmcl.objectives.weights import Weight


class AnswerTerm(Options):
    """Cross-entropy over the scores of the answers."""

    weight: NotNegative = 1.0


class ContrastTerm(Options):
    """What was read with masked tokens finds its own answer among all."""

    weight: NotNegative = 1.0
    augmentation: str
    """a name in ``data.augmentations`` whose text part masks, such as ``{mask: 0.15}``"""
    similarity: Literal["dot", "cosine"] = "dot"
    temperature: PositiveFloat = 1.0


class LocalisationTerm(Options):
    """Which frames lie inside the span where the answer shows; two classes, mean over the frames of a clip."""

    weight: NotNegative = 1.0


class QuestionTerm(Options):
    """Pre-training: which question was asked about the clip, among questions about other clips; no answer is read."""

    weight: NotNegative = 1.0
    candidates: Annotated[int, Field(ge=2, le=33)] = 5


class VideoQAOptions(Options):
    """Multiple-choice questions about clips with subtitles (Kim et al. 2021, arXiv 2009.08043); a term set to null is
    off.

    Needs: shards with ``KEY.qa.json``, which `mmcl shards reshard --questions FILE.jsonl` attaches; a text tower and a
    video tower whose window is as long as the clips.
    """

    name: Literal["video_qa"] = "video_qa"
    weight: Weight = 1.0
    text: str = "text"
    """the tower that reads"""
    video: str | None = "video"
    """the tower whose tokens sentences attend to; null: texts alone, to see what they give away"""
    answers: Annotated[int, Field(ge=2, le=64)] = 5
    """of each question; one with another number is skipped and counted"""
    sentences: PositiveInt = 8
    """of the subtitles; of more, neighbours are joined"""
    window_seconds: NotNegative = 0.5
    """a sentence attends to frames from this long before it begins to this long after it ends"""
    width: Annotated[int, Field(ge=2, multiple_of=2)] = 256
    """of what is made of a candidate"""
    answer: AnswerTerm | None = AnswerTerm()
    contrast: ContrastTerm | None = None
    """e.g. ``{augmentation: masked}``"""
    localisation: LocalisationTerm | None = None
    question: QuestionTerm | None = None
    pretrained: str | None = None
    """a run folder or checkpoint with this objective whose weights it starts from, such as one of ``question`` alone"""
