"""The sound of a time window, on the same clock as the pictures.

Everything is laid out at the source's own rate by the times that the file gives its samples, mixed to mono, and
resampled once. So encoder priming, late starts, gaps and seeks that land early cost nothing in alignment.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import av
import numpy as np

from mmcl.media.probe import (
    DECODE_ERRORS,
    MediaSource,
    best_stream,
    decoded,
    open_container,
    origin_seconds,
    read_only,
    short_message,
)
from mmcl.media.windows import Short
from mmcl.types import SampleError

PREROLL_SECONDS = 0.2
"""decoded before the window and thrown away: lapped transforms need the packet before, Opus asks for 80 ms"""
EDGE_SECONDS = 0.02
"""kept on both sides of the window for the resampling filter"""
NEAR_SECONDS = 0.5
"""between two windows: decoded and thrown away, rather than sought over"""
GAP_SECONDS = 0.04
"""Times of packets jitter (Matroska rounds to a millisecond); a larger jump is a gap in the sound."""
TRUNCATED_SECONDS = 0.5
"""missing at the end of a sound track before it counts as cut off"""
MAX_SAMPLES = 2**28
"""of one window, at the source's or the wanted rate"""


def read_audio(
    data: MediaSource,
    *,
    start_seconds: float,
    end_seconds: float,
    sample_rate_hz: int,
    duration_seconds: float | None = None,
    short: Short = "loop",
) -> np.ndarray | None:
    """float32 ``(S,)`` in [−1, 1], S = round((end − start) · rate): one window of a file, see ``AudioReader.read``.

    None where the file has no audio stream. Raises ``SampleError`` as ``open_audio`` and ``AudioReader.read`` do.
    """
    wanted = Sound(start_seconds, round((end_seconds - start_seconds) * sample_rate_hz), sample_rate_hz)
    reader = open_audio(data)
    if reader is None:
        return None
    with closing(reader):
        return reader.read([wanted], duration_seconds=duration_seconds, short=short)[0]


@dataclass(frozen=True, slots=True)
class Sound:
    """A stretch of sound: ``samples`` at a rate, sample i being the sound at ``start_seconds + i / sample_rate_hz``.

    Raises ``ValueError`` for an empty one, ``SampleError("too_large")`` beyond ``MAX_SAMPLES``.
    """

    start_seconds: float
    samples: int
    sample_rate_hz: int

    def __post_init__(self) -> None:
        if self.samples < 1 or self.start_seconds < 0 or self.sample_rate_hz < 1:
            raise ValueError(f"an empty window: {self}")
        if self.samples > MAX_SAMPLES:
            raise SampleError("too_large", f"a window of {self.samples} audio samples")

    @property
    def decoded_seconds(self) -> tuple[float, float]:
        """The interval to decode for it."""
        return (
            self.start_seconds - EDGE_SECONDS,
            self.start_seconds + self.samples / self.sample_rate_hz + EDGE_SECONDS,
        )


def open_audio(data: MediaSource, *, container: Any = None) -> AudioReader | None:
    """The sound track of a file, to be closed; None where it has none.

    ``container``: the same file, opened by another reader and closed by it; it is not opened again. Each must then read
    at a time of its own.

    Raises ``SampleError``: ``missing_file``, ``unreadable``, ``empty``, ``not_media``.
    """
    own = container is None
    if own:
        container = open_container(data)
    stream = best_stream(container, "audio")
    if stream is not None:
        return AudioReader(container, stream, own=own)
    if own:
        container.close()
    return None


@dataclass(slots=True, eq=False)
class _Fold:
    """A window as stretches inside its source, one after the other, then reordered, then silence."""

    stretches: list[Sound]
    samples: int
    order: np.ndarray | None = None

    @classmethod
    def of(cls, wanted: Sound, duration_seconds: float | None, short: Short) -> _Fold:
        rate, samples = wanted.sample_rate_hz, wanted.samples
        period = 0 if duration_seconds is None else round(duration_seconds * rate)
        first = round(wanted.start_seconds * rate)
        if period < 1 or first + samples <= period:
            return cls([wanted], samples)
        if short == "hold":
            inside = max(0, min(samples, period - first))
            return cls([Sound(wanted.start_seconds, inside, rate)] if inside else [], samples)
        first %= period
        if samples >= period:
            return cls([Sound(0.0, period, rate)], samples, (first + np.arange(samples)) % period)
        head = min(samples, period - first)
        parts = [Sound(first / rate, head, rate)]
        return cls(parts + ([Sound(0.0, samples - head, rate)] if head < samples else []), samples)

    def moved(self, seconds: float) -> _Fold:
        """The same stretches of a source that begins so far into its file."""
        if seconds:
            self.stretches = [replace(one, start_seconds=one.start_seconds + seconds) for one in self.stretches]
        return self

    def join(self, waves: Sequence[np.ndarray]) -> np.ndarray:
        wave: np.ndarray = np.concatenate([*waves, np.zeros(0, np.float32)])
        if self.order is not None:
            wave = wave[self.order]
        padded: np.ndarray = np.pad(wave, (0, self.samples - len(wave)))
        return padded


