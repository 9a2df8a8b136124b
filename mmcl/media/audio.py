"""The sound of a time window, on the same clock as the pictures.

Everything is laid out at the source's own rate by the times that the file gives its samples, mixed to mono, and
resampled once. So encoder priming, late starts, gaps and seeks that land early cost nothing in alignment.
"""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import av
import numpy as np

from mmcl.media.probe import (
    DECODE_ERRORS,
    MediaSource,
    best_stream,
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
    """float32 ``(S,)`` in [−1, 1], S = round((end − start) · rate): the sound of a window, all channels averaged.

    None where the file has no audio stream. Sample i is the sound at ``start + i / rate`` seconds. Where the stream
    has no sound (it starts later, has a gap, ends before the picture) there are zeros. With ``duration_seconds``, the
    length of the source, a window that reaches past its end is folded as the frames are: ``loop`` plays the source
    again from its start, ``hold`` is silent.

    Raises ``SampleError``: ``missing_file``, ``unreadable``, ``empty``, ``not_media``, ``too_large``, ``truncated``,
    ``decode``.
    """
    samples = round((end_seconds - start_seconds) * sample_rate_hz)
    if samples < 1 or start_seconds < 0 or sample_rate_hz < 1:
        raise ValueError(f"an empty window: {start_seconds} … {end_seconds} s at {sample_rate_hz} Hz")
    if samples > MAX_SAMPLES:
        raise SampleError("too_large", f"a window of {samples} audio samples")
    with closing(open_container(data)) as container:
        stream = best_stream(container, "audio")
        if stream is None:
            return None
        reader = _Reader(container, stream, sample_rate_hz)
        try:
            return _read_folded(reader, start_seconds, samples, duration_seconds, short)
        except DECODE_ERRORS as error:
            raise SampleError("decode", f"audio: {short_message(error)}") from error


def _read_folded(
    reader: _Reader, start_seconds: float, samples: int, duration_seconds: float | None, short: Short
) -> np.ndarray:
    period = 0 if duration_seconds is None else round(duration_seconds * reader.rate)
    first = round(start_seconds * reader.rate)
    if period < 1 or first + samples <= period:
        return reader.read(start_seconds, samples)
    if short == "hold":
        wave = np.zeros(samples, np.float32)
        inside = max(0, min(samples, period - first))
        if inside:
            wave[:inside] = reader.read(start_seconds, inside)
        return wave
    first %= period
    if samples >= period:
        return reader.read(0.0, period)[(first + np.arange(samples)) % period]
    head = min(samples, period - first)
    parts = [reader.read(first / reader.rate, head)]
    if head < samples:
        parts.append(reader.read(0.0, samples - head))
    return np.concatenate(parts)


@dataclass(slots=True, eq=False)
class _Run:
    """Sound without a gap: one rate, mono pieces one after the other."""

    start_seconds: float
    rate_hz: int
    pieces: list[np.ndarray] = field(default_factory=list)
    samples: int = 0

    @property
    def end_seconds(self) -> float:
        return self.start_seconds + self.samples / self.rate_hz


class _Reader:
    def __init__(self, container: Any, stream: Any, rate: int) -> None:
        self.rate = rate
        self._container, self._stream = container, stream
        self._origin_seconds = origin_seconds(container)
        stream.codec_context.thread_count = 1
        read_only(container, stream)

    def read(self, start_seconds: float, samples: int) -> np.ndarray:
        """float32 ``(samples,)`` from ``start_seconds`` on."""
        end_seconds = start_seconds + samples / self.rate
        wave = np.zeros(samples, np.float32)
        for run in self._decode(start_seconds - EDGE_SECONDS, end_seconds + EDGE_SECONDS):
            sound = _resample(np.concatenate(run.pieces), run.rate_hz, self.rate)
            # Where the first sample of this run falls in the window, to the nearest sample.
            offset = round((run.start_seconds - start_seconds) * self.rate)
            first, last = max(0, offset), min(samples, offset + len(sound))
            if first < last:
                wave[first:last] = sound[first - offset : last - offset]
        return np.clip(np.nan_to_num(wave, nan=0.0), -1.0, 1.0)

    def _decode(self, start_seconds: float, end_seconds: float) -> list[_Run]:
        """The runs of sound that touch the interval, cut to it at whole frames of the codec."""
        target = max(0.0, start_seconds - PREROLL_SECONDS)
        runs = self._decode_from(target, start_seconds, end_seconds)
        if runs is None:  # the container seeks past what was asked for
            runs = self._decode_from(0.0, start_seconds, end_seconds) or []
        return runs

    def _decode_from(self, target_seconds: float, start_seconds: float, end_seconds: float) -> list[_Run] | None:
        ticks = int((target_seconds + self._origin_seconds) / self._stream.time_base)
        self._container.seek(ticks if target_seconds else min(0, ticks), stream=self._stream, backward=True)
        runs: list[_Run] = []
        kept = 0
        following: float | None = None
        for frame in self._container.decode(self._stream):
            rate = int(frame.sample_rate)
            begins = following if frame.time is None else frame.time - self._origin_seconds
            if begins is None or rate < 1 or not frame.samples:
                continue
            if following is None and target_seconds and begins > start_seconds:
                return None
            if following is not None and abs(begins - following) <= GAP_SECONDS:
                begins = following
            elif following is not None or not runs:
                runs.append(_Run(begins, rate))
            following = begins + frame.samples / rate
            if begins >= end_seconds:
                break
            if following <= start_seconds:
                runs[-1].start_seconds = following
                continue
            if runs[-1].rate_hz != rate:
                runs.append(_Run(begins, rate))
            runs[-1].pieces.append(_mono(frame))
            runs[-1].samples += frame.samples
            kept += frame.samples
            if kept > MAX_SAMPLES:
                raise SampleError("too_large", f"more than {MAX_SAMPLES} audio samples in one window")
        else:
            self._check_end(target_seconds if following is None else following, end_seconds)
        return [run for run in runs if run.pieces]

    def _check_end(self, reached_seconds: float, end_seconds: float) -> None:
        # Only MP4 and QuickTime state a length that can be held against the data: others estimate it.
        stream = self._stream
        if not stream.duration or not self._container.format.name.startswith("mov"):
            return
        declared = float(((stream.start_time or 0) + stream.duration) * stream.time_base) - self._origin_seconds
        if min(declared, end_seconds) - reached_seconds > TRUNCATED_SECONDS:
            raise SampleError("truncated", f"the sound ends at {reached_seconds:.2f} s of {declared:.2f} s")


def _mono(frame: Any) -> np.ndarray:
    """float32 ``(samples,)``: the mean of all channels of a decoded frame."""
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
