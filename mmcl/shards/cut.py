"""Rows cut into windows of equal length: from one long file to many samples of it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TypeAlias

from mmcl.media.clip import MediaReader
from mmcl.shards.engine import Crew
from mmcl.shards.inputs import Row
from mmcl.shards.member_index import Member
from mmcl.shards.pool import Lost
from mmcl.shards.sources import main_role, main_source
from mmcl.types import ConfigError, SampleError

Windows: TypeAlias = tuple[float, float]
"""(length, distance from one start to the next), both in seconds"""

_ROUNDING_SECONDS = 0.02
"""a window may end so much after the file: times of frames and packets are rounded"""


def parse_windows(text: str) -> Windows | None:
    """``SECONDS[:STRIDE]``; None for an empty text. Raises ``ConfigError``.

    >>> parse_windows("4"), parse_windows("4:0.5")
    ((4.0, 4.0), (4.0, 0.5))
    """
    if not text:
        return None
    length, _, stride = text.partition(":")
    try:
        return check_windows((float(length), float(stride or length)))
    except ValueError:  # ConfigError is one
        raise ConfigError(f"windows={text[:60]}: SECONDS or SECONDS:STRIDE, both at least 0.1") from None


def check_windows(windows: Windows) -> Windows:
    """The windows. Raises ``ConfigError`` where they cannot be."""
    if not all(0.1 <= seconds <= 1e6 for seconds in windows):
        raise ConfigError(f"windows={windows}: both numbers of seconds are at least 0.1")
    return windows


def cut_rows(rows: Sequence[Row], windows: Windows, crew: Crew) -> list[Row]:
    """Every row as the windows that lie wholly inside of it (of its own stretch, where it names one), in order.

    What is left at the end is left out; a row shorter than one window, and a picture, stays as it is. Files are
    measured in child processes; one that cannot be measured becomes a row with its problem. The group stays the file.
    """
    files = sorted({(row.path, row.files) for row in rows if can_be_cut(row)})
    lengths = dict(zip(files, crew(measure, files), strict=True))
    cut: list[Row] = []
    for row in rows:
        length = lengths.get((row.path, row.files)) if can_be_cut(row) else None
        if length is None:
            cut.append(row)
        elif isinstance(length, (Lost, SampleError)):
            cut.append(replace(row, problem=(length.reason, length.detail)))
        else:
            cut += _windows(row, length, *windows)
    return cut


def measure(source: tuple[str, tuple[Member, ...]]) -> float | SampleError:
    """Runs in a child process: seconds of the video (of the sound, where there is no picture), or what is wrong.

    ``source``: a row's path and files.
    """
    try:
        with MediaReader(video=main_source(*source), decoder="pyav") as reader:
            return reader.duration_seconds
    except SampleError as error:
        return error


def can_be_cut(row: Row) -> bool:
    return row.problem is None and main_role(row) != "image"


def _windows(row: Row, file_seconds: float, length: float, stride: float) -> Iterator[Row]:
    start = row.start_seconds or 0.0
    end = min(file_seconds, math.inf if row.end_seconds is None else row.end_seconds)
    count = math.floor((end - start - length + _ROUNDING_SECONDS) / stride) + 1
    if count < 1:
        yield row
    for number in range(count):
        begin = start + number * stride
        yield replace(row, start_seconds=round(begin, 6), end_seconds=round(begin + length, 6))
