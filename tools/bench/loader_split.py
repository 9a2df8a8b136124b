"""Where our CPU seconds go: the parts of reading a sample, each timed without what it calls of the other parts.

CPU time of all threads, read where a part begins and where it ends, so decord's own thread is counted where it works:
mostly under ``video``, where its frames are waited for.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import loader_sides

from mmcl.data import loader
from mmcl.media import audio, clip, frame_table, probe, video_decord, video_pyav, video_torchcodec

DECODING = ("open", "video", "scale", "audio")
"""what a decoder does; decord and SPDL scale inside it, so scaling is counted with it everywhere, and shown alone"""
PARTS: tuple[tuple[str, Any, str], ...] = (
    ("open", probe.av, "open"),
    ("open", frame_table.FrameTable, "of"),
    ("video", video_pyav.PyAVReader, "_decode"),
    ("video", video_decord.DecordReader, "__init__"),
    ("video", video_decord.DecordReader, "read"),
    ("scale", video_pyav.PyAVReader, "_picture"),
    ("open", video_torchcodec.TorchCodecReader, "_connect"),
    ("scale", video_torchcodec.TorchCodecReader, "_picture"),
    ("audio", audio.AudioReader, "_decode_from"),
    ("resample", audio, "_resample"),
    ("collate", loader, "collate"),
    ("log-mel", loader_sides, "log_mel"),
    ("rest", clip.MediaReader, "read_all"),
)


class _Clock:
    """Exclusive CPU seconds of nested parts."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {"rest": 0.0}
        self._open = ["rest"]
        self._since = time.process_time()

    def _turn(self) -> None:
        now = time.process_time()
        name = self._open[-1]
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._since
        self._since = now

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            self._turn()
            self._open.append(name)
            try:
                return function(*arguments, **options)
            finally:
                self._turn()
                self._open.pop()

        return call

    def stop(self) -> None:
        self._turn()


@contextmanager
def _clocked() -> Iterator[_Clock]:
    clock = _Clock()
    with ExitStack() as stack:
        for name, owner, attribute in PARTS:
            function = clock.timed(name, getattr(owner, attribute))
            bound = isinstance(vars(owner).get(attribute), classmethod)
            stack.enter_context(patch.object(owner, attribute, staticmethod(function) if bound else function))
        yield clock
        clock.stop()


def split(side: loader_sides.Side, folder: Path, count: int) -> dict[str, Any]:
    """CPU ms per sample of each part, and the share of all that is not decoding."""
    side(folder, min(count, 2 * loader_sides.BATCH))
    with _clocked() as clock:
        rows = side(folder, count)
    parts = {name: 1e3 * seconds / rows for name, seconds in clock.seconds.items()}
    whole = sum(parts.values())
    return {
        "cpu_ms": {name: parts[name] for name in sorted(parts, key=parts.__getitem__, reverse=True)},
        "not_decoding": 1 - sum(parts.get(name, 0.0) for name in DECODING) / whole,
        "not_decoding_with_scaling": 1 - sum(parts.get(name, 0.0) for name in DECODING if name != "scale") / whole,
    }
