"""Subtitles as captions: one sample per cue of the SRT or WebVTT file beside a video.

Subtitles are a stranger's text: bounded, without their markup, and refused whole where they are no such file.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mmcl.shards.inputs import Row
from mmcl.shards.members import ROLES
from mmcl.types import SampleError

MAX_BYTES = 8 << 20
_CLOCK = r"(?:(\d{1,3}):)?(\d{1,2}):(\d{1,2})[.,](\d{1,3})"
_TIMES = re.compile(rf"\s*{_CLOCK}\s*-->\s*{_CLOCK}(?:\s.*)?")
_MARKUP = re.compile(r"<[^<>]{0,200}>|\{\\[^{}]{0,200}\}")


@dataclass(frozen=True, slots=True)
class Cue:
    """A text and when it is on screen."""

    start_seconds: float
    end_seconds: float
    text: str


def parse_subtitles(data: bytes) -> list[Cue]:
    """The cues of an SRT or WebVTT file, by time; empty ones, and ones that end before they start, are left out.

    Raises ``SampleError``: ``too_large``, ``subtitles_not_utf8``, ``bad_subtitles`` (not one cue in it).
    """
    if len(data) > MAX_BYTES:
        raise SampleError("too_large", f"subtitles of {len(data)} bytes, at most {MAX_BYTES}")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise SampleError("subtitles_not_utf8", str(error)) from None
    cues = sorted(_cues(text), key=lambda cue: (cue.start_seconds, cue.end_seconds))
    if not cues:
        raise SampleError("bad_subtitles", "no cue of the form 00:00:01,000 --> 00:00:02,000")
    return cues


def _cues(text: str) -> Iterator[Cue]:
    """Blocks between empty lines; what stands before the line of times is a number or a name, what follows the text."""
    for block in re.split(r"\n[ \t]*\n", text.replace("\r\n", "\n").replace("\r", "\n")):
        lines = block.strip("\n").split("\n")
        for place, line in enumerate(lines[:2]):
            times = _TIMES.fullmatch(line)
            if times is None:
                continue
            numbers = times.groups()
            start, end = _seconds(*numbers[:4]), _seconds(*numbers[4:])
            words = " ".join(html.unescape(_MARKUP.sub("", " ".join(lines[place + 1 :]))).split())
            if words and end > start:
                yield Cue(start, end, words)
            break


def _seconds(hours: str | None, minutes: str, seconds: str, fraction: str) -> float:
    return 3600 * int(hours or 0) + 60 * int(minutes) + int(seconds) + float(f"0.{fraction}")


def merge_cues(cues: Sequence[Cue], seconds: float) -> list[Cue]:
    """Neighbouring cues joined until each is at least ``seconds`` long, from the first's start to the last's end.

    >>> merge_cues([Cue(0, 1, "a"), Cue(1, 2, "b"), Cue(5, 6, "c")], 2)
    [Cue(start_seconds=0, end_seconds=2, text='a b'), Cue(start_seconds=5, end_seconds=6, text='c')]
    """
    merged: list[Cue] = []
    for cue in cues:
        last = merged[-1] if merged else None
        if last is not None and last.end_seconds - last.start_seconds < seconds:
            merged[-1] = Cue(last.start_seconds, max(last.end_seconds, cue.end_seconds), f"{last.text} {cue.text}")
        else:
            merged.append(cue)
    return merged


def cut_by_subtitles(rows: Sequence[Row], *, merge_seconds: float = 0.0) -> list[Row]:
    """Every video or sound with a NAME.srt or NAME.vtt beside it as one row per cue, its text as the caption.

    A row with ``start_seconds`` or ``end_seconds`` keeps the cues that lie in its stretch. The group stays the file.
    Rows without subtitles stay as they are; one whose subtitles cannot be read, or of which none lies in its stretch,
    carries that as its problem.
    """
    cut: list[Row] = []
    for row in rows:
        path = _beside(row)
        if path is None:
            cut.append(row)
            continue
        try:
            cues = merge_cues(parse_subtitles(path.read_bytes()), merge_seconds)
        except SampleError as error:
            cut.append(replace(row, problem=(error.reason, f"{path.name}: {error.detail}")))
            continue
        except OSError as error:
            cut.append(replace(row, problem=("unreadable", f"{path.name}: {error.strerror or error}")))
            continue
        first, last = row.start_seconds or 0.0, row.end_seconds
        inside = [cue for cue in cues if cue.start_seconds >= first and (last is None or cue.end_seconds <= last)]
        if not inside:
            cut.append(replace(row, problem=("no_cue", f"{path.name}: no cue lies in the row's stretch")))
        cut += [
            replace(row, start_seconds=cue.start_seconds, end_seconds=cue.end_seconds, captions=(cue.text,))
            for cue in inside
        ]
    return cut


def _beside(row: Row) -> Path | None:
    media = Path(row.path)
    if row.problem is not None or ROLES.get(media.suffix[1:].lower()) not in ("video", "audio"):
        return None
    return next((path for end in (".srt", ".vtt") if (path := media.with_suffix(end)).is_file()), None)
