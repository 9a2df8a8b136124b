"""One stream of a file on its way into another, a stretch of time at a time: read and encoded, or copied."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from contextlib import closing
from fractions import Fraction
from typing import Any, Protocol

import av
import numpy as np

from mmcl.media.audio import read_audio
from mmcl.media.probe import (
    MICROSECONDS,
    best_stream,
    demuxed,
    open_container,
    origin_seconds,
    read_only,
    short_message,
)
from mmcl.shards.encoding import AudioCodec
from mmcl.types import SampleError

_AUDIO_BIT_RATE = 64_000
_STEP_SECONDS = 20.0
_FRAME = 1024
"""samples of AAC's frame; the others' are cut out of these"""
_ENCODERS = {"aac": "aac", "opus": "libopus", "flac": "flac", "wav": "pcm_s16le"}


class Track(Protocol):
    """A stream that is written in step with others, so that they lie beside each other in the file."""

    def write(self, until_seconds: float) -> None:
        """Writes what comes up to this instant of the source's clock, and a little more."""
        ...

    def finish(self) -> None:
        """Writes the rest."""
        ...


class EncodedSound:
    """The sound of ``[start, start + samples / rate)``; the file's clock begins with it."""

    def __init__(self, path: str, start: float, samples: int, rate: int, codec: AudioCodec, out: Any) -> None:
        self._out = out
        self._steps = sound_steps(path, start, samples, rate)
        self._reached, self._start, self._rate = start, start, rate
        self._stream = out.add_stream(_ENCODERS[codec], rate=rate, layout="mono")
        if codec in ("aac", "opus"):
            self._stream.bit_rate = _AUDIO_BIT_RATE
        self._stream.codec_context.thread_count = 1
        self._stream.codec_context.flags |= av.codec.context.Flags.bitexact

    def write(self, until_seconds: float) -> None:
        while self._reached <= until_seconds:
            step = next(self._steps, None)
            if step is None:
                self._reached = math.inf
                return
            begin, wave = step
            for first in range(0, len(wave), _FRAME):
                piece = np.ascontiguousarray(wave[None, first : first + _FRAME])
                frame = av.AudioFrame.from_ndarray(piece, format="fltp", layout="mono")
                frame.sample_rate, frame.time_base = self._rate, Fraction(1, self._rate)
                frame.pts = begin + first
                self._out.mux(self._stream.encode(frame))
            self._reached = self._start + (begin + len(wave)) / self._rate

    def finish(self) -> None:
        self.write(math.inf)
        self._out.mux(self._stream.encode(None))


def sound_steps(path: str, start: float, samples: int, rate: int) -> Iterator[tuple[int, np.ndarray]]:
    """(number of the first sample, wave) of a stretch, so that an hour of it is never in memory at once.

    Raises ``SampleError`` as ``read_audio`` does.
    """
    step = round(_STEP_SECONDS * rate / _FRAME) * _FRAME
    for begin in range(0, samples, step):
        count = min(step, samples - begin)
        seconds = start + begin / rate
        wave = read_audio(path, start_seconds=seconds, end_seconds=seconds + count / rate, sample_rate_hz=rate)
        assert wave is not None
        yield begin, wave


class CopiedTrack:
    """All packets of the best stream of a kind, on a clock that begins with the source's. To be closed."""

    def __init__(self, path: str, kind: str, out: Any) -> None:
        self._container, self._out = open_container(path), out
        self._stream = best_stream(self._container, kind)
        read_only(self._container, self._stream)
        self._origin = round(Fraction(origin_seconds(self._container)) / self._stream.time_base)
        try:
            self._target = out.add_stream_from_template(self._stream, opaque=True)
        except (ValueError, av.FFmpegError) as error:
            self.close()
            raise _refused(error) from error
        self._packets = (packet for packet in demuxed(self._container, self._stream) if packet.size)
        self._waiting: Any = None

    def write(self, until_seconds: float) -> None:
        while True:
            packet = self._waiting or next(self._packets, None)
            self._waiting = None
            if packet is None:
                return
            if packet.pts is None and packet.dts is None:
                raise _refused("a packet without a time")
            ticks = packet.dts if packet.dts is not None else packet.pts
            if float((ticks - self._origin) * packet.time_base) > until_seconds:
                self._waiting = packet
                return
            packet.pts = None if packet.pts is None else packet.pts - self._origin
            packet.dts = None if packet.dts is None else packet.dts - self._origin
            packet.stream = self._target
            try:
                self._out.mux(packet)
            except (ValueError, av.FFmpegError) as error:
                raise _refused(error) from error

    def finish(self) -> None:
        self.write(math.inf)

    def close(self) -> None:
        self._container.close()


def _refused(why: object) -> SampleError:
    detail = short_message(why) if isinstance(why, BaseException) else str(why)
    return SampleError(
        "cannot_copy", f"its stream cannot go into another container ({detail}); encode both or copy both"
    )


def open_output(buffer: io.BytesIO, container: str) -> Any:
    """An ``av.container.OutputContainer`` that writes nothing of chance and no version of a library."""
    return av.open(buffer, "w", format=container, container_options={"fflags": "+bitexact"})


def stream_end(path: str, kind: str, start: float, end: float) -> float:
    """When the last packet of a stream before ``end`` ends, read from the packets themselves, not the header."""
    with closing(open_container(path)) as container:
        stream, origin = best_stream(container, kind), origin_seconds(container)
        read_only(container, stream)
        declared = (container.duration or 0) / MICROSECONDS
        late = min(end, declared) - 2.0
        for begin in [late, start] if late > start else [start]:
            ticks = int((begin + origin) / stream.time_base)
            if begin > 0:
                container.seek(ticks, stream=stream, backward=True)
            reached = -1.0
            for packet in demuxed(container, stream):
                if packet.pts is None:
                    continue
                time = float(packet.pts * packet.time_base) - origin
                if time >= end:
                    return end
                reached = max(reached, time + float((packet.duration or 0) * packet.time_base))
            if reached > begin:
                return reached
        return start
