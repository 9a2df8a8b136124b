"""Scaling as decord does it, so that every decoder's pictures are the same.

decord turns, then scales by FFmpeg's ``scale`` filter, bilinear, from the stored planes to RGB in one step. PyAV's own
reformatter is the same but for where it supposes the colour samples: 5 levels of difference, this filter has none. So
is torchcodec's own scaling, of RGB: 15 levels. A frame that is not scaled takes the same way.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Any

import av
import numpy as np

_TURNS = {1: ("cclock",), 2: ("cclock", "cclock"), 3: ("clock",)}
"""quarters to the left -> FFmpeg's ``transpose``"""
_KEPT = 16
_local = threading.local()


def scale_picture(frame: Any, height: int, width: int, turns: int = 0) -> np.ndarray:
    """uint8 ``(H, W, 3)``, RGB: a decoded frame, turned ``turns`` quarters to the left, then scaled."""
    graphs: OrderedDict[tuple[Any, ...], Any] = _local.__dict__.setdefault("graphs", OrderedDict())
    kind = (frame.width, frame.height, frame.format.name, frame.colorspace, frame.color_range, height, width, turns)
    graph = graphs.pop(kind, None) or _graph(frame, height, width, turns)  # building one takes a millisecond
    graph.push(frame)
    picture: np.ndarray = graph.pull().to_ndarray()
    graphs[kind] = graph
    if len(graphs) > _KEPT:
        graphs.popitem(last=False)
    return picture


def _graph(frame: Any, height: int, width: int, turns: int) -> Any:
    graph = av.filter.Graph()
    graph.threads = 1
    last = graph.add_buffer(
        width=frame.width, height=frame.height, format=frame.format.name, time_base=frame.time_base or 1
    )
    # Some formats (4:2:2) cannot be turned and are converted before; then bilinear too.
    filters = [("scale", "flags=bilinear")] * bool(turns) + [("transpose", way) for way in _TURNS.get(turns, ())]
    filters += [("scale", f"{width}:{height}:flags=bilinear"), ("format", "rgb24")]
    for following in [*(graph.add(name, options) for name, options in filters), graph.add("buffersink")]:
        last.link_to(following)
        last = following
    graph.configure()
    return graph
