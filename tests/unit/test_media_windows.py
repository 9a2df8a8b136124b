"""Windows lie inside the source, sample the instants they promise, and fold what reaches past its end."""

from __future__ import annotations

import doctest

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmcl.media import text, windows
from mmcl.media.windows import Window, centred, fold_times, frame_indices, place_windows, sample_windows, wanted_times

durations = st.floats(0.0, 1e5)
lengths = st.floats(0.01, 1e4)
units = st.lists(st.floats(0.0, 1.0, exclude_max=True), min_size=1, max_size=8)


@pytest.mark.parametrize("module", [windows, text])
def test_examples_in_docstrings(module):
    assert doctest.testmod(module, extraglobs={"np": np}).failed == 0


@given(durations, lengths, units)
def test_random_windows_lie_in_the_source_in_order(duration, length, uniform):
    placed = place_windows(duration, length, len(uniform), rule="random", uniform=uniform)
    starts = [window.start_seconds for window in placed]
    assert starts == sorted(starts) and starts[0] >= 0
    assert all(window.seconds == pytest.approx(length, rel=1e-6, abs=1e-6) for window in placed)
    if duration >= length:
        assert placed[-1].end_seconds <= duration * (1 + 1e-12) + 1e-9
    else:
        assert set(starts) == {0.0}


def test_random_start_is_u_times_slack():
    assert place_windows(10, 2, 2, rule="random", uniform=[0.75, 0.25]) == [Window(2, 4), Window(6, 8)]


@given(durations, lengths, st.integers(1, 9))
def test_even_windows_are_symmetric(duration, length, count):
    placed = place_windows(duration, length, count, rule="even")
    slack = max(0.0, duration - length)
    mirrored = [slack - window.start_seconds for window in reversed(placed)]
    assert mirrored == pytest.approx([window.start_seconds for window in placed], abs=1e-6)


def test_one_even_window_is_the_centre():
    assert place_windows(10, 4, 1, rule="even") == [Window(3, 7)]


@pytest.mark.parametrize(
    "arguments",
    [(float("nan"), 1, 1), (-1.0, 1, 1), (float("inf"), 1, 1), (5, 0, 1), (5, 1, 0)],
)
def test_nonsense_is_refused(arguments):
    with pytest.raises(ValueError):
        place_windows(*arguments, rule="even")


def test_one_number_per_random_window():
    with pytest.raises(ValueError, match="2 numbers"):
        place_windows(5, 1, 2, rule="random", uniform=[0.5])
    with pytest.raises(ValueError, match="rule"):
        place_windows(5, 1, 2, rule="dense", uniform=[0.5, 0.5])
    with pytest.raises(ValueError):
        Window(2.0, 2.0)


def test_centred_keeps_the_centre_and_clamps():
    assert centred(Window(4, 6), 4) == Window(3, 7)
    assert centred(Window(0, 2), 4) == Window(0, 4)
    assert centred(Window(8, 10), 4, duration_seconds=10) == Window(6, 10)
    assert centred(Window(0, 2), 4, duration_seconds=3) == Window(0, 4)


def test_wanted_times_are_the_middles_of_equal_slots():
    assert wanted_times(Window(1, 3), 8, 4).tolist() == (1 + (np.arange(8) + 0.5) / 4).tolist()


def test_short_sources_loop_or_hold():
    window = Window(0, 4)
    assert wanted_times(window, 4, 1, duration_seconds=1.5).tolist() == [0.5, 0.0, 1.0, 0.5]
    assert wanted_times(window, 4, 1, duration_seconds=1.5, short="hold").tolist() == [0.5, 1.5, 1.5, 1.5]
    assert fold_times(np.array([0.5, 2.0]), 0.0).tolist() == [0.0, 0.0]


