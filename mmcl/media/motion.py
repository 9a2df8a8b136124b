"""Motion vectors and keyframes of a compressed video, as maps of velocities.

An encoder says of most blocks of a picture where they come from. These vectors are read while the pictures are decoded
and laid on a grid: what moved to the right has a positive first component, to the bottom a positive second one.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from av.codec.context import Flags2

from mmcl.media.frame_table import FrameTable
from mmcl.media.frames import checked
from mmcl.media.probe import MediaSource, demuxed, quarter_turns
from mmcl.media.video_pyav import PyAVReader
from mmcl.types import MotionSpec, SampleError

CODECS = frozenset(("h264", "mpeg4", "mpeg1video", "mpeg2video", "h263", "msmpeg4v3"))
"""whose vectors FFmpeg hands out"""
CELL = 8
"""pixels, height = width, of the smallest block that it tells apart"""
_MACROBLOCK, _CHUNK = 16, 64
_MAX_REFERENCES = 16
_SLICES = (1, 5)
"""types of H.264's units that hold a picture"""


class MotionField(Protocol):
    """The motion of one video, by frame."""

    frame_times_seconds: np.ndarray
    """float64 ``(F,)``, ascending, on the clock of the file"""
    is_key: np.ndarray
    """bool ``(F,)``: frames that refer to no other and so have no vectors"""
    cell: int
    """pixels, height = width, of one place of the grid"""
    picture_size: tuple[int, int]
    """(height, width) in pixels as displayed; known once ``grids`` was called"""

    def grids(self, numbers: Sequence[int] | np.ndarray) -> np.ndarray:
        """float32 ``(n, 2, h, w)``: velocities (x, y) in pixels per frame of the source; zeros where a block has none.

        Raises ``SampleError("decode")`` where the data is damaged and ``IndexError`` on a number that there is not.
        """
        ...

    def close(self) -> None: ...


def motion_maps(field: MotionField, numbers: np.ndarray, spec: MotionSpec) -> np.ndarray:
    """float32 ``(n, 2, S, S)``, S = ``spec.side``: the motion of these frames as a tower of ``spec`` eats it.

    Scaled with the picture, so in pixels of one of ``spec.size`` pixels. A keyframe has zeros or, where the spec holds,
    what the frame before it has (the first frame: the one after it).
    """
    wanted = np.asarray(numbers, dtype=np.int64)
    if spec.keyframes == "hold" and len(field.is_key) > 1:
        wanted = np.where(field.is_key[wanted], np.where(wanted > 0, wanted - 1, 1), wanted)
    grids = field.grids(wanted)
    return resized(grids, field.cell, field.picture_size, spec)


class MotionReader(PyAVReader):
    """Vectors of H.264, MPEG-4 and their elders, from any container; a second pass over a file beside its pictures.

    The distance between a frame and what it refers to is not in the stream's vectors; it is taken to be that of the
    nearest frame on that side that others may refer to. Blocks without a vector (coded anew) are zeros. A block with
    two vectors, to the past and to the future, has their mean. A B frame of MPEG-4 stands for the P frame after it (or
    before it, where a keyframe follows): FFmpeg tells zeros for its most frequent kind of block.

    Raises:
        SampleError: as ``open_video`` does, and ``no_motion_vectors`` for codecs whose vectors FFmpeg does not tell.
    """

    def __init__(self, data: MediaSource, *, cell: int = CELL, threads: int = 1) -> None:
        super().__init__(data, None, "crop", threads)
        if self.codec_context.name not in CODECS:
            self.close()
            raise SampleError("no_motion_vectors", f"codec {self.codec_context.name}")
        self.codec_context.flags2 |= Flags2.export_mvs
        self.cell = cell
        self.is_key = np.isin(self._table.pts, self._table.key_pts)
        self.picture_size = (0, 0)
        self._distances: tuple[np.ndarray, np.ndarray] | None = None

    def grids(self, numbers: Sequence[int] | np.ndarray) -> np.ndarray:
        wanted = np.asarray(numbers, dtype=np.int64)
        checked(wanted, len(self._table.pts))
        if self.codec_context.name == "mpeg4":
            wanted = _without_b_frames(self._table)[wanted]
        different, places = np.unique(wanted, return_inverse=True)
        if self._distances is None:
            self._distances = reference_distances(self._table, self._may_be_referred_to())
        raster = _Raster(self.cell, *self._distances)
        keys = np.maximum(np.searchsorted(self._table.key_pts, self._table.pts[different], side="right") - 1, 0)
        by_pts = dict(zip(self._table.pts[different].tolist(), different.tolist(), strict=True))
        try:
            for key in np.unique(keys).tolist():
                self._read_group(different[keys == key], key, lambda frame, pts: raster.take(frame, by_pts[pts]))
        except self._errors as error:
            raise SampleError("decode", str(error)[:200]) from error
        grids, self.picture_size = raster.done(different)
        laid: np.ndarray = grids[places]
        return laid

    def _may_be_referred_to(self) -> list[bool] | None:
        """For each packet, in order; None where it follows from that order: only H.264 refers to B frames."""
        if self.codec_context.name != "h264":
            return None
        start = bytes(self.codec_context.extradata or b"")
        length_bytes = (start[4] & 3) + 1 if start[:1] == b"\x01" and len(start) > 4 else 0
        try:
            self._seek(int(min(self._table.pts[0], self._table.key_seek[0])))
            found = [
                _refers_on(memoryview(packet), length_bytes)
                for packet in demuxed(self._container, self._stream)
                if (packet.pts is not None or packet.dts is not None) and not packet.is_discard
            ]
        except self._errors:
            return None  # what is damaged is said by whoever decodes it
        return found if len(found) == len(self._table.coded_pts) else None


