"""The pictures of a stretch of a file: decoded, cropped, scaled, turned, and laid on an even grid of time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import av
import numpy as np
from av.video.reformatter import Interpolation, VideoReformatter

from mmcl.media.crop import Cropper
from mmcl.media.frame_table import MAX_FRAMES
from mmcl.media.probe import MAX_PIXELS, decoded, origin_seconds, quarter_turns
from mmcl.shards.encoding import MAX_FPS, MediaOptions
from mmcl.types import SampleError


class Pictures:
    """Cropped, scaled frames that are on screen within ``[start, end)``, as (seconds since start, frame).

    Without ``short_side`` (nothing is encoded) frames are as decoded.
    """

    def __init__(self, container: Any, stream: Any, options: MediaOptions, start: float, end: float) -> None:
        self._container, self._stream, self._short_side = container, stream, options.short_side
        self._cropper = Cropper(options.crop) if options.crop is not None else None
        self._start, self._end = start, end
        self._origin = origin_seconds(container)
        self._format = "yuvj420p" if options.codec == "mjpeg" else "yuv420p"  # JPEG knows no other range than the full
        self._reformatter = VideoReformatter()
        self._size: tuple[int, int] | None = None
        self.first = 0.0
        """when the first frame appears, where the stretch begins with the file"""
        self.reached = start
        """when the last frame that was read disappears"""
        length = float(stream.duration * stream.time_base) if stream.duration else 0.0
        first = float(stream.start_time * stream.time_base) - self._origin if stream.start_time else 0.0
        self.declared_end = first + length
        stream.codec_context.thread_count = 1
        stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}

    def __iter__(self) -> Iterator[tuple[float, Any]]:
        if self._start > 0:
            ticks = int((self._start + self._origin) / self._stream.time_base)
            self._container.seek(ticks, stream=self._stream, backward=True)
        before: Any = None
        begun = False
        step = 1 / float(self._stream.average_rate or 25)
        for frame in decoded(self._container, self._stream):
            if frame.pts is None:
                continue
            time = float(frame.pts * frame.time_base) - self._origin
            if not begun:
                self.first, begun = time, True
            self.reached = max(self.reached, time + (float(frame.duration * frame.time_base) or step))
            if time >= self._end:
                break
            if time < self._start:
                before = frame
                continue
            if frame.is_corrupt:
                raise SampleError("decode", f"damaged picture at {time:.3f} s")
            if before is not None and time > self._start:
                yield 0.0, self._scale(before)
            before = None
            yield time - self._start, self._scale(frame)
        if before is not None and self.reached > self._start:
            yield 0.0, self._scale(before)  # a stretch shorter than a frame

    @staticmethod
    def displayed_size(frame: Any) -> tuple[int, int]:
        """(width, height) as a player turns it."""
        return (frame.height, frame.width) if quarter_turns(frame) % 2 else (frame.width, frame.height)

    def _scale(self, frame: Any) -> Any:
        if self._short_side is None:
            return frame
        turns = quarter_turns(frame)
        if self._cropper is not None:
            frame = self._cropper.crop(frame, turns)
        if self._size is None:
            self._size = _target_size(frame, self._stream, self._short_side)
        width, height = self._size
        scaled = self._reformatter.reformat(
            frame,
            width=width,
            height=height,
            format="rgb24" if turns else self._format,
            interpolation=Interpolation.AREA if frame.width > width else Interpolation.BICUBIC,
        )
        if not turns:
            return scaled
        turned = av.VideoFrame.from_ndarray(np.ascontiguousarray(np.rot90(scaled.to_ndarray(), turns)), format="rgb24")
        return turned.reformat(format=self._format)


def _target_size(frame: Any, stream: Any, short_side: int) -> tuple[int, int]:
    """(width, height) before turning: square pixels, even, the shorter side at most ``short_side``."""
    aspect = float(stream.sample_aspect_ratio or 1)
    shown = frame.width * (aspect if 0.1 < aspect < 10 else 1.0), float(frame.height)
    scale = min(1.0, short_side / min(shown))
    width, height = (max(2, 2 * round(side * scale / 2)) for side in shown)
    return width, height


def frame_rate(stream: Any, fps: float | None) -> Fraction:
    rate = Fraction(stream.average_rate or stream.guessed_rate or 25)
    # Where the frame rate varies a little, the rate of the densest frames keeps them all.
    if stream.guessed_rate and rate < stream.guessed_rate <= 2 * rate:
        rate = Fraction(stream.guessed_rate)
    if not 0 < rate <= MAX_FPS:
        rate = Fraction(25)
    limit = Fraction(fps).limit_denominator(1001) if fps is not None else rate
    return min(rate, limit).limit_denominator(60_000)


def constant_rate(pictures: Pictures, rate: Fraction) -> Iterator[tuple[int, Any]]:
    """(n, frame) for n = 0, 1, …: what is on screen at n / rate, to the nearest half frame of time."""
    held: Any = None
    slot = 0
    for seconds, frame in pictures:
        # Half a frame off is always the later one: rounding to even would drop and repeat every other frame.
        due = math.floor(seconds * float(rate) + 0.5 + 1e-4)
        if due > MAX_FRAMES:
            raise SampleError("too_large", f"a frame at {seconds:.0f} s, at most {MAX_FRAMES} frames are written")
        while held is not None and slot < due:
            yield slot, held
            slot += 1
        held = frame
    last = round((min(pictures.reached, pictures._end) - pictures._start) * float(rate))
    while held is not None and slot < max(last, 1):
        yield slot, held
        slot += 1
