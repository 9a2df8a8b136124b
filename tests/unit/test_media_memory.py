"""Decoding gives all of its memory back, to the byte."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Callable
from contextlib import closing

import numpy as np
import pytest
from support.media import encode, tone

from mmcl.media.audio import read_audio
from mmcl.media.probe import probe
from mmcl.media.video import open_video
from mmcl.types import SampleError

CALLS = 30
LIMIT_BYTES = 40
"""a call; the smallest thing that FFmpeg has to forget is 144"""


class Mallinfo2(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_size_t)
        for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "_")
    ]


@pytest.fixture(scope="module")
def memory_in_use() -> Callable[[], int]:
    """Bytes that C code has allocated and not freed."""
    mallinfo2 = getattr(ctypes.CDLL(None), "mallinfo2", None) if sys.platform == "linux" else None
    if mallinfo2 is None:
        pytest.skip("only glibc counts what is allocated")
    mallinfo2.restype = Mallinfo2

    def in_use() -> int:
        gc.collect()
        info = mallinfo2()
        return int(info.uordblks + info.hblkhd)

    return in_use


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    pictures = np.random.default_rng(0).integers(0, 256, (12, 48, 64, 3), np.uint8)
    return encode(tmp_path_factory.mktemp("memory") / "clip.mp4", pictures, tone(440, 1.0, 16_000)).read_bytes()


def pictures(data: bytes) -> None:
    with closing(open_video(data, decoder="pyav", size=32)) as reader:
        reader.read([2, 7])


def sound(data: bytes) -> None:
    read_audio(data, start_seconds=0.1, end_seconds=0.3, sample_rate_hz=8_000)


def damaged(data: bytes) -> None:
    with pytest.raises(SampleError):
        pictures(data[: len(data) // 2])
    noisy = bytearray(data)
    noisy[data.index(b"mdat") + 8 : len(data) * 2 // 3] = bytes(len(data) * 2 // 3 - data.index(b"mdat") - 8)
    with pytest.raises(SampleError):
        pictures(bytes(noisy))


@pytest.mark.parametrize("use", [pictures, sound, probe, damaged])
def test_nothing_is_left_behind(use: Callable[[bytes], object], clip: bytes, memory_in_use: Callable[[], int]) -> None:
    grown: list[float] = []
    while not grown or grown[-1] >= LIMIT_BYTES:  # first uses fill caches, other threads may allocate meanwhile
        assert len(grown) < 12, grown
        before = memory_in_use()
        for _ in range(CALLS):
            use(clip)
        grown.append((memory_in_use() - before) / CALLS)