def _refers_on(packet: memoryview, length_bytes: int) -> bool:
    """Whether the first slice of an H.264 packet has a ``nal_ref_idc``: others may refer to its frame.

    ``length_bytes``: of the number before each unit (MP4); 0: start codes stand before them.
    """
    if not length_bytes:
        data = bytes(packet)
        place = data.find(b"\0\0\1")
        while 0 <= place < len(data) - 3:
            if data[place + 3] & 31 in _SLICES:
                return bool(data[place + 3] & 96)
            place = data.find(b"\0\0\1", place + 3)
        return True
    place = length_bytes
    while place < len(packet):
        if packet[place] & 31 in _SLICES:
            return bool(packet[place] & 96)
        place += int.from_bytes(packet[place - length_bytes : place], "big") + length_bytes
    return True


class _Raster:
    """Vectors of many frames, laid on grids some dozens of frames at a time."""

    def __init__(self, cell: int, past: np.ndarray, future: np.ndarray) -> None:
        self._cell, self._past, self._future = cell, past, future
        self._size: tuple[int, int] | None = None
        self._turns = 0
        self._waiting: dict[int, np.ndarray | None] = {}
        self._grids: dict[int, np.ndarray] = {}

    def take(self, frame: Any, number: int) -> None:
        if frame.is_corrupt:
            raise SampleError("decode", f"a damaged frame at {frame.time} s")
        if self._size is None:  # frames may change their size in mid-stream; the first one decides
            self._size, self._turns = (frame.height, frame.width), quarter_turns(frame)
        side_data = frame.side_data.get("MOTION_VECTORS")
        # a copy: FFmpeg's memory goes with the frame, and a frame may stand for a second number
        self._waiting[number] = None if side_data is None else side_data.to_ndarray().copy()
        if len(self._waiting) >= _CHUNK:
            self._flush()

    def _flush(self) -> None:
        if not self._waiting or self._size is None:
            return
        numbers = np.array(list(self._waiting))
        found = [part for part in self._waiting.values() if part is not None]
        counts = [0 if part is None else len(part) for part in self._waiting.values()]
        owners = np.repeat(np.arange(len(numbers)), counts)
        shape = (len(numbers), 2, *(-(-side // self._cell) for side in self._size))
        grids = np.zeros(shape, np.float32)
        if found:
            vectors = np.concatenate(found)
            distances = np.where(vectors["source"] < 0, self._past[numbers][owners], -self._future[numbers][owners])
            grids = rasterised(vectors, owners, distances, shape, self._cell)
        self._grids.update(zip(numbers.tolist(), grids, strict=True))
        self._waiting.clear()

    def done(self, numbers: np.ndarray) -> tuple[np.ndarray, tuple[int, int]]:
        """Grids of these frames and the size of the picture, both as a player turns it."""
        self._flush()
        if self._size is None:
            return np.zeros((0, 2, 1, 1), np.float32), (self._cell, self._cell)
        grids = np.stack([self._grids[number] for number in numbers.tolist()])
        height, width = self._size
        for _ in range(self._turns):  # a quarter to the left: what went to the right goes up
            grids = np.rot90(np.stack([grids[:, 1], -grids[:, 0]], axis=1), axes=(2, 3))
            height, width = width, height
        return np.ascontiguousarray(grids), (height, width)


def rasterised(
    vectors: np.ndarray, owners: np.ndarray, distances: np.ndarray, shape: Sequence[int], cell: int
) -> np.ndarray:
    """float32 ``(F, 2, h, w)`` = ``shape``: the mean velocity of the blocks in each cell, weighted by area.

    ``vectors``: FFmpeg's structured array of V blocks; ``owners`` int ``(V,)``: the frame of each; ``distances``
    ``(V,)``: frames that it is away from what the vector points to, negative where that is later. What lies outside is
    left out.
    """
    frames, _, high, wide = shape
    block = np.stack([vectors["w"], vectors["h"]]).astype(np.int64)
    first = np.stack([vectors["dst_x"], vectors["dst_y"]]).astype(np.int64) - block // 2
    scale = np.maximum(vectors["motion_scale"], 1) * np.where(distances == 0, 1, distances)
    velocity = [-vectors[name] / scale for name in ("motion_x", "motion_y")]  # the vector points to where it was
    weight = np.minimum(block, cell).prod(0).astype(np.float64)
    total, sums = np.zeros(frames * high * wide), [np.zeros(frames * high * wide) for _ in range(2)]
    steps = range(max(1, _MACROBLOCK // cell))
    for down in steps:
        for across in steps:
            x, y = (first[0] + across * cell) // cell, (first[1] + down * cell) // cell
            inside = (across * cell < block[0]) & (down * cell < block[1])
            inside &= (x >= 0) & (x < wide) & (y >= 0) & (y < high)
            chosen = slice(None) if inside.all() else inside
            places, share = ((owners * high + y) * wide + x)[chosen], weight[chosen]
            total += np.bincount(places, share, len(total))
            for axis in range(2):
                sums[axis] += np.bincount(places, share * velocity[axis][chosen], len(total))
    filled = np.maximum(total, 1.0)
    means = [(part / filled).reshape(frames, high, wide).astype(np.float32) for part in sums]
    return np.stack(means, axis=1)


def reference_distances(table: FrameTable, referred_to: Sequence[bool] | None) -> tuple[np.ndarray, np.ndarray]:
    """int64 ``(F,)`` each: frames from every frame back to the reference before it and on to the one after it.

    ``referred_to``: of each packet, whether it is a reference; None: all are but B frames, those that something
    displayed later was decoded before.
    """
    order = np.searchsorted(table.pts, table.coded_pts).tolist()
    past, future = np.ones(len(table.pts), np.int64), np.ones(len(table.pts), np.int64)
    references: list[int] = []
    highest = -1
    for number, referred in zip(order, referred_to or [False] * len(order), strict=True):
        place = bisect_left(references, number)
        if place:
            past[number] = number - references[place - 1]
        if place < len(references):
            future[number] = max(1, references[place] - number)
        if referred if referred_to else number > highest:
            insort(references, number)
            del references[:-_MAX_REFERENCES]
        highest = max(highest, number)
    return past, future


def _without_b_frames(table: FrameTable) -> np.ndarray:
    """int64 ``(F,)``: every frame, B frames replaced by the next other one, or the one before where that is a key."""
    order = np.searchsorted(table.pts, table.coded_pts)
    others = np.unique(np.maximum.accumulate(order))
    frames = np.arange(len(table.pts))
    following = others[np.minimum(np.searchsorted(others, frames), len(others) - 1)]
    before = others[np.maximum(np.searchsorted(others, frames, side="right") - 1, 0)]
    keys = np.isin(following, np.searchsorted(table.pts, table.key_pts))
    return np.where(keys, before, following)


def resized(grids: np.ndarray, cell: int, picture_size: tuple[int, int], spec: MotionSpec) -> np.ndarray:
    """float32 ``(n, 2, S, S)``: velocities of a picture that is scaled and cut as ``spec.fit`` says, S = ``spec.side``.

    Every place is the mean over its area. Unless ``spec.corrected``, velocities stay those of the stored picture.
    """
    cuts = []
    for length in picture_size:
        kept = min(picture_size) if spec.fit == "crop" else length
        cuts.append(((length - kept) / 2, (length + kept) / 2))
    down, across = (
        _overlaps(grids.shape[2 + axis], cell, picture_size[axis], *cuts[axis], spec.side) for axis in range(2)
    )
    scale = [spec.size / (end - start) for start, end in (cuts[1], cuts[0])]
    maps = down @ grids @ across.T
    if spec.corrected:
        maps *= np.array(scale, np.float32).reshape(2, 1, 1)
    return np.asarray(maps, np.float32)


def _overlaps(cells: int, cell: int, length: int, start: float, end: float, side: int) -> np.ndarray:
    """float32 ``(side, cells)``: the share of each cell in equal parts of [start, end)."""
    inner = np.minimum(np.arange(cells + 1) * cell, length)
    outer = np.linspace(start, end, side + 1)
    shared = np.minimum(outer[1:, None], inner[None, 1:]) - np.maximum(outer[:-1, None], inner[None, :-1])
    weights = np.maximum(shared, 0.0)
    weights /= np.maximum(weights.sum(1, keepdims=True), 1e-9)
    return np.asarray(weights, np.float32)
