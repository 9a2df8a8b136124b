"""Where the views of a sample lie in time."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from mmcl.data.options import SamplingOptions
from mmcl.hashing import uniform
from mmcl.media.clip import own_window
from mmcl.media.windows import Rule, Window, elsewhere, place_windows, sample_windows
from mmcl.types import TimedSpec, View

# what a random number is for, so that no two uses share their numbers
_WINDOW, _ELSEWHERE, _NEAR = 16, 24, 25
NEAR_FRAMES = 5
"""at the spec's rate, from a window to what lies near it, at most"""


def place_views(
    pairs: Sequence[tuple[View, TimedSpec]],
    duration_seconds: float,
    *,
    words: tuple[int, ...],
    rule: Rule,
    sampling: SamplingOptions,
) -> list[Window | None]:
    """The window of each view, as long as its spec; None for one that a source is too short for.

    Each view comes with its spec at its source's frame rate; ``words`` are (seed, epoch, hash of the key). A clip's
    window is as long as the longest view of it, and what comes after it; views shorter than it lie round its centre.
    """
    if not pairs:
        return []
    tails = _lengths(pairs, lambda view: view.place == "after", lambda view, spec: _tail_seconds(view, spec))
    heads = _lengths(pairs, lambda view: view.place == "window", lambda _, spec: spec.seconds)
    clips = sorted({view.clip for view, _ in pairs})
    length = max((heads.get(clip, 0.0) + tails.get(clip, 0.0) for clip in clips), default=0.0)
    length = length or max(spec.seconds for _, spec in pairs)  # nothing but what lies elsewhere
    windows = dict(zip(clips, _windows(len(clips), length, duration_seconds, words, rule, sampling), strict=True))
    placed: list[Window | None] = []
    for view, spec in pairs:
        whole = windows[view.clip]
        border = whole.end_seconds - tails.get(view.clip, 0.0)
        head = Window(whole.start_seconds, border) if border > whole.start_seconds else whole
        number = (*words, view.clip, view.copy)
        if view.place == "window":
            placed.append(own_window(head, spec))
        elif view.place == "after":
            start = border + view.gap_frames * spec.seconds / _frames(spec)
            placed.append(Window(start, start + spec.seconds))
        elif view.place == "near":
            placed.append(_near(head, spec, duration_seconds, float(uniform(*number, _NEAR))))
        else:
            taken = Window(border, whole.end_seconds) if border < whole.end_seconds else whole
            placed.append(elsewhere(duration_seconds, spec.seconds, taken, float(uniform(*number, _ELSEWHERE))))
    return placed


def _lengths(
    pairs: Sequence[tuple[View, TimedSpec]], chosen: Callable[[View], bool], seconds: Callable[[View, TimedSpec], float]
) -> Mapping[int, float]:
    longest: dict[int, float] = {}
    for view, spec in pairs:
        if chosen(view):
            longest[view.clip] = max(longest.get(view.clip, 0.0), seconds(view, spec))
    return longest


def _frames(spec: TimedSpec) -> int:
    return int(getattr(spec, "frames", 1))


def _tail_seconds(view: View, spec: TimedSpec) -> float:
    return spec.seconds * (1 + view.gap_frames / _frames(spec))


def _near(head: Window, spec: TimedSpec, duration_seconds: float, u: float) -> Window:
    """Round an instant of a window, or of the frames just before and after it."""
    margin = NEAR_FRAMES * spec.seconds / _frames(spec)
    first, last = max(0.0, head.start_seconds - margin), min(head.end_seconds + margin, max(duration_seconds, 1e-6))
    centre = first + u * max(0.0, last - first)
    start = max(0.0, centre - spec.seconds / 2)
    return Window(start, start + spec.seconds)


def _windows(
    count: int,
    length_seconds: float,
    duration_seconds: float,
    words: tuple[int, ...],
    rule: Rule,
    sampling: SamplingOptions,
) -> list[Window]:
    if "even" in (rule, sampling.rule):
        return place_windows(duration_seconds, length_seconds, count, rule="even")
    return sample_windows(
        duration_seconds,
        length_seconds,
        count,
        words=(*words, _WINDOW),
        span_seconds=math.inf if sampling.span_seconds is None else sampling.span_seconds,
        gap_seconds=sampling.gap_limits(length_seconds),
    )