@dataclass(frozen=True, slots=True, eq=False)
class _Piece:
    """One decoded frame of the codec, mono."""

    start_seconds: float
    end_seconds: float
    rate_hz: int
    wave: np.ndarray
    joined: bool
    """it goes on where the piece before it ends"""


class AudioReader:
    """An open sound track; ``open_audio`` makes one."""

    def __init__(self, container: Any, stream: Any, *, own: bool = True) -> None:
        self._container, self._stream, self._own = container, stream, own
        self._origin_seconds = origin_seconds(container)
        stream.codec_context.thread_count = 1

    def close(self) -> None:
        """Frees the decoder; the reader cannot be used afterwards."""
        if self._own:
            self._container.close()

    def read(
        self,
        wanted: Sequence[Sound],
        *,
        duration_seconds: float | None = None,
        short: Short = "loop",
        begin_seconds: float = 0.0,
    ) -> list[np.ndarray]:
        """float32 ``(samples,)`` in [−1, 1] for each: all channels averaged. What overlaps or is near is decoded once.

        Where the stream has no sound (it starts later, has a gap, ends before the picture) there are zeros. With
        ``duration_seconds``, the length of the source, a window that reaches past its end is folded as the frames are:
        ``loop`` plays the source again from its start, ``hold`` is silent. ``begin_seconds``: where in the file the
        source starts.

        Raises ``SampleError``: ``too_large``, ``truncated``, ``decode``.
        """
        folds = [_Fold.of(each, duration_seconds, short).moved(begin_seconds) for each in wanted]
        stretches = [stretch for fold in folds for stretch in fold.stretches]
        try:
            waves = self._read_stretches(stretches)
        except DECODE_ERRORS as error:
            raise SampleError("decode", f"audio: {short_message(error)}") from error
        return [fold.join([waves[stretch] for stretch in fold.stretches]) for fold in folds]

    def _read_stretches(self, stretches: Sequence[Sound]) -> dict[Sound, np.ndarray]:
        waves: dict[Sound, np.ndarray] = {}
        for together in _passes(stretches):
            ends = [stretch.decoded_seconds for stretch in together]
            pieces = self._decode(min(start for start, _ in ends), max(end for _, end in ends))
            for stretch in together:
                waves[stretch] = _cut(pieces, stretch)
        return waves

    def _decode(self, start_seconds: float, end_seconds: float) -> list[_Piece]:
        """The frames of the codec that touch the interval."""
        target = max(0.0, start_seconds - PREROLL_SECONDS)
        try:
            pieces = self._decode_from(target, start_seconds, end_seconds)
        except DECODE_ERRORS:  # MPEG-PS: the seek ended inside a packet
            if not target:
                raise
            pieces = None
        if pieces is None:  # the container seeks past what was asked for
            pieces = self._decode_from(0.0, start_seconds, end_seconds) or []
        return pieces

    def _decode_from(self, target_seconds: float, start_seconds: float, end_seconds: float) -> list[_Piece] | None:
        read_only(self._container, self._stream)
        ticks = int((target_seconds + self._origin_seconds) / self._stream.time_base)
        self._container.seek(ticks if target_seconds else min(0, ticks), stream=self._stream, backward=True)
        pieces: list[_Piece] = []
        kept = 0
        following: float | None = None
        for frame in decoded(self._container, self._stream):
            rate = int(frame.sample_rate)
            begins = following if frame.time is None else frame.time - self._origin_seconds
            if begins is None or rate < 1 or not frame.samples:
                continue
            if following is None and target_seconds and begins > start_seconds:
                return None
            joined = following is not None and abs(begins - following) <= GAP_SECONDS
            if joined and following is not None:
                begins = following
            following = begins + frame.samples / rate
            if begins >= end_seconds:
                break
            if following <= start_seconds:
                continue
            pieces.append(_Piece(begins, following, rate, _mono(frame), joined))
            kept += frame.samples
            if kept > MAX_SAMPLES:
                raise SampleError("too_large", f"more than {MAX_SAMPLES} audio samples in one window")
        else:
            self._check_end(target_seconds if following is None else following, end_seconds)
        return pieces

    def _check_end(self, reached_seconds: float, end_seconds: float) -> None:
        # Only MP4 and QuickTime state a length that can be held against the data: others estimate it.
        stream = self._stream
        if not stream.duration or not self._container.format.name.startswith("mov"):
            return
        declared = float(((stream.start_time or 0) + stream.duration) * stream.time_base) - self._origin_seconds
        if min(declared, end_seconds) - reached_seconds > TRUNCATED_SECONDS:
            raise SampleError("truncated", f"the sound ends at {reached_seconds:.2f} s of {declared:.2f} s")


