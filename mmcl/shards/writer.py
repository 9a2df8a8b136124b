"""Writing shards: plain tar files whose bytes depend on nothing but their samples."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tarfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from mmcl.shards.files import write_atomically, writing
from mmcl.shards.manifest import ShardEntry, index_url
from mmcl.shards.member_index import Member, pack_index

MAX_COUNT = 1_000
MAX_BYTES = 512 << 20
_BLOCK = 512
_RECORD = 20 * _BLOCK


class TarShard:
    """One tar in the making, under a temporary name until ``close``; its side file and checksum grow with it.

    Members are written by ``tarfile``'s own headers (GNU form) with time 0 and no owner, sorted by extension, so equal
    samples make equal bytes. Raises ``RunError`` where the folder cannot be written.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.num_bytes = 0
        self._keys: list[str] = []
        self._members: list[list[Member]] = []
        self._digest = hashlib.sha256()
        self._temporary = self.path.with_name(f".{self.path.name}.part")
        with writing(self._temporary):
            self._file: BinaryIO = self._temporary.open("wb")

    def __len__(self) -> int:
        return len(self._keys)

    def add(self, key: str, members: Mapping[str, bytes | memoryview]) -> None:
        """Appends one sample; ``members`` by extension, without the leading dot."""
        files = []
        for extension in sorted(members):
            header, data = member_header(f"{key}.{extension}", len(members[extension])), members[extension]
            files.append(Member(extension, self.num_bytes + len(header), len(data)))
            for part in (header, data, bytes(-len(data) % _BLOCK)):
                self._write(part)
        self._keys.append(key)
        self._members.append(files)

    def close(self) -> ShardEntry:
        """Ends the tar, puts it and its side file on disk under their names, and returns its line of the manifest."""
        ending = self.num_bytes + 2 * _BLOCK
        self._write(bytes(ending - self.num_bytes + -ending % _RECORD))
        with writing(self._temporary):
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
        side = Path(index_url(str(self.path)))
        with writing(self.path):
            # An older side file goes first: no shard is ever seen with one that is not its own.
            side.unlink(missing_ok=True)
            self._temporary.replace(self.path)
        write_atomically(side, pack_index(self._keys, self._members, self.num_bytes))
        return ShardEntry(self.path.name, len(self._keys), self.num_bytes, self._digest.hexdigest())

    def discard(self) -> None:
        """Leaves nothing behind."""
        with contextlib.suppress(OSError):
            self._file.close()
        with contextlib.suppress(OSError):
            self._temporary.unlink(missing_ok=True)

    def _write(self, part: bytes | memoryview) -> None:
        with writing(self._temporary):
            self._file.write(part)
        self._digest.update(part)
        self.num_bytes += len(part)


class ShardWriter:
    """Writes ``shard-000000.tar``, ``shard-000001.tar``, … into a folder; a context manager.

    A shard ends at ``max_count`` samples or before it would exceed ``max_bytes``. After an error the unfinished shard
    is taken away. ``entries`` are the lines for ``write_manifest``, complete once closed.
    """

    def __init__(
        self, folder: str | Path, *, prefix: str = "shard", max_count: int = MAX_COUNT, max_bytes: int = MAX_BYTES
    ) -> None:
        self.folder = Path(folder)
        self.entries: list[ShardEntry] = []
        self._prefix, self._max_count, self._max_bytes = prefix, max_count, max_bytes
        self._shard: TarShard | None = None
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)

    def write(self, key: str, members: Mapping[str, bytes | memoryview]) -> None:
        """``key`` holds no dot in its last part (readers cut there)."""
        shard = self._shard
        if shard is not None and is_full(
            len(shard), shard.num_bytes, sample_bytes(key, members), self._max_count, self._max_bytes
        ):
            self._finish()
        if self._shard is None:
            self._shard = TarShard(self.folder / shard_name(len(self.entries), self._prefix))
        self._shard.add(key, members)

    def close(self) -> None:
        if self._shard is not None:
            self._finish()

    def discard(self) -> None:
        """Takes the unfinished shard away."""
        if self._shard is not None:
            self._shard.discard()
            self._shard = None

    def _finish(self) -> None:
        if self._shard is not None:
            self.entries.append(self._shard.close())
            self._shard = None

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:
            self.discard()


def shard_name(number: int, prefix: str = "shard") -> str:
    return f"{prefix}-{number:06d}.tar"


def is_full(count: int, num_bytes: int, next_bytes: int, max_count: int, max_bytes: int) -> bool:
    """Whether a shard ends before the next sample; an empty one never does."""
    return count > 0 and (count >= max_count or num_bytes + next_bytes > max_bytes)


def sample_bytes(key: str, members: Mapping[str, bytes | memoryview]) -> int:
    """How many bytes of a tar a sample takes."""
    return sum(
        len(member_header(f"{key}.{extension}", len(data))) + len(data) + -len(data) % _BLOCK
        for extension, data in members.items()
    )


def member_header(name: str, num_bytes: int) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.mode, info.mtime = num_bytes, 0o644, 0
    return info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape")
