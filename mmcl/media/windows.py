"""Time windows: where they lie in a source and which frames they show; pairs of clips that overlap. Pure arithmetic.

The clock of a source starts at its container's start time and is shared by all its streams, so that one
``Window`` names the same instants of picture and sound.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np

from mmcl.hashing import uniform as hashed_uniform
from mmcl.types import DEFAULT_OVERLAP, Overlap

Rule: TypeAlias = Literal["random", "even"]
Short: TypeAlias = Literal["loop", "hold"]
Box: TypeAlias = tuple[int, int, int, int]
"""top, left, height, width in pixels"""

REDRAWS = 100
"""tries to meet the limits of a gap before the distances are made to fit"""
TOLERANCE_SECONDS = 5e-4
"""A frame this little after the wanted time counts as displayed: Matroska rounds times to milliseconds and decord to
float32, and 0.1 s shall find the same frame in all of them."""


@dataclass(frozen=True, slots=True)
class Window:
    """The half-open interval ``[start_seconds, end_seconds)`` on the clock of a source.

    Raises ``ValueError`` unless ``0 <= start_seconds < end_seconds`` and both are finite.

    >>> Window(1.0, 3.5).seconds
    2.5
    """

    start_seconds: float
    end_seconds: float

    def __post_init__(self) -> None:
        if not (0.0 <= self.start_seconds < self.end_seconds < math.inf):
            raise ValueError(f"a window needs 0 <= start < end, got {self.start_seconds} … {self.end_seconds} seconds")

    @property
    def seconds(self) -> float:
        return self.end_seconds - self.start_seconds


def place_windows(
    duration_seconds: float, length_seconds: float, count: int, *, rule: Rule, uniform: Sequence[float] = ()
) -> list[Window]:
    """``count`` windows of ``length_seconds`` in a source of ``duration_seconds``, in order of time.

    ``random``: start = u · max(0, duration − length) with ``uniform`` holding one u in [0, 1) per window (the caller
    draws them, so that the same draw gives the same window). ``even``: the slack is cut into ``count`` equal parts and
    each window starts in the middle of one, so a single window is the centre of the source.
    A source shorter than the window gives windows that start at 0 and reach past its end.
    Raises ``ValueError`` on a negative or non-finite duration, a length that is not positive, or missing ``uniform``.

    >>> place_windows(10.0, 2.0, 2, rule="even")
    [Window(start_seconds=2.0, end_seconds=4.0), Window(start_seconds=6.0, end_seconds=8.0)]
    """
    if not 0.0 <= duration_seconds < math.inf:
        raise ValueError(f"duration_seconds must be finite and at least 0, got {duration_seconds}")
    if not 0.0 < length_seconds < math.inf or count < 1:
        raise ValueError(f"need length_seconds > 0 and count >= 1, got {length_seconds} and {count}")
    slack_seconds = max(0.0, duration_seconds - length_seconds)
    if rule == "even":
        starts = [slack_seconds * (i + 0.5) / count for i in range(count)]
    elif rule == "random":
        if len(uniform) != count or not all(0.0 <= u <= 1.0 for u in uniform):
            raise ValueError(f"rule 'random' needs {count} numbers in [0, 1], got {list(uniform)}")
        starts = sorted(slack_seconds * float(u) for u in uniform)
    else:
        raise ValueError(f"rule must be 'random' or 'even', got {rule!r}")
    return [Window(start, start + length_seconds) for start in starts]


def sample_windows(
    duration_seconds: float,
    length_seconds: float,
    count: int,
    *,
    words: Sequence[int],
    span_seconds: float = math.inf,
    gap_seconds: tuple[float, float] = (-math.inf, math.inf),
    overlap: bool = True,
) -> list[Window]:
    """``count`` random windows of ``length_seconds`` in a source, in order of time; ``words`` decide which.

    Starts are uniform in a stretch of at most ``span_seconds`` (first start to last start), which itself lies uniformly
    in the source. ``gap_seconds``: limits of the time from the end of a window to the start of the next (negative:
    they overlap). ``overlap=False`` is a gap of at least 0. Starts are drawn again up to ``REDRAWS`` times until the
    gaps are right; then the distances of the last draw are moved into the limits. Where source or span are too
    short for the smallest gap, the windows stand as far apart as they can, at equal distances: source and span always
    hold. With these defaults it is ``place_windows(rule="random")`` on numbers from our own hash.

    Raises ``ValueError`` as ``place_windows`` does, and for a negative span or limits in the wrong order.

    >>> a, b = sample_windows(600.0, 2.0, 2, words=(1, 2), span_seconds=60.0, gap_seconds=(5.0, math.inf))
    >>> 7.0 <= b.start_seconds - a.start_seconds <= 60.0
    True
    """
    least, most = gap_seconds
    if not overlap:
        least = max(least, 0.0)
    if not span_seconds >= 0.0 or not least <= most:
        raise ValueError(f"need span_seconds >= 0 and ordered gaps, got {span_seconds} and {(least, most)}")
    place_windows(duration_seconds, length_seconds, count, rule="even")  # checks the rest
    slack = max(0.0, duration_seconds - length_seconds)
    near, far = max(0.0, length_seconds + least), length_seconds + most
    if far < 0.0:
        raise ValueError(f"a gap of at most {most} s between windows of {length_seconds} s turns their order round")
    # Nothing that the limits allow is longer than this stretch; in a long source, most draws would break them.
    stretch = min(slack, span_seconds, max(0, count - 1) * far) if count > 1 else slack
    numbers = hashed_uniform(*words, np.arange(REDRAWS + 1)[:, None], np.arange(count + 1))
    starts = np.sort(numbers[:, 1:] * stretch + numbers[:, :1] * (slack - stretch), axis=1)
    steps = np.diff(starts, axis=1)
    good = np.flatnonzero(((steps >= near) & (steps <= far)).all(axis=1))
    if len(good) or count == 1:
        chosen = starts[good[0] if len(good) else 0]
    else:
        distances = _fitting_distances(steps[-1], near, far, stretch)
        first = numbers[-1, 0] * (slack - min(slack, distances.sum()))
        chosen = first + np.concatenate([[0.0], np.cumsum(distances)])
    return [Window(start, start + length_seconds) for start in np.clip(chosen, 0.0, slack).tolist()]


def _fitting_distances(distances: np.ndarray, near: float, far: float, stretch: float) -> np.ndarray:
    """float64, same shape: each in [near, far], together at most ``stretch``; equal parts of it where none fit."""
    if near * len(distances) >= stretch:
        return np.full_like(distances, stretch / len(distances))
    fitting: np.ndarray = np.clip(distances, near, far)
    beyond = fitting - near
    room = stretch - near * len(distances)
    if beyond.any():
        fitting = near + beyond * min(1.0, room / float(beyond.sum()))
    return fitting


def elsewhere(duration_seconds: float, length_seconds: float, taken: Window, u: float) -> Window | None:
    """A window of ``length_seconds`` in a source that shares no instant with ``taken``.

    None where none fits, or where ``taken`` goes on after the end and so shows other instants again. Its start is
    uniform in all that is left before and after; ``u`` in [0, 1) says where.

    >>> elsewhere(10.0, 2.0, Window(3.0, 5.0), 0.5), elsewhere(4.0, 2.0, Window(1.0, 3.0), 0.5)
    (Window(start_seconds=6.0, end_seconds=8.0), None)
    """
    before = max(0.0, taken.start_seconds - length_seconds)
    after = max(0.0, duration_seconds - length_seconds - taken.end_seconds)
    fits_before = taken.start_seconds >= length_seconds
    fits_after = taken.end_seconds + length_seconds <= duration_seconds
    if not (fits_before or fits_after) or taken.end_seconds > duration_seconds + TOLERANCE_SECONDS:
        return None
    start = u * (before + after)
    if not fits_before or (start >= before and fits_after):
        start = taken.end_seconds + max(0.0, start - before)
    return Window(start, start + length_seconds)


def centred(window: Window, length_seconds: float, *, duration_seconds: float | None = None) -> Window:
    """A window of another length round the same centre.

    The start never lies before 0; with ``duration_seconds`` the window is also moved back so that it does not reach
    past the end of the source while the source is long enough (so a clamped window is no longer exactly centred).

    >>> centred(Window(4.0, 6.0), 1.0)
    Window(start_seconds=4.5, end_seconds=5.5)
    """
    start = (window.start_seconds + window.end_seconds - length_seconds) / 2
    if duration_seconds is not None:
        start = min(start, duration_seconds - length_seconds)
    start = max(0.0, start)
    return Window(start, start + length_seconds)


def wanted_times(
    window: Window, frames: int, fps: float, *, duration_seconds: float | None = None, short: Short = "loop"
) -> np.ndarray:
    """float64 ``(T,)``: the instants at which ``frames`` frames of a window are sampled, t_i = start + (i + ½) / fps.

    With ``duration_seconds``, times past the end of the source are folded into it (see ``fold_times``).

    >>> wanted_times(Window(1.0, 3.0), 4, 2.0)
    array([1.25, 1.75, 2.25, 2.75])
    """
    if frames < 1 or not fps > 0:
        raise ValueError(f"need frames >= 1 and fps > 0, got {frames} and {fps}")
    times = window.start_seconds + (np.arange(frames) + 0.5) / fps
    return times if duration_seconds is None else fold_times(times, duration_seconds, short)


def fold_times(times_seconds: np.ndarray, duration_seconds: float, short: Short = "loop") -> np.ndarray:
    """float64, same shape: times past the end of a source brought back into it.

    ``loop``: t mod duration, the source is played again from its start. ``hold``: t is clamped to the end, the last
    frame stays. A source without duration (a picture) always gives 0.

    >>> fold_times(np.array([0.5, 1.5, 2.5]), 2.0)
    array([0.5, 1.5, 0.5])
    """
    if short not in ("loop", "hold"):
        raise ValueError(f"short must be 'loop' or 'hold', got {short!r}")
    times = np.asarray(times_seconds, dtype=np.float64)
    if duration_seconds <= 0:
        return np.zeros_like(times)
    if short == "hold":
        return np.minimum(times, duration_seconds)
    return np.where(times < duration_seconds, times, np.mod(times, duration_seconds))


def frame_indices(frame_times_seconds: np.ndarray, wanted_seconds: np.ndarray) -> np.ndarray:
    """int64 ``(T,)``: the frame displayed at each wanted time: the last one with time <= t, the first one if none is.

    "<=" within ``TOLERANCE_SECONDS``.
    ``frame_times_seconds`` is float64 ``(F,)``, ascending. Raises ``ValueError`` if it is empty.

    >>> frame_indices(np.array([0.0, 0.1, 0.2]), np.array([-1.0, 0.1, 0.19, 9.0]))
    array([0, 1, 1, 2])
    """
    if len(frame_times_seconds) == 0:
        raise ValueError("a source without frames shows nothing")
    found = np.searchsorted(frame_times_seconds, np.asarray(wanted_seconds) + TOLERANCE_SECONDS, side="right") - 1
    return np.maximum(found, 0).astype(np.int64)


@dataclass(frozen=True, slots=True)
class ClipPair:
    """Two clips of one source, and how much of a clip the other shows too."""

    starts: tuple[int, int]
    """number of the first frame of each"""
    boxes: tuple[Box, Box]
    """what each shows of the picture; of equal size"""
    speed: int | None
    """distance of the frames of a clip; None: the source is too short for any, and clips start over within"""
    time_rate: float | None
    """share of a clip's time that both show; None where ``speed`` is"""
    space_rate: float
    """share of a box's area that lies in both"""