@given(
    st.lists(st.floats(0.002, 1.0), min_size=1, max_size=40),
    st.lists(st.floats(-1.0, 50.0), min_size=1, max_size=20),
)
def test_frame_indices_against_a_loop(gaps, wanted):
    times = np.cumsum(gaps)
    expected = [max([i for i, t in enumerate(times) if t <= w + windows.TOLERANCE_SECONDS], default=0) for w in wanted]
    found = frame_indices(times, np.array(wanted))
    assert found.dtype == np.int64 and found.tolist() == expected


def test_rounded_frame_times_are_found():
    exact = np.arange(200) / 24
    for rounded in (exact.round(3), (exact + 3600).astype(np.float32) - 3600.0):  # Matroska; decord after an hour
        assert frame_indices(rounded, exact).tolist() == list(range(200))


def test_no_frames_is_an_error():
    with pytest.raises(ValueError):
        frame_indices(np.array([]), np.array([0.0]))


words = st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=4)


@given(
    words,
    st.floats(0.0, 5000.0),
    st.floats(0.1, 20.0),
    st.integers(1, 6),
    st.one_of(st.just(float("inf")), st.floats(0.0, 300.0)),
    st.tuples(st.floats(-10.0, 30.0), st.one_of(st.just(float("inf")), st.floats(0.0, 60.0))),
    st.booleans(),
)
def test_sampled_windows_obey_every_rule(words, duration, length, count, span, gaps, overlap):
    least, width = gaps
    limits = (max(least, -length), max(least, -length) + width)
    if not overlap and limits[1] < 0:
        limits = (limits[0], 0.0)
    placed = sample_windows(
        duration, length, count, words=words, span_seconds=span, gap_seconds=limits, overlap=overlap
    )
    assert placed == sample_windows(
        duration, length, count, words=words, span_seconds=span, gap_seconds=limits, overlap=overlap
    )
    starts = np.array([window.start_seconds for window in placed])
    slack = max(0.0, duration - length)
    assert len(starts) == count and (np.diff(starts) >= 0).all()
    assert starts[0] >= 0 and starts[-1] <= slack
    assert starts[-1] - starts[0] <= min(span, slack) + 1e-9
    found = np.diff(starts) - length
    low = max(limits[0], 0.0) if not overlap else limits[0]
    room = min(span, slack)
    if (count - 1) * (length + low) <= room:
        assert (found >= low - 1e-9).all() and (found <= limits[1] + 1e-9).all()
    else:  # best effort: equal distances, as far as source and span allow
        assert np.diff(starts) == pytest.approx(room / (count - 1), abs=1e-6)


def test_sampled_windows_depend_on_their_words_alone():
    def starts(*words, **rules):
        return [window.start_seconds for window in sample_windows(600.0, 2.0, 3, words=words, **rules)]

    assert starts(1, 2) != starts(1, 3) != starts(2, 2)
    pinned = [142.67928, 188.67621, 485.58896]  # part of what a run is: its windows after a resume on another version
    assert starts(7, 1, 5) == pytest.approx(pinned, abs=1e-4)


def test_sampled_starts_fill_span_and_source():
    """Uniform: the first starts everywhere, distances up to the whole span."""
    placed = [sample_windows(600.0, 2.0, 2, words=(3, i), span_seconds=60.0) for i in range(2000)]
    firsts = np.array([first.start_seconds for first, _ in placed])
    distances = np.array([second.start_seconds - first.start_seconds for first, second in placed])
    assert distances.max() == pytest.approx(60.0, rel=0.05) and distances.mean() == pytest.approx(20.0, rel=0.1)
    assert np.histogram(firsts, 5, (0, 550))[0].min() > 300
    free = np.array([sample_windows(600.0, 2.0, 1, words=(4, i))[0].start_seconds for i in range(2000)])
    assert np.histogram(free, 5, (0, 598))[0].min() > 330


def test_nonsense_rules_are_refused():
    for rules in ({"span_seconds": -1.0}, {"gap_seconds": (2.0, 1.0)}, {"gap_seconds": (-9.0, -5.0)}):
        with pytest.raises(ValueError):
            sample_windows(10.0, 2.0, 2, words=(1,), **rules)
