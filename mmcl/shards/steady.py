"""Encoders that answer the same whatever the process did before."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_M_PERTURB = -6
"""glibc's mallopt: fill what is handed out, and what is given back, with a byte"""


@contextmanager
def steady_memory() -> Iterator[None]:
    """Within the context, fresh memory always holds the same bytes (glibc; elsewhere this does nothing).

    x264 reads a little memory that it never wrote. What lay there before decided about one clip in two hundred: the
    same clip came out with other bytes, depending on the clips before it (measured; with this, none in ten thousand).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        yield
        return
    mallopt(_M_PERTURB, 0x55)
    try:
        yield
    finally:
        mallopt(_M_PERTURB, 0)
