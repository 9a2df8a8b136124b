"""Cutting a box out of pictures, exactly, before they are scaled."""

from __future__ import annotations

from typing import Any, TypeAlias

import av

from mmcl.types import SampleError

Crop: TypeAlias = tuple[int, int, int, int]
"""(x, y, width, height) in pixels of the picture as a player turns it, before any scaling, from its upper left"""


def check_crop(crop: Crop, width: int, height: int) -> Crop:
    """The box. Raises ``SampleError("crop_outside")`` where it does not lie in a picture of this size."""
    x, y, box_width, box_height = crop
    if min(x, y) < 0 or min(box_width, box_height) < 1 or x + box_width > width or y + box_height > height:
        raise SampleError("crop_outside", f"{x}:{y}:{box_width}:{box_height} in a picture of {width}×{height}")
    return crop


def turn_back(crop: Crop, turns: int, width: int, height: int) -> Crop:
    """The box in the picture as stored (``width`` × ``height``), which a player turns ``turns`` quarters to the left.

    >>> turn_back((10, 0, 20, 30), 1, 100, 50)
    (70, 10, 30, 20)
    """
    x, y, box_width, box_height = crop
    if turns == 1:
        return width - y - box_height, x, box_height, box_width
    if turns == 2:
        return width - x - box_width, height - y - box_height, box_width, box_height
    if turns == 3:
        return y, height - x - box_width, box_height, box_width
    return crop


class Cropper:
    """Cuts one box out of frames, by FFmpeg's filter; a frame may have another size than the one before."""

    def __init__(self, box: Crop) -> None:
        self._box = box
        self._graph: Any = None
        self._made_for: tuple[int, int, str] | None = None

    def crop(self, frame: Any, turns: int) -> Any:
        """The part of a stored ``av.VideoFrame``; ``turns``: quarters to the left that a player turns it.

        Raises ``SampleError("crop_outside")``.
        """
        if turns % 2:
            check_crop(self._box, frame.height, frame.width)
        else:
            check_crop(self._box, frame.width, frame.height)
        kind = (frame.width, frame.height, frame.format.name)
        if kind != self._made_for:
            x, y, width, height = turn_back(self._box, turns, frame.width, frame.height)
            self._graph, self._made_for = av.filter.Graph(), kind
            source = self._graph.add_buffer(
                width=frame.width, height=frame.height, format=frame.format.name, time_base=frame.time_base
            )
            # Exact: not moved to where the coarser colour samples lie.
            cut = self._graph.add("crop", f"w={width}:h={height}:x={x}:y={y}:exact=1")
            sink = self._graph.add("buffersink")
            source.link_to(cut)
            cut.link_to(sink)
            self._graph.configure()
        self._graph.push(frame)
        return self._graph.pull()
