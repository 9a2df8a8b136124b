"""Motion stored beside a video: ``KEY.motion.npy``, one record per frame. Nothing is unpickled.

A record holds ``seconds`` (float64, when the frame appears), ``size`` (uint16, height and width of the picture in
pixels), ``key`` (bool: a keyframe) and ``velocity`` (int8 ``(2, h, w)``: (x, y) in quarters of a pixel per frame, at
most 31.75, for cells of 16 pixels). The header of such a file is a stranger's: it is matched, not evaluated.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence

import numpy as np

from mmcl.media.frames import checked
from mmcl.media.motion import MotionReader
from mmcl.media.probe import MediaSource
from mmcl.types import SampleError

MEMBER = "motion"
"""NAME of the member ``KEY.NAME.npy``"""
STORED_CELL = 16
MAX_MOTION_BYTES = 256 << 20
_QUARTERS, _MOST = 4.0, 127
_HEADER = re.compile(
    r"\{'descr': \[\('seconds', '<f8'\), \('size', '<u2', \(2,\)\), \('key', '\|b1'\), "
    r"\('velocity', '\|i1', \(2, (?P<high>[1-9][0-9]{0,3}), (?P<wide>[1-9][0-9]{0,3})\)\)\], "
    r"'fortran_order': False, 'shape': \((?P<frames>[1-9][0-9]{0,6}),\), ?\}\s*"
)


def _record(high: int, wide: int) -> np.dtype[np.void]:
    return np.dtype([("seconds", "<f8"), ("size", "<u2", (2,)), ("key", "|b1"), ("velocity", "|i1", (2, high, wide))])


def extract_motion(video: MediaSource) -> bytes:
    """The motion of a whole video as the bytes of such a file.

    Raises ``SampleError`` as ``MotionReader`` does, and ``too_large``.
    """
    reader = MotionReader(video, cell=STORED_CELL)
    try:
        frames = len(reader.frame_times_seconds)
        context = reader.codec_context
        places = -(-context.height // STORED_CELL) * -(-context.width // STORED_CELL)
        if 8 * frames * places > MAX_MOTION_BYTES:  # as float32, before it is packed
            raise SampleError("too_large", f"motion of {frames} frames of {context.width}×{context.height} pixels")
        grids = reader.grids(np.arange(frames))
        records = np.zeros(frames, _record(*grids.shape[2:]))
        records["seconds"], records["key"] = reader.frame_times_seconds, reader.is_key
        records["size"] = reader.picture_size
        records["velocity"] = np.clip(np.rint(grids * _QUARTERS), -_MOST, _MOST)
    finally:
        reader.close()
    file = io.BytesIO()
    np.lib.format.write_array(file, records, version=(1, 0), allow_pickle=False)
    return file.getvalue()


class StoredMotion:
    """A ``MotionField`` of such a file.

    Raises:
        SampleError: ``too_large``, or ``bad_motion``: not such a file.
    """

    cell = STORED_CELL

    def __init__(self, data: bytes | memoryview) -> None:
        if len(data) > MAX_MOTION_BYTES:
            raise SampleError("too_large", f"motion of {len(data)} bytes, at most {MAX_MOTION_BYTES}")
        records = _records(bytes(data))
        self.frame_times_seconds: np.ndarray = records["seconds"].copy()
        self.is_key: np.ndarray = records["key"].copy()
        height, width = (int(side) for side in records["size"][0])
        self.picture_size = (height, width)
        self._velocity = records["velocity"]
        times = self.frame_times_seconds
        needed = tuple(-(-side // self.cell) for side in self.picture_size)
        if self._velocity.shape[2:] != needed or not np.isfinite(times).all() or (np.diff(times) <= 0).any():
            raise SampleError("bad_motion", "times that do not ascend, or cells that do not cover the picture")

    def grids(self, numbers: Sequence[int] | np.ndarray) -> np.ndarray:
        different, places = checked(numbers, len(self._velocity))
        grids: np.ndarray = (self._velocity[different].astype(np.float32) / _QUARTERS)[places]
        return grids

    def close(self) -> None:
        """Nothing is open."""


def _records(data: bytes) -> np.ndarray:
    header = None
    if data[:8] == b"\x93NUMPY\x01\x00":
        end = 10 + int.from_bytes(data[8:10], "little")
        header = _HEADER.fullmatch(data[10:end].decode("latin-1"))
    if header is None:
        raise SampleError("bad_motion", "not an .npy file of motion")
    record, frames = _record(int(header["high"]), int(header["wide"])), int(header["frames"])
    if len(data) - end != frames * record.itemsize:
        raise SampleError("bad_motion", f"{len(data) - end} bytes for {frames} frames of {record.itemsize} bytes")
    return np.frombuffer(data, record, offset=end)
