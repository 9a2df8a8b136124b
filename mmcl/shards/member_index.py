"""The side file of one shard: the keys of its samples and where each member lies in the tar.

``shard-000000.tar`` has ``shard-000000.members``, little-endian, read through a memory map:

===================  ==========================================================================
header, 64 bytes     magic ``MMCLMEM\\0``, version, samples, members, bytes of the tar,
                     bytes of the keys, bytes of the extensions, crc32 of all that follows
first_member         uint64 ``(samples + 1,)``: members of sample i are ``first[i] … first[i + 1] − 1``
key_start            uint64 ``(samples + 1,)``: where key i starts among the keys
offset, length       uint64 ``(members,)`` each, in bytes of the tar
extension            uint32 ``(members,)``: a number into the extensions
keys, extensions     UTF-8; the extensions end with a line feed each
===================  ==========================================================================
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from mmcl.types import RunError

_MAGIC = b"MMCLMEM\0"
_VERSION = 1
_HEADER = struct.Struct("<8sIIQQQQQ4xI")
assert _HEADER.size == 64


class Member(NamedTuple):
    """One file of a sample."""

    extension: str
    """lower case, without the leading dot"""
    offset: int
    """bytes from the start of the tar to the member's data"""
    num_bytes: int


class ShardIndex:
    """Where the samples of one shard lie, read from the bytes of a side file (a memory map, or fetched)."""

    def __init__(self, buffer: bytes | memoryview, name: str) -> None:
        view = memoryview(buffer)
        if len(view) < _HEADER.size:
            raise RunError(f"{name}: not a member index ({len(view)} bytes)")
        magic, version, _, samples, members, tar_bytes, key_bytes, extension_bytes, crc = _HEADER.unpack_from(view)
        if magic != _MAGIC:
            raise RunError(f"{name}: not a member index")
        if version != _VERSION:
            raise RunError(f"{name}: member index of version {version}; this program reads version {_VERSION}")
        lengths = (8 * (samples + 1), 8 * (samples + 1), 8 * members, 8 * members, 4 * members, key_bytes)
        if _HEADER.size + sum(lengths) + extension_bytes != len(view) or zlib.crc32(view[_HEADER.size :]) != crc:
            raise RunError(f"{name}: damaged member index; `mmcl shards index` writes it again")
        parts, start = [], _HEADER.size
        for length in lengths:
            parts.append(view[start : start + length])
            start += length
        self.num_samples: int = samples
        self.tar_bytes: int = tar_bytes
        # A cast memory view hands out Python integers several times faster than an array does.
        self._first, self._key_start, self._offset, self._length = (part.cast("Q") for part in parts[:4])
        self._extension = parts[4].cast("I")
        self._keys = parts[5]
        self._extensions = bytes(view[start:]).decode("utf-8").split("\n")[:-1]
        self._check(name)

    def _check(self, name: str) -> None:
        """Refuses numbers that point outside: the file may be a stranger's."""
        first, key_start = np.asarray(self._first), np.asarray(self._key_start)
        ends = np.asarray(self._offset) + np.asarray(self._length)
        ok = (
            first[0] == 0
            and first[-1] == len(self._offset)
            and key_start[0] == 0
            and key_start[-1] == len(self._keys)
            and bool((first[1:] >= first[:-1]).all() and (key_start[1:] >= key_start[:-1]).all())
            and bool((ends <= self.tar_bytes).all() and (ends >= np.asarray(self._offset)).all())
            and bool((np.asarray(self._extension) < len(self._extensions)).all())
        )
        if not ok:
            raise RunError(f"{name}: the member index points outside of its shard")

    def key(self, index: int) -> str:
        return str(self._keys[self._key_start[index] : self._key_start[index + 1]], "utf-8", "replace")

    def members(self, index: int) -> list[Member]:
        """The files of one sample, in the order of the tar."""
        extensions, number = self._extensions, self._extension
        return [
            Member(extensions[number[m]], self._offset[m], self._length[m])
            for m in range(self._first[index], self._first[index + 1])
        ]

    def keys(self) -> list[str]:
        return [self.key(index) for index in range(self.num_samples)]


def pack_index(keys: Sequence[str], members: Sequence[Iterable[Member]], tar_bytes: int) -> bytes:
    """The side file of a shard of ``tar_bytes`` bytes; ``members[i]`` are the files of the sample ``keys[i]``."""
    rows = [list(files) for files in members]
    files = [member for row in rows for member in row]
    extensions = sorted({member.extension for member in files})
    number = {extension: i for i, extension in enumerate(extensions)}
    encoded = [key.encode("utf-8", "replace") for key in keys]
    extension_bytes = "".join(f"{extension}\n" for extension in extensions).encode()
    body = b"".join(
        [
            np.cumsum([0, *(len(row) for row in rows)], dtype="<u8").tobytes(),
            np.cumsum([0, *(len(key) for key in encoded)], dtype="<u8").tobytes(),
            np.array([member.offset for member in files], dtype="<u8").tobytes(),
            np.array([member.num_bytes for member in files], dtype="<u8").tobytes(),
            np.array([number[member.extension] for member in files], dtype="<u4").tobytes(),
            *encoded,
            extension_bytes,
        ]
    )
    sizes = (len(keys), len(files), tar_bytes, sum(map(len, encoded)), len(extension_bytes))
    return _HEADER.pack(_MAGIC, _VERSION, 0, *sizes, zlib.crc32(body)) + body
