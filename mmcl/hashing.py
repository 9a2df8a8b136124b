"""Our own counter-based random numbers: pinned by golden values, equal on every platform and version.

A library's generator may change its stream between versions; these are part of the file format of a run.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.uint64]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_FIRST, _SECOND = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def _mix(x: Words) -> Words:
    """The finaliser of splitmix64 (Steele, Lea, Flood 2014)."""
    x = (x ^ (x >> np.uint64(30))) * _FIRST
    x = (x ^ (x >> np.uint64(27))) * _SECOND
    mixed: Words = x ^ (x >> np.uint64(31))
    return mixed


def hash64(*words: Any) -> Words:
    """uint64 hash of integers or integer arrays, broadcast against each other.

    >>> [f"{int(hash64(*words)):016x}" for words in [(0,), (1,), (0, 1)]]
    ['6e789e6aa1b965f4', 'e99ff867dbf682c9', '5d60b960e0946ba0']
    """
    with np.errstate(over="ignore"):
        state: Words = np.asarray(_GOLDEN)
        for word in words:
            state = _mix((state ^ np.asarray(word).astype(np.uint64)) + _GOLDEN)
    return state


def uniform(*words: Any) -> npt.NDArray[np.float64]:
    """float64 in [0, 1), a pure function of the words."""
    return np.asarray((hash64(*words) >> np.uint64(11)).astype(np.float64) * 2.0**-53)


def signed_constants() -> tuple[int, int, int]:
    """The three constants of ``hash64`` as signed numbers, for the same arithmetic in int64 on another device."""
    golden, first, second = (int(value.astype(np.int64)) for value in (_GOLDEN, _FIRST, _SECOND))
    return golden, first, second


def text_hash(text: str) -> int:
    """A non-negative 63-bit number for a string."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big") >> 1
