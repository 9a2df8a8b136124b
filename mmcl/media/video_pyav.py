"""Video through PyAV."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from av.video.reformatter import VideoReformatter

from mmcl.media.frame_table import FrameTable
from mmcl.media.frames import Fit, Wanted, channels_first, checked, scaled_size, square_crop
from mmcl.media.probe import (
    DECODE_ERRORS,
    MAX_PIXELS,
    MediaSource,
    best_stream,
    decoded,
    demuxed,
    open_container,
    origin_seconds,
    quarter_turns,
    read_only,
    short_message,
)
from mmcl.media.scaling import scale_picture
from mmcl.types import SampleError


class PyAVReader:
    """Frames through PyAV: any file that FFmpeg reads, several sizes in one pass; raises where others crash."""

    _errors: tuple[type[Exception], ...] = DECODE_ERRORS

    def __init__(self, data: MediaSource, size: int | None, fit: Fit, threads: int) -> None:
        self._size, self._fit = size, fit
        self._container = open_container(data)
        try:
            self._stream = best_stream(self._container, "video")
            if self._stream is None:
                raise SampleError("no_video_stream", "the file has no video stream")
            context = self._stream.codec_context
            context.thread_count = threads
            context.thread_type = "AUTO" if threads > 1 else "NONE"
            context.options = {"max_pixels": str(MAX_PIXELS)}
            if context.width and context.height:
                scaled_size(context.height, context.width, size, fit)
            self._table = FrameTable.of(self._container, self._stream)
            tick, origin = float(self._stream.time_base), origin_seconds(self._container)
            self.codec_context, self.origin_seconds = context, origin
        except DECODE_ERRORS as error:
            self.close()
            raise SampleError("decode", short_message(error)) from error
        except SampleError:
            self.close()
            raise
        self._reformatter = VideoReformatter()
        # only where a frame that nothing refers to says so itself, and says it right
        self._skips = self._stream.codec_context.name == "h264"
        self._shape: tuple[int, int] | None = None
        self.frame_times_seconds = self._table.pts * tick - origin
        self.duration_seconds = max(0.0, self._table.end_pts * tick - origin)

    def read(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        return self.read_scaled([(indices, self._size, self._fit)])[0]

    def read_scaled(self, wanted: Sequence[Wanted]) -> list[np.ndarray]:
        numbered = [checked(indices, len(self._table.pts)) for indices, _, _ in wanted]
        numbers = np.unique(np.concatenate([own for own, _ in numbered]))
        keys = np.maximum(np.searchsorted(self._table.key_pts, self._table.pts[numbers], side="right") - 1, 0)
        pictures: list[dict[int, np.ndarray]] = [{} for _ in wanted]
        takers: dict[int, list[int]] = {}
        for i, (own, _) in enumerate(numbered):
            for pts in self._table.pts[own].tolist():
                takers.setdefault(pts, []).append(i)

        def take(frame: Any, pts: int) -> None:
            for i in takers[pts]:
                pictures[i][pts] = self._picture(frame, wanted[i][1], wanted[i][2])

        try:
            for key in np.unique(keys).tolist():
                self._read_group(numbers[keys == key], key, take)
        except self._errors as error:
            raise SampleError("decode", short_message(error)) from error
        return [
            channels_first(list(found.values()), places) if found else np.zeros((0, 3, size or 0, size or 0), np.uint8)
            for found, (_, places), (_, size, _) in zip(pictures, numbered, wanted, strict=True)
        ]

    def nearest_keyframes(self, indices: np.ndarray) -> np.ndarray:
        keys = np.searchsorted(self._table.pts, self._table.key_pts)
        distances = np.abs(np.asarray(indices)[..., None] - keys)
        nearest: np.ndarray = keys[distances.argmin(-1)]
        return nearest

    def _read_group(self, numbers: np.ndarray, key: int, take: Callable[[Any, int], None]) -> None:
        """Takes the frames that depend on one keyframe, in order."""
        table, wanted = self._table, self._table.pts[numbers].tolist()
        # Some containers seek by time of display, some by time of decoding, which lands one keyframe early in the
        # others, and some past what was asked for (no index, open GOP) or count other times after it (MPEG-PS): then
        # decode from the start of the file.
        starts = (int(table.key_pts[key]), int(table.key_seek[key]), int(min(table.pts[0], table.key_seek[0])))
        for attempt, target in enumerate(starts):
            self._seek(target)
            try:
                if self._decode(wanted, take, skip=self._skips and attempt == 0):
                    return
            except SampleError:
                if attempt == len(starts) - 1:
                    raise
        raise SampleError("decode", f"frame {numbers[0]} cannot be reached")

    def _seek(self, pts: int) -> None:
        read_only(self._container, self._stream)
        self._container.seek(pts, stream=self._stream, backward=True)

    def _decode(self, wanted_pts: list[int], take: Callable[[Any, int], None], *, skip: bool) -> bool:
        """Decodes forward until all are taken; False, to be tried otherwise, if the first frame that comes is too late.

        ``skip``: frames that no other depends on are left undecoded unless they are wanted; False then also where
        the frames that come are not the wanted ones.
        """
        taken = 0
        previous = None
        for frame in self._frames(set(wanted_pts) if skip else None):
            pts = frame.pts if frame.pts is not None else frame.dts
            if pts is None:
                continue
            # A packet that never becomes a picture (VP8's hidden frames): the one before it stays on the screen.
            while taken < len(wanted_pts) and pts > wanted_pts[taken]:
                if previous is None or skip:
                    return False
                take(previous, wanted_pts[taken])
                taken += 1
            if taken < len(wanted_pts) and pts == wanted_pts[taken]:
                take(frame, pts)
                taken += 1
            if taken == len(wanted_pts):
                return True
            previous = frame
        if skip:
            return False
        raise SampleError("decode", f"the video ends before {wanted_pts[taken] * self._stream.time_base} s")

    def _frames(self, needed_pts: set[int] | None) -> Iterator[Any]:
        """Frames from where the container stands to its end; with ``needed_pts`` little more than these.

        Then what no other frame refers to stays undecoded, and the decoder is emptied after the last packet that
        matters instead of being fed until it lets go of its frame.
        """
        context = self._stream.codec_context
        context.skip_frame = "DEFAULT" if needed_pts is None else "NONREF"
        if needed_pts is None:
            yield from decoded(self._container, self._stream)
            return
        missing = set(needed_pts)
        for packet in demuxed(self._container, self._stream):
            if packet.pts in missing:
                missing.remove(packet.pts)
                context.skip_frame = "DEFAULT"
                yield from packet.decode()
                context.skip_frame = "NONREF"
                if not missing:
                    yield from context.decode(None)
                    return
            else:
                yield from packet.decode()

    def _picture(self, frame: Any, size: int | None, fit: Fit) -> np.ndarray:
        """uint8 ``(H, W, C)``, scaled, turned and cropped."""
        if frame.is_corrupt:
            raise SampleError("decode", f"a damaged frame at {frame.time} s")
        return self._scaled(frame, quarter_turns(frame), size, fit)

    def _scaled(self, frame: Any, turns: int, size: int | None, fit: Fit) -> np.ndarray:
        shown = (frame.width, frame.height) if turns % 2 else (frame.height, frame.width)
        height, width = scaled_size(*shown, size, fit)
        if size is None:  # frames may change their size in mid-stream; the first one decides
            height, width = self._shape = self._shape or (height, width)
        return square_crop(scale_picture(frame, height, width, turns), size, fit)

    @property
    def shared_container(self) -> Any:
        """The open file, for a reader of its sound; None where a format may lose its place among several streams."""
        return self._container if self._container.format.name.startswith("mov") else None

    def close(self) -> None:
        self._container.close()