def overlap_clips(
    source_frames: int, picture: tuple[int, int], *, frames: int, words: Sequence[int], how: Overlap = DEFAULT_OVERLAP
) -> ClipPair:
    """A pair of clips of ``frames`` frames with a drawn overlap in time and in space; ``words`` decide which.

    Speed, both rates and the order of the clips are drawn first, each evenly and without regard to the others, and
    then a place for the pair as a whole, evenly in what room there is: nothing has to be drawn again, so that no rate
    is rarer than another and none shows in the speed. With a span of ``s = (frames − 1) · speed`` the clips start
    exactly ``int((1 − rate) · s)`` frames apart, and both lie inside the source, a frame taking the time of ``speed``
    frames of the source. Speeds are those that leave room for every rate; a source too short for that gives the
    slowest, and the rates that fit; one too short for a single clip at that has no rate and no speed.

    Boxes are of equal size, inside the picture; their intersection over the area of one, not over that of both, is
    the rate, within ``(w + h) / (w · h)`` for whole pixels. Where no shape of the intersection fits in, the box is
    drawn again, in the end as half the picture's sides.

    Args:
        source_frames: of the source, at least 0.
        picture: (height, width) in pixels, at least 2.
        frames: of a clip, at least 1.
        words: integers.
        how: rates, speeds and size of the boxes.

    Raises:
        ValueError: a number is smaller than that.

    Source: Zhang et al. 2022 (arXiv 2112.08913), section 3; the placing of pairs is ours.

    >>> pair = overlap_clips(300, (128, 128), frames=16, words=(0, 1))
    >>> abs(pair.starts[1] - pair.starts[0]) == int((1 - pair.time_rate) * 15 * pair.speed)
    True
    """
    if source_frames < 0 or frames < 1 or min(picture) < 2:
        raise ValueError(
            f"need source_frames >= 0, frames >= 1, pictures of 2 × 2, got {source_frames, frames, picture}"
        )
    u = hashed_uniform(*words, np.arange(5)).tolist()
    starts, speed, time_rate = _overlap_in_time(source_frames, frames, u, how)
    space_rate = _pick(how.rates, u[4])
    boxes = _overlap_in_space(picture, space_rate, words, how)
    return ClipPair(starts, boxes, speed, time_rate, space_rate)


