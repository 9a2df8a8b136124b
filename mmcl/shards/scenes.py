"""Rows cut at scene changes: one sample per scene, picture and sound at the same instants.

``pyav`` finds hard cuts by the difference of neighbouring frames; ``scenedetect`` is PySceneDetect's adaptive detector
(extra ``scenes``), fed with the same frames. A scene begins at the very time of its first frame.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from av.video.reformatter import Interpolation, VideoReformatter

from mmcl.media.probe import (
    DECODE_ERRORS,
    MAX_PIXELS,
    MediaSource,
    best_stream,
    decoded,
    open_container,
    origin_seconds,
    read_only,
    short_message,
)
from mmcl.shards.cut import can_be_cut
from mmcl.shards.engine import Crew
from mmcl.shards.inputs import Row
from mmcl.shards.member_index import Member
from mmcl.shards.pool import Lost
from mmcl.shards.sources import main_source
from mmcl.types import ConfigError, SampleError

Pictures: TypeAlias = Iterator[npt.NDArray[Any]]
"""a small picture of every frame, uint8 ``(H, W, 3)``, blue first"""

_WIDTH = {"pyav": 48, "scenedetect": 256}
"""pixels of the small pictures"""
_LEAST_CHANGE = 12.0
"""mean difference of two pictures, of 255, below which nothing is a cut"""
_OVER_NEIGHBOURS = 3.0
"""how often a cut's difference is that of the frames around it: pans and fast motion differ all along"""
_AROUND = 4
"""frames before and after that are compared"""
_FLASH_FRAMES = 2
"""a picture that differs for so many frames only is a flash, no scene"""


def check_detector(name: str) -> None:
    """Raises ``ConfigError`` on a detector that is unknown or not installed."""
    if name not in _DETECTORS:
        raise ConfigError(f"scenes={name[:40]}: {' or '.join(_DETECTORS)}")
    if name == "scenedetect":
        try:
            import scenedetect
        except ImportError as error:
            raise ConfigError(f'scenes=scenedetect: {error}. pip install "mmcl[scenes]"') from None
        del scenedetect


def cut_scenes(rows: Sequence[Row], detector: str, crew: Crew, *, min_seconds: float) -> list[Row]:
    """Every row with a picture that moves as its scenes, in order, numbered; the group stays the file.

    A cut that comes less than ``min_seconds`` after the one before, or before the end, is passed over. Files are
    decoded in child processes, each once; one that cannot be decoded becomes a row with its problem.
    """
    check_detector(detector)
    files = sorted({(row.path, row.files) for row in rows if can_be_cut(row)})
    results = crew(functools.partial(find_cuts, detector=detector), files)
    found = dict(zip(files, results, strict=True))
    cut: list[Row] = []
    for row in rows:
        cuts = found.get((row.path, row.files)) if can_be_cut(row) else None
        if cuts is None:
            cut.append(row)
        elif isinstance(cuts, (Lost, SampleError)):
            cut.append(replace(row, problem=(cuts.reason, cuts.detail)))
        else:
            cut += _scenes(row, cuts[0], cuts[1], min_seconds)
    return cut


def find_cuts(source: tuple[str, tuple[Member, ...]], *, detector: str) -> tuple[list[float], float] | SampleError:
    """Runs in a child process: (times of the first frames of new scenes, end of the video), or what is wrong.

    ``source``: a row's path and files. Sound alone has no cuts.
    """
    try:
        times: list[float] = []
        cuts = _DETECTORS[detector](_pictures(main_source(*source), _WIDTH[detector], times))
        return [times[number] for number in cuts], times[-1] if times else math.inf
    except SampleError as error:
        return error


def _scenes(row: Row, cuts: list[float], file_end: float, min_seconds: float) -> Iterator[Row]:
    """The first starts where the row does, the last ends where it does."""
    end = min(file_end, math.inf if row.end_seconds is None else row.end_seconds)
    starts = [row.start_seconds]
    for cut in cuts:
        # never after the frame that it names, on any clock that is rounded to microseconds
        cut = math.floor(cut * 1e6) / 1e6
        if cut - (starts[-1] or 0.0) >= min_seconds and end - cut >= min_seconds:
            starts.append(cut)
    for number, (first, last) in enumerate(zip(starts, [*starts[1:], row.end_seconds], strict=True)):
        yield replace(row, start_seconds=first, end_seconds=last, part=number)


def _pictures(source: MediaSource, width: int, times: list[float]) -> Pictures:
    """Every frame, small; ``times`` gets the time of each."""
    with closing(open_container(source)) as container:
        stream = best_stream(container, "video")
        if stream is None:
            return
        stream.codec_context.thread_count = 1
        stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}
        read_only(container, stream)
        origin, reformatter = origin_seconds(container), VideoReformatter()
        try:
            for frame in decoded(container, stream):
                if frame.pts is None:
                    continue
                height = max(2, round(width * frame.height / frame.width))
                small = reformatter.reformat(
                    frame, width=width, height=min(height, 4 * width), format="bgr24", interpolation=Interpolation.AREA
                )
                times.append(float(frame.pts * frame.time_base) - origin)
                yield small.to_ndarray()
        except DECODE_ERRORS as error:
            raise SampleError("decode", short_message(error)) from error


def _by_difference(pictures: Pictures) -> list[int]:
    """Numbers of the first frames of new scenes."""
    step, lag = [0.0], [math.inf] * (_FLASH_FRAMES + 1)
    recent: list[npt.NDArray[np.int16]] = []
    for picture in pictures:
        recent = [*recent[-_FLASH_FRAMES - 1 :], picture.astype(np.int16)]
        if len(recent) > 1:
            step.append(_difference(recent[-1], recent[-2]))
        if len(recent) > _FLASH_FRAMES + 1:
            lag.append(_difference(recent[-1], recent[0]))
    change, far = np.array(step), np.array([*lag, *[math.inf] * _FLASH_FRAMES])
    cuts = []
    for number in np.flatnonzero(change >= _LEAST_CHANGE).tolist():
        around = np.r_[change[max(1, number - _AROUND) : number], change[number + 1 : number + _AROUND + 1]]
        usual = float(around.mean()) if len(around) else 0.0
        # after a flash the picture is what it was before
        lasting = min(far[number], far[number + _FLASH_FRAMES])
        if change[number] >= _OVER_NEIGHBOURS * usual and lasting >= change[number] / 2:
            cuts.append(number)
    return cuts


def _difference(first: npt.NDArray[np.int16], second: npt.NDArray[np.int16]) -> float:
    if first.shape != second.shape:  # the video changes its format there
        return 255.0
    return float(np.abs(first - second).mean())


def _by_scenedetect(pictures: Pictures) -> list[int]:
    from scenedetect import AdaptiveDetector, FrameTimecode

    detector = AdaptiveDetector(min_scene_len=1)
    cuts: list[int] = []
    number = -1
    for number, picture in enumerate(pictures):
        cuts += [int(cut.frame_num) for cut in detector.process_frame(FrameTimecode(number, 25.0), picture)]
    if number >= 0:
        cuts += [int(cut.frame_num) for cut in detector.post_process(FrameTimecode(number, 25.0))]
    return sorted(set(cuts))


_DETECTORS: dict[str, Callable[[Any], list[int]]] = {"pyav": _by_difference, "scenedetect": _by_scenedetect}
