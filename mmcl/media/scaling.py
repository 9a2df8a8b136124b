"""Scaling as decord does it, so that every decoder's pictures are the same.

decord turns, then scales by FFmpeg's ``scale`` filter, bilinear, from the stored planes to RGB in one step. PyAV's own
reformatter is the same but for where it supposes the colour samples: 5 levels of difference, this filter has none.
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
    filters = [("transpose", way) for way in _TURNS.get(turns, ())]
    filters += [("scale", f"{width}:{height}:flags=bilinear"), ("format", "rgb24")]
    for following in [*(graph.add(name, options) for name, options in filters), graph.add("buffersink")]:
        last.link_to(following)
        last = following
    graph.configure()
    return graph


_MATRICES = {1: (0.2126, 0.0722), 9: (0.2627, 0.0593), 10: (0.2627, 0.0593)}
"""FFmpeg's number of a colour space -> the shares of red and blue in brightness; all others are as BT.601"""
_BT601 = 0.299, 0.114
_HALVED = ("yuv420p", "yuvj420p", "yuv420p10le")
"""formats whose colour has half the resolution"""
_CUT_OFF = np.array([1.0, 1.5, 1.0], np.float32)
"""levels that FFmpeg's conversion to RGB loses on average, as it does not round (measured)"""


class RgbScaler:
    """Scales the RGB pictures of a decoder that gives no planes (torchcodec) to what ``scale_picture`` makes of these.

    torchcodec's own scaling, of RGB, is up to 15 levels away from scaling the planes (2 on average). So the planes are
    computed back, which leaves 1 pixel in 1,000 more than 2 levels away, and none more than 5.
    """

    def __init__(self, codec_context: Any) -> None:
        self._halved = codec_context.pix_fmt in _HALVED
        self._full = codec_context.pix_fmt == "yuvj420p" or codec_context.color_range == 2
        self._colorspace = codec_context.colorspace
        red, blue = _MATRICES.get(int(self._colorspace), _BT601)
        self._shares = np.array([red, 1 - red - blue, blue], np.float32)

    def scale(self, picture: np.ndarray, height: int, width: int) -> np.ndarray:
        """uint8 ``(H, W, 3)`` -> uint8 ``(height, width, 3)``"""
        if self._halved and picture.shape[0] % 2 == picture.shape[1] % 2 == 0:
            frame = av.VideoFrame.from_ndarray(self._planes(picture), format="yuvj420p" if self._full else "yuv420p")
            frame.colorspace = self._colorspace
        else:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
        frame.pts = 0
        return scale_picture(frame, height, width)

    def _planes(self, picture: np.ndarray) -> np.ndarray:
        """uint8 ``(3H/2, W)``: brightness over the two colour planes, as PyAV lays out yuv420p."""
        height, width, _ = picture.shape
        rgb = picture.astype(np.float32) + _CUT_OFF
        bright = rgb @ self._shares
        colours = []
        for channel, share in ((2, self._shares[2]), (0, self._shares[0])):
            difference = (rgb[..., channel] - bright) / (2 * (1 - share))
            mean = difference.reshape(height // 2, 2, width // 2, 2).mean(axis=(1, 3))
            colours.append(mean * (1.0 if self._full else 224 / 255) + 128)
        if not self._full:
            bright = bright * (219 / 255) + 16
        planes = np.concatenate([bright.ravel(), *(colour.ravel() for colour in colours)])
        rounded: np.ndarray = np.rint(planes.clip(0, 255)).astype(np.uint8).reshape(-1, width)
        return rounded
