"""A local folder that keeps what was fetched: bounded in bytes, shared by any number of processes."""

from __future__ import annotations

import contextlib
import hashlib
import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

from mmcl.types import ConfigError

_HEADER = struct.Struct("<8sQI4x")
_MAGIC = b"MMCLRNG\0"
_COUNT = struct.Struct("<q")
_ROOM = 0.9
"""of the limit, after the oldest were deleted: not every entry has to look for the oldest again"""


class RangeCache:
    """Entries by name, each a file that is there whole or not at all; the least recently used go first.

    Writers of all processes take turns under one lock, so the files never hold more than ``max_bytes`` together. What
    was damaged since it was written counts as not there. Raises ``ConfigError`` where the folder cannot be used.
    """

    def __init__(self, folder: str | Path, max_bytes: int) -> None:
        self.folder, self.max_bytes = Path(folder).expanduser(), max_bytes
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock_file = self.folder / "lock"
            self._lock_file.touch()
        except OSError as error:
            raise ConfigError(f"data.cache_dir: {self.folder}: {error.strerror or error}") from None

    def get(self, name: str) -> bytes | None:
        """What was kept under a name; None: nothing, or nothing whole."""
        path = self._path(name)
        try:
            content = path.read_bytes()
        except OSError:
            return None
        body = memoryview(content)[_HEADER.size :]
        if len(content) < _HEADER.size or _HEADER.unpack_from(content) != (_MAGIC, len(body), zlib.crc32(body)):
            with self._locked() as room:
                self._delete(path, room)
            return None
        with contextlib.suppress(OSError):
            os.utime(path)
        return content[_HEADER.size :]

    def put(self, name: str, content: bytes | memoryview) -> None:
        """Keeps ``content``; what does not fit, or a disk that takes no more, is no error: it is fetched again."""
        path, size = self._path(name), _HEADER.size + len(content)
        if size > self.max_bytes:
            return
        with self._locked() as room:
            if path.exists():
                return
            if room.used + size > self.max_bytes:
                room.used = self._evict(int(self.max_bytes * _ROOM) - size)
            temporary = path.with_suffix(".part")  # under the lock there is one writer
            try:
                path.parent.mkdir(exist_ok=True)
                with temporary.open("wb") as file:
                    file.write(_HEADER.pack(_MAGIC, len(content), zlib.crc32(content)))
                    file.write(content)
                temporary.replace(path)
                room.used += size
            except OSError:
                with contextlib.suppress(OSError):
                    temporary.unlink(missing_ok=True)

    def drop(self, name: str) -> None:
        """Forgets what was kept under a name."""
        with self._locked() as room:
            self._delete(self._path(name), room)

    def _path(self, name: str) -> Path:
        digest = hashlib.sha256(name.encode("utf-8", "replace")).hexdigest()
        return self.folder / digest[:2] / digest[2:]

    @contextlib.contextmanager
    def _locked(self) -> Iterator[_Room]:
        """One process at a time; the bytes in use are kept in the lock's own file."""
        import fcntl

        with self._lock_file.open("r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            noted = file.read(_COUNT.size + 1)
            room = _Room(_COUNT.unpack(noted)[0] if len(noted) == _COUNT.size else -1)
            if room.used < 0:
                room.used = sum(size for _, size, _ in self._entries())
            # a process that is killed in here leaves no count, and the next one counts the files
            file.seek(0)
            file.truncate()
            yield room
            file.write(_COUNT.pack(room.used))

    def _entries(self) -> list[tuple[float, int, Path]]:
        """(last use, bytes, path) of each; what a killed writer left half is deleted."""
        found = []
        for path in self.folder.glob("??/*"):
            with contextlib.suppress(OSError):
                if path.suffix == ".part":
                    path.unlink(missing_ok=True)
                    continue
                facts = path.stat()
                found.append((facts.st_mtime, facts.st_size, path))
        return found

    def _evict(self, room_bytes: int) -> int:
        """Deletes the least recently used until the rest fits; the bytes of the rest."""
        entries = sorted(self._entries(), key=lambda entry: entry[0], reverse=True)
        used = sum(size for _, size, _ in entries)
        while entries and used > max(room_bytes, 0):
            _, size, path = entries.pop()
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
                used -= size
        return used

    @staticmethod
    def _delete(path: Path, room: _Room) -> None:
        with contextlib.suppress(OSError):
            size = path.stat().st_size
            path.unlink()
            room.used = max(0, room.used - size)


class _Room:
    """Bytes that the entries take."""

    def __init__(self, used: int) -> None:
        self.used = used
