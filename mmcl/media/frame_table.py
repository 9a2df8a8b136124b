"""The frames of a video stream, known before any is decoded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from mmcl.media.probe import demuxed, read_only
from mmcl.types import SampleError

MAX_FRAMES = 4_000_000
"""of one file; a day at 46 frames per second"""


@dataclass(frozen=True, slots=True, eq=False)
class FrameTable:
    """Every displayed frame of a stream, in order of display, from its packets alone."""

    pts: np.ndarray
    """int64 ``(F,)``, ascending, in the stream's time base"""
    key_pts: np.ndarray
    """int64 ``(K,)``, ascending: display times of the keyframes"""
    key_seek: np.ndarray
    """int64 ``(K,)``: where to seek for each (the earlier of its decoding and its display time)"""
    end_pts: int
    """when the last frame disappears"""
    coded_pts: np.ndarray
    """int64 ``(P,)``: display times in the order of decoding"""

    @classmethod
    def of(cls, container: Any, stream: Any) -> FrameTable:
        """Reads the stream's packets to the end of the file.

        Raises ``SampleError``: ``too_large``, ``decode``, ``truncated``; PyAV's own errors pass.
        """
        read_only(container, stream)
        pts: list[int] = []
        keys: list[tuple[int, int]] = []
        end = packets = 0
        for packet in demuxed(container, stream):
            packets += packet.size > 0
            shown = packet.pts if packet.pts is not None else packet.dts
            if shown is None or packet.is_discard:  # the end of the file; a frame cut away by an edit list
                continue
            pts.append(shown)
            end = max(end, shown + (packet.duration or 0))
            if packet.is_keyframe:
                keys.append((shown, shown if packet.dts is None else min(shown, packet.dts)))
            if len(pts) > MAX_FRAMES:
                raise SampleError("too_large", f"more than {MAX_FRAMES} frames")
        if not pts:
            raise SampleError("decode", "a video stream without a frame")
        if packets < len(stream.index_entries):  # an MP4's index names every frame, also those that were cut off
            raise SampleError("truncated", f"{packets} of {len(stream.index_entries)} frames are in the file")
        keys = sorted(keys) or [(min(pts), min(pts))]
        table = np.unique(np.array(pts, dtype=np.int64))
        if end <= table[-1]:  # the last frame says nothing of its length: as long as the others
            end = int(table[-1]) + max(1, round((table[-1] - table[0]) / max(1, len(table) - 1)))
        return cls(table, np.array([k for k, _ in keys]), np.array([s for _, s in keys]), end, np.array(pts))