def _passes(stretches: Sequence[Sound]) -> list[list[Sound]]:
    """Stretches that are cheaper decoded in one go than with a seek and its preroll in between."""
    passes: list[list[Sound]] = []
    reached = -math.inf
    for stretch in sorted(set(stretches), key=lambda stretch: stretch.decoded_seconds):
        start, end = stretch.decoded_seconds
        if start - PREROLL_SECONDS > reached + NEAR_SECONDS:
            passes.append([])
            reached = end
        passes[-1].append(stretch)
        reached = max(reached, end)
    return passes


def _cut(pieces: Sequence[_Piece], wanted: Sound) -> np.ndarray:
    """One stretch out of what was decoded, resampled on its own: what else was decoded changes nothing."""
    start_seconds, end_seconds = wanted.decoded_seconds
    runs: list[list[_Piece]] = []
    for piece in pieces:
        if piece.end_seconds <= start_seconds or piece.start_seconds >= end_seconds:
            continue
        if not runs or not piece.joined or runs[-1][-1].rate_hz != piece.rate_hz:
            runs.append([])
        runs[-1].append(piece)
    wave = np.zeros(wanted.samples, np.float32)
    for run in runs:
        sound = _resample(np.concatenate([piece.wave for piece in run]), run[0].rate_hz, wanted.sample_rate_hz)
        # Where the first sample of this run falls in the window, to the nearest sample.
        offset = round((run[0].start_seconds - wanted.start_seconds) * wanted.sample_rate_hz)
        first, last = max(0, offset), min(wanted.samples, offset + len(sound))
        if first < last:
            wave[first:last] = sound[first - offset : last - offset]
    if not np.isfinite(wave).all():
        wave = np.nan_to_num(wave, nan=0.0)
    return np.clip(wave, -1.0, 1.0, out=wave)


def _mono(frame: Any) -> np.ndarray:
    """float32 ``(samples,)``: the mean of all channels of a decoded frame."""
    if frame.format.name == "fltp":  # nearly every codec, and fifty frames a second: no copy of each channel first
        left, *others = (np.frombuffer(plane, np.float32, frame.samples) for plane in frame.planes)
        if len(others) < 2:
            both: np.ndarray = (left + others[0]) * np.float32(0.5) if others else left.copy()
            return both
    values = frame.to_ndarray()
    channels = max(1, len(frame.layout.channels))
    wave = values if frame.format.is_planar else values.reshape(-1, channels).T
    if wave.dtype == np.uint8:
        scaled = (wave.astype(np.float32) - 128.0) / 128.0
    elif np.issubdtype(wave.dtype, np.integer):
        scaled = wave.astype(np.float32) / float(-np.iinfo(wave.dtype).min)
    else:
        scaled = wave.astype(np.float32, copy=False)
    mono: np.ndarray = scaled[0] if channels == 1 else scaled.mean(axis=0)
    return mono


def _resample(wave: np.ndarray, from_hz: int, to_hz: int) -> np.ndarray:
    """float32: the wave at another rate; its first sample stays where it is."""
    if from_hz == to_hz:
        return wave
    frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(wave[None]), format="fltp", layout="mono")
    frame.sample_rate = from_hz
    resampler = av.AudioResampler(format="fltp", layout="mono", rate=to_hz)
    parts = [part.to_ndarray()[0] for part in (*resampler.resample(frame), *resampler.resample(None))]
    return np.concatenate(parts) if parts else np.zeros(0, np.float32)
