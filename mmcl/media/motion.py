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
from mmcl.media.probe import MediaSource, quarter_turns
from mmcl.media.video_pyav import PyAVReader
from mmcl.types import MotionSpec, SampleError

CODECS = frozenset(("h264", "mpeg4", "mpeg1video", "mpeg2video", "h263", "msmpeg4v3"))
"""whose vectors FFmpeg hands out"""
CELL = 8
"""pixels, height = width, of the smallest block that it tells apart"""
_MACROBLOCK, _CHUNK = 16, 64
_MAX_REFERENCES = 16


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
    nearest frame on that side that others refer to, as the order of the packets tells. Blocks without a vector (coded
    anew) are zeros. A block with two vectors, to the past and to the future, has their mean.

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
        different, places = checked(numbers, len(self._table.pts))
        if self._distances is None:
            self._distances = reference_distances(self._table)
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


def reference_distances(table: FrameTable) -> tuple[np.ndarray, np.ndarray]:
    """int64 ``(F,)`` each: frames from every frame back to the reference before it and on to the one after it.

    A frame is taken for a reference where nothing displayed later was decoded before it, or where the next packet is of
    an earlier time (why else would it come first): so of I and P frames, and of B frames in the middle of a pyramid.
    """
    order = np.searchsorted(table.pts, table.coded_pts).tolist()
    past, future = np.ones(len(table.pts), np.int64), np.ones(len(table.pts), np.int64)
    references: list[int] = []
    highest = -1
    for number, following in zip(order, [*order[1:], len(order)], strict=True):
        place = bisect_left(references, number)
        if place:
            past[number] = number - references[place - 1]
        if place < len(references):
            future[number] = max(1, references[place] - number)
        if number > highest or following < number:
            insort(references, number)
            del references[:-_MAX_REFERENCES]
        highest = max(highest, number)
    return past, future


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
