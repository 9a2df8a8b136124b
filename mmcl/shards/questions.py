"""Multiple-choice questions about clips: a JSONL file of them, and the file ``KEY.qa.json`` of a sample.

One line is one question, in the names of TVQA or in ours:

``clip`` (``vid_name``) the sample's key, or the path of the file it was made from · ``question`` (``q``) ·
``answers`` a list (``a0``, ``a1``, …) · ``answer`` (``answer_idx``) number of the right one, from 0 · ``subtitles`` a
list of ``{"start": …, "end": …, "text": …}`` in seconds from the start of the clip · ``span`` ``[start, end]``
(``ts`` ``"1.5-3"``), where the answer shows, if known · ``duration_seconds`` if known · ``type`` of the question,
for scores by type; else its first word

Times are noisy: what reaches past an end of the clip is cut there. A span or subtitle wholly outside is refused.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import count, takewhile
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from mmcl.hashing import hash64, text_hash
from mmcl.types import ConfigError, SampleError

DISTRACTORS = 32
"""questions about other clips that are kept with a question, to be told from it"""
MAX_QUESTIONS = 1_000
"""of one clip"""
MAX_BYTES = 1 << 20
"""of one line"""
_DISTRACTOR = 96  # what a hashed number is for


@dataclass(frozen=True, slots=True)
class Subtitle:
    """A sentence and when it is said, in seconds from the start of the clip."""

    start: float
    end: float
    text: str


@dataclass(frozen=True, slots=True)
class Question:
    """One question about a clip."""

    question: str
    answers: tuple[str, ...]
    answer: int
    """which one is right"""
    subtitles: tuple[Subtitle, ...] = ()
    """by time"""
    span: tuple[float, float] | None = None
    """seconds in which the answer shows"""
    type: str = ""
    distractors: tuple[str, ...] = ()
    """questions about other clips"""


def read_questions(path: str | Path) -> dict[str, tuple[Question, ...]]:
    """The questions of a JSONL file by clip, each with :data:`DISTRACTORS` other questions of the file at most.

    Raises:
        ConfigError: a file that cannot be read, or a line that is no such question; names the file and the line.
    """
    found: dict[str, list[Question]] = {}
    try:
        with Path(path).open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    clip, question = _parse_line(line, f"{path}:{number}")
                    found.setdefault(clip, []).append(question)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    if not found:
        raise ConfigError(f"{path}: no questions")
    return _with_distractors(found)


def _parse_line(line: bytes, place: str) -> tuple[str, Question]:
    if len(line) > MAX_BYTES:
        raise ConfigError(f"{place}: a line of {len(line)} bytes, at most {MAX_BYTES}")
    try:
        facts = json.loads(line)
        if not isinstance(facts, dict):
            raise ValueError(f"an object is needed, not {type(facts).__name__}")
        return _text(facts, "clip", "vid_name"), _parse(facts)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{place}: {' '.join(str(error).split())[:300]}") from None


def _parse(facts: Mapping[str, Any]) -> Question:
    """Raises ValueError."""
    question = _text(facts, "question", "q")
    answers = facts.get("answers")
    if answers is None:
        answers = [facts[f"a{i}"] for i in takewhile(lambda i: f"a{i}" in facts, count())]
    if not isinstance(answers, list) or not all(isinstance(each, str) and each.strip() for each in answers):
        raise ValueError("answers must be a list of texts")
    if len(answers) < 2:
        raise ValueError(f"two answers at least are needed, got {len(answers)}")
    right = facts.get("answer", facts.get("answer_idx"))
    if isinstance(right, str) and right.isascii() and right.isdigit():
        right = int(right)
    if type(right) is not int or not 0 <= right < len(answers):
        raise ValueError(f"answer must be a number from 0 to {len(answers) - 1}, got {right!r}")
    seconds = facts.get("duration_seconds")
    end = math.inf if seconds is None else _number(seconds, "duration_seconds")
    kind = facts.get("type")
    return Question(
        question,
        tuple(answers),
        right,
        _subtitles(facts.get("subtitles", []), end),
        _span(facts, end),
        kind if isinstance(kind, str) and kind else question.split()[0].lower(),
    )


def _text(facts: Mapping[str, Any], *names: str) -> str:
    for name in names:
        value = facts.get(name)
        if isinstance(value, str) and value.strip():
            return value
    raise ValueError(f"{names[0]} must be a text that is not empty")


def _number(value: object, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{name} must be a number of seconds, got {value!r}")
    return float(value)


def _subtitles(value: object, end: float) -> tuple[Subtitle, ...]:
    if not isinstance(value, list):
        raise ValueError("subtitles must be a list")
    found = []
    for number, each in enumerate(value):
        if not isinstance(each, dict) or not isinstance(each.get("text"), str):
            raise ValueError(f"subtitles.{number} must have start, end and text")
        found.append(Subtitle(*_within(each.get("start"), each.get("end"), end, f"subtitles.{number}"), each["text"]))
    return tuple(sorted(found, key=lambda subtitle: (subtitle.start, subtitle.end)))


def _span(facts: Mapping[str, Any], end: float) -> tuple[float, float] | None:
    value = facts.get("span")
    if value is None and isinstance(facts.get("ts"), str):
        try:
            value = [float(part) for part in facts["ts"].split("-")]
        except ValueError:
            raise ValueError(f"ts must be START-END in seconds, got {facts['ts']!r}") from None
    if value is None or (isinstance(value, list) and len(value) == 2 and all(x != x for x in value)):
        return None  # TVQA writes "nan-nan" where nobody marked one
    if not isinstance(value, list) or len(value) != 2:
        raise ValueError(f"span must be [start, end], got {value!r}")
    return _within(value[0], value[1], end, "span")


def _within(start: object, stop: object, end: float, name: str) -> tuple[float, float]:
    first, last = _number(start, f"{name}: start"), _number(stop, f"{name}: end")
    if last < first:
        raise ValueError(f"{name} ends at {last:g} s, before it starts, at {first:g} s")
    if last < 0 or first >= end:
        raise ValueError(f"{name}, {first:g} to {last:g} s, lies outside the clip of {end:g} s")
    return max(first, 0.0), min(last, end)


def _with_distractors(found: Mapping[str, Sequence[Question]]) -> dict[str, tuple[Question, ...]]:
    """Each question with questions about other clips, chosen by hash; never one of the same clip or the same words."""
    own = {clip: {question.question for question in questions} for clip, questions in found.items()}
    corpus = sorted({text for texts in own.values() for text in texts})
    numbers = np.arange(len(corpus))
    chosen = {}
    for clip, questions in found.items():
        order = numbers[np.argsort(hash64(_DISTRACTOR, text_hash(clip), numbers), kind="stable")]
        # the clip's own questions are few: enough remain
        others = [corpus[i] for i in order[: DISTRACTORS + len(own[clip])].tolist() if corpus[i] not in own[clip]]
        chosen[clip] = tuple(replace(each, distractors=tuple(others[:DISTRACTORS])) for each in questions)
    return chosen


def for_sample(
    questions: Mapping[str, tuple[Question, ...]], key: str, facts: Mapping[str, Any]
) -> tuple[Question, ...]:
    """The questions about a sample: those under its key, or under the path of the whole file that it was made from."""
    names, source = [key], facts.get("source")
    if isinstance(source, dict) and isinstance(source.get("path"), str) and source.get("start_seconds") is None:
        path = PurePosixPath(source["path"])
        names += [str(path), path.name, path.stem]
    return next((questions[name] for name in names if name in questions), ())


def write_member(questions: Sequence[Question]) -> bytes:
    """The content of ``KEY.qa.json``."""
    return json.dumps([asdict(question) for question in questions], ensure_ascii=False).encode()


def parse_member(data: bytes | memoryview) -> tuple[Question, ...]:
    """The questions in ``KEY.qa.json``. Raises ``SampleError``: ``bad_questions``."""
    try:
        return tuple(_members(json.loads(bytes(data)) if len(data) <= MAX_BYTES * 4 else None))
    except (ValueError, RecursionError) as error:
        raise SampleError("bad_questions", str(error)[:200]) from None


def _members(listed: object) -> Iterator[Question]:
    if not isinstance(listed, list) or len(listed) > MAX_QUESTIONS:
        raise ValueError(f"a list of at most {MAX_QUESTIONS} questions is needed")
    for facts in listed:
        if not isinstance(facts, dict):
            raise ValueError(f"a question must be an object, not {type(facts).__name__}")
        others = facts.get("distractors", [])
        if not isinstance(others, list) or not all(isinstance(text, str) for text in others):
            raise ValueError("distractors must be a list of texts")
        yield replace(_parse(facts), distractors=tuple(others))
