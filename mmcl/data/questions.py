"""A multiple-choice question as the texts that a tower reads, with what a loss must know of it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from mmcl.hashing import uniform
from mmcl.media.augmentation import Params
from mmcl.shards.questions import Question
from mmcl.types import QuestionSpec, SampleError

_PLACE, _OTHERS = 18, 19  # what a random number is for, beside those of ``views``

TYPE_BYTES = 32
"""of the name of a question's type, UTF-8, filled with zeros"""


def question_texts(
    spec: QuestionSpec, question: Question, words: Sequence[int], seconds: float | None
) -> tuple[tuple[str, ...], Params]:
    """Texts and parameters of one question about a clip of ``seconds``; ``words`` key what is drawn.

    Parameters: ``target`` int64, the right candidate · ``sentence_seconds`` float64 ``(J, 2)``, NaN where there is no
    sentence · ``span_seconds`` float64 ``(2,)``, NaN where none is known · ``type`` uint8 ``(32,)``. A clip without
    subtitles has one empty sentence that lasts as long as it.

    Raises ``SampleError``: ``answers`` (another number than the view asks for), ``distractors`` (too few).
    """
    end = np.inf if seconds is None else seconds
    spoken = [(max(s.start, 0.0), min(s.end, end), s.text) for s in question.subtitles if s.start < end]
    sentences = _joined(spoken or [(0.0, end, "")], spec.sentences)
    pairs, target = _candidates(spec, question, words)
    heads = [f"{asked} | {answer}" if answer else asked for asked, answer in pairs]
    blank = [""] * (spec.sentences - len(sentences))
    times = np.full((spec.sentences, 2), np.nan)
    times[: len(sentences)] = [(first, last) for first, last, _ in sentences]
    span = question.span if question.span is not None and question.span[0] < end else (np.nan, np.nan)
    params = {
        "target": np.asarray(target, np.int64),
        "sentence_seconds": times,
        "span_seconds": np.minimum(np.array(span, np.float64), end),
        "type": _type_bytes(question.type),
    }
    return (*heads, *(said for _, _, said in sentences), *blank), params


def blank_question(spec: QuestionSpec) -> tuple[tuple[str, ...], Params]:
    """What an absent row holds."""
    params = {
        "target": np.asarray(-1, np.int64),
        "sentence_seconds": np.full((spec.sentences, 2), np.nan),
        "span_seconds": np.full(2, np.nan),
        "type": _type_bytes(""),
    }
    return ("",) * spec.texts, params


def _candidates(spec: QuestionSpec, question: Question, words: Sequence[int]) -> tuple[list[tuple[str, str]], int]:
    """(question, answer) of each candidate, and which is right."""
    if spec.part == "questions":
        # without the answer: its words would give away the question that has them
        wanted = spec.candidates - 1
        if len(question.distractors) < wanted:
            raise SampleError("distractors", f"{len(question.distractors)} questions of other clips, {wanted} needed")
        order = np.argsort(uniform(*words, _OTHERS, np.arange(len(question.distractors))), kind="stable")
        others = [question.distractors[i] for i in order[:wanted].tolist()]
        place = int(uniform(*words, _PLACE) * spec.candidates)
        return [(text, "") for text in (*others[:place], question.question, *others[place:])], place
    if len(question.answers) != spec.candidates:
        raise SampleError("answers", f"{len(question.answers)} answers, the view asks for {spec.candidates}")
    if spec.part == "truth":
        return [(question.question, question.answers[question.answer])], 0
    return [(question.question, answer) for answer in question.answers], question.answer


def _joined(sentences: Sequence[tuple[float, float, str]], most: int) -> list[tuple[float, float, str]]:
    """At most so many: runs of neighbours, as even as can be, become one sentence."""
    if len(sentences) <= most:
        return list(sentences)
    edges = [len(sentences) * i // most for i in range(most + 1)]
    runs = [sentences[a:b] for a, b in pairwise(edges)]
    return [(min(s[0] for s in run), max(s[1] for s in run), " ".join(s[2] for s in run)) for run in runs]


def _type_bytes(name: str) -> np.ndarray:
    data = np.zeros(TYPE_BYTES, np.uint8)
    encoded = name.encode("utf-8", errors="replace")[:TYPE_BYTES]
    data[: len(encoded)] = np.frombuffer(encoded, np.uint8)
    return data