def _pick(values: Sequence[Any], u: float) -> Any:
    return values[int(u * len(values))]


def _overlap_in_time(
    source_frames: int, frames: int, u: Sequence[float], how: Overlap
) -> tuple[tuple[int, int], int | None, float | None]:
    def distance(speed: int, rate: float) -> int:
        return int((1 - rate) * (frames - 1) * speed)

    def room(speed: int, rate: float) -> int:
        return source_frames - frames * speed - distance(speed, rate)

    speeds = [speed for speed in how.speeds if all(room(speed, rate) >= 0 for rate in how.rates)] or [min(how.speeds)]
    speed = _pick(speeds, u[0])
    rates = [rate for rate in how.rates if room(speed, rate) >= 0]
    if not rates:
        return (0, 0), None, None
    rate = _pick(rates, u[1])
    first = int(u[2] * (room(speed, rate) + 1))
    second = first + distance(speed, rate)
    return ((first, second) if u[3] < 0.5 else (second, first)), speed, rate


def _overlap_in_space(picture: tuple[int, int], rate: float, words: Sequence[int], how: Overlap) -> tuple[Box, Box]:
    sides = np.array(picture)
    u = hashed_uniform(*words, np.arange(REDRAWS + 1)[:, None], np.arange(7))
    areas = (how.area[0] + (how.area[1] - how.area[0]) * u[:, 0]) * sides.prod()
    low, high = np.log(how.aspect)
    roots = np.exp((low + (high - low) * u[:, 1]) / 2)
    sizes = np.stack([np.sqrt(areas) / roots, np.sqrt(areas) * roots], 1)
    sizes = np.clip(np.rint(sizes), 1, sides).astype(np.int64)
    sizes[-1] = sides // 2  # any rate fits in
    tries = ((size, _intersections(size, sides, rate), numbers) for size, numbers in zip(sizes, u, strict=True))
    size, shapes, numbers = next(found for found in tries if len(found[1]))
    away = size - shapes[int(numbers[2] * len(shapes))]
    corner = (numbers[3:5] * (sides - size - away + 1)).astype(np.int64)
    other_way = numbers[5:7] < 0.5
    first, second = corner + np.where(other_way, away, 0), corner + np.where(other_way, 0, away)
    height, width = size.tolist()
    boxes = [(*place.tolist(), height, width) for place in (first, second)]
    return boxes[0], boxes[1]


def _intersections(size: np.ndarray, sides: np.ndarray, rate: float) -> np.ndarray:
    """int64 ``(n, 2)``: height and width of the intersections of that rate with which two boxes lie in the picture."""
    height, width = size.tolist()
    wide = np.arange(int(rate * width), width + 1).clip(min=1)
    shapes = np.stack([np.minimum((rate * width * height / wide).astype(np.int64), height), wide], 1)
    inside: np.ndarray = shapes[(2 * size - shapes <= sides).all(axis=1)]
    return inside
