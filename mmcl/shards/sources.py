"""The bytes that a row is made of: a file of its own, or members of a tar; never a pipe or a device."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from mmcl.media.probe import MediaSource
from mmcl.shards.inputs import Row
from mmcl.shards.member_index import Member
from mmcl.shards.members import Role, role_of
from mmcl.shards.reader import MAX_SAMPLE_BYTES
from mmcl.types import SampleError

_BLOCK = 1 << 20


def check_file(path: str) -> tuple[int, int]:
    """(bytes, time of the last change in ns) of a plain file.

    A pipe would be waited for, a device may never end: both are refused by their type, unopened. Raises
    ``SampleError``: ``missing_file``, ``unreadable``, ``not_a_file``.
    """
    try:
        status = Path(path).stat()
    except FileNotFoundError:
        raise SampleError("missing_file", path) from None
    except (OSError, ValueError) as error:
        raise SampleError("unreadable", f"{path}: {error}") from None
    if not stat.S_ISREG(status.st_mode):
        raise SampleError("not_a_file", f"{path} is a folder, a pipe or a device")
    return status.st_size, status.st_mtime_ns


def main_role(row: Row) -> Role | None:
    """What the media file that decides a row's length is."""
    name = f"x.{row.files[0].extension}" if row.files else row.path
    return role_of(Path(name).suffix[1:].lower())


def main_source(path: str, files: tuple[Member, ...]) -> MediaSource:
    """The file that decides a row's length, for what reads media: its path, or its bytes. Raises ``SampleError``."""
    check_file(path)
    return b"".join(_blocks(path, files[0])) if files else path


def source_sha256(row: Row) -> str:
    """Of the media that a row is made of, wherever they lie: alone in a file or in a tar. Raises ``SampleError``."""
    status = check_file(row.path)
    digests = [_sha256(row.path, *status, member) for member in row.files or (None,)]
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


@contextlib.contextmanager
def local_files(row: Row, folder: str | Path) -> Iterator[list[str]]:
    """Paths of a row's media files; members of a tar are copied into ``folder`` for as long. Raises ``SampleError``."""
    check_file(row.path)
    if not row.files:
        yield [row.path]
        return
    with tempfile.TemporaryDirectory(dir=folder, prefix="source-") as copies:
        paths = []
        for number, member in enumerate(row.files):
            path = Path(copies) / f"{number}.{member.extension.rpartition('.')[2]}"
            with path.open("wb") as file:
                file.writelines(_blocks(row.path, member))
            paths.append(str(path))
        yield paths


def _blocks(path: str, member: Member | None) -> Iterator[bytes]:
    try:
        with Path(path).open("rb") as file:
            left = -1
            if member is not None:
                if member.num_bytes > MAX_SAMPLE_BYTES:
                    raise SampleError("too_large", f"{member.num_bytes} bytes in a tar, at most {MAX_SAMPLE_BYTES}")
                file.seek(member.offset)
                left = member.num_bytes
            while left and (block := file.read(_BLOCK if left < 0 else min(_BLOCK, left))):
                yield block
                left -= len(block) if left > 0 else 0
    except OSError as error:
        raise SampleError("unreadable", f"{path}: {error.strerror or error}") from None
    if left > 0:
        raise SampleError("unreadable", f"{path} ends {left} bytes before its member does")


@functools.lru_cache(maxsize=4096)
def _sha256(path: str, num_bytes: int, modified_ns: int, member: Member | None) -> str:
    """One film may be the source of a thousand rows: the arguments beside the path make the cache notice a change."""
    digest = hashlib.sha256()
    for block in _blocks(path, member):
        digest.update(block)
    return digest.hexdigest()
