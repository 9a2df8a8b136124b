"""Random access to the samples of a manifest: memory-mapped local shards, range reads of remote ones."""

from __future__ import annotations

import mmap
import os
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmcl.shards.files import is_remote
from mmcl.shards.manifest import Manifest
from mmcl.shards.member_index import ShardIndex
from mmcl.shards.remote import RemoteOptions, answers_tell
from mmcl.shards.remote_shard import RemoteShard
from mmcl.types import RunError, SampleError, Source

MAX_SAMPLE_BYTES = 1 << 30
FAILED_SECONDS = 30.0
"""for which a shard whose index could not be fetched is not asked for again"""


@dataclass(frozen=True, slots=True, eq=False)
class RawSample:
    """The files of one sample, not yet looked at."""

    key: str
    members: dict[str, bytes | memoryview]
    """by extension, lower case, without the leading dot; views into the mapped shard where it is local"""
    source: Source


class ShardReader:
    """Reads samples of a manifest by position. Opens shards when first read, keeps the last ``max_open`` of them.

    Cheap to pickle, and safe to take through a fork: only the manifest travels, every process opens its own files.
    """

    def __init__(
        self,
        manifest: Manifest,
        *,
        max_open: int = 128,
        max_sample_bytes: int = MAX_SAMPLE_BYTES,
        remote: RemoteOptions | None = None,
    ) -> None:
        self.manifest = manifest
        self.max_open = max_open
        self.max_sample_bytes = max_sample_bytes
        self.remote = remote or RemoteOptions()
        self._start()

    def _start(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._opening: dict[int, threading.Lock] = {}
        self._open: OrderedDict[int, LocalShard | RemoteShard] = OrderedDict()
        self._failed: dict[int, tuple[float, SampleError]] = {}
        self._versions: dict[int, str] = {}
        """of remote shards that were closed: opened again, they must be the same"""

    def __getstate__(self) -> dict[str, Any]:
        names = ("manifest", "max_open", "max_sample_bytes", "remote")
        return {name: getattr(self, name) for name in names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start()

    def __len__(self) -> int:
        return self.manifest.num_samples

    def read(self, shard: int, index: int) -> RawSample:
        """The sample ``index`` of the shard ``shard``.

        Raises ``SampleError`` (``too_large``, ``unreadable``) for this sample alone, ``RunError`` where the shard is
        missing or is not the one that was indexed, ``IndexError`` beyond the end.
        """
        opened = self.open(shard)
        if not 0 <= index < opened.index.num_samples:
            raise IndexError(f"sample {index} of {opened.index.num_samples} in shard {shard}")
        members = opened.index.members(index)
        if sum([member.num_bytes for member in members]) > self.max_sample_bytes:
            raise SampleError("too_large", f"{opened.index.key(index)} holds over {self.max_sample_bytes} bytes")
        files: dict[str, bytes | memoryview]
        if isinstance(opened, LocalShard):
            data = opened.read([(member.offset, member.offset + member.num_bytes) for member in members])
            files = {member.extension: part for member, part in zip(members, data, strict=True)}
        else:
            files = {**opened.read(index)}
        return RawSample(opened.index.key(index), files, Source(shard, index))

    def key(self, shard: int, index: int) -> str:
        """The key of a sample, without reading it."""
        opened = self.open(shard)
        if not 0 <= index < opened.index.num_samples:
            raise IndexError(f"sample {index} of {opened.index.num_samples} in shard {shard}")
        return opened.index.key(index)

    def open_index(self, shard: int) -> ShardIndex:
        """Where the samples of a shard lie. Raises as ``read`` does where the shard is not the one that was indexed."""
        return self.open(shard).index

    def open(self, shard: int) -> LocalShard | RemoteShard:
        """A shard, opened once whoever asks; different ones at the same time. Raises as ``read`` does."""
        if self._pid != os.getpid():
            self._start()
        with self._lock:
            opened = self._open.get(shard)
            if opened is not None:
                self._open.move_to_end(shard)
                return opened
            opening = self._opening.setdefault(shard, threading.Lock())
        with opening:
            with self._lock:
                if shard in self._open:
                    return self._open[shard]
                since, failure = self._failed.get(shard, (-FAILED_SECONDS, None))
            if failure is not None and time.monotonic() - since < FAILED_SECONDS:
                raise SampleError(failure.reason, failure.detail)
            try:
                opened = self._open_now(shard)
            except SampleError as error:
                self._failed[shard] = (time.monotonic(), error)
                raise
            with self._lock:
                self._open[shard] = opened
                self._opening.pop(shard, None)
                while len(self._open) > self.max_open:
                    number, closed = self._open.popitem(last=False)  # its map closes with the last view into it
                    if isinstance(closed, RemoteShard) and closed.version:
                        self._versions[number] = closed.version
            return opened

    def _open_now(self, shard: int) -> LocalShard | RemoteShard:
        manifest, url = self.manifest, self.manifest.shard_url(shard)
        index = manifest.shard_index(shard, remote=self.remote)
        if is_remote(url):
            remote = RemoteShard(
                url,
                index,
                checksum=manifest.checksums[shard].tobytes().hex(),
                version=self._versions.get(shard, ""),
                options=self.remote,
            )
            if not answers_tell(url):
                remote.check_file()
            return remote
        return LocalShard(url, index)


class LocalShard:
    """One mapped tar and its member index. Raises ``RunError`` where it is missing or not the one that was indexed."""

    def __init__(self, path: str, index: ShardIndex) -> None:
        self.index = index
        try:
            with Path(path).open("rb") as file:
                num_bytes = os.fstat(file.fileno()).st_size
                if num_bytes != index.tar_bytes:
                    raise RunError(
                        f"{path} holds {num_bytes} bytes, it was indexed with {index.tar_bytes}: "
                        f"run `mmcl shards index` on its folder again"
                    )
                # an empty file cannot be mapped
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if num_bytes else b""
                self._view = memoryview(mapped)
        except OSError as error:
            raise RunError(f"cannot read {path}: {error.strerror or error}") from None

    def read(self, ranges: list[tuple[int, int]]) -> list[bytes | memoryview]:
        view = self._view
        return [view[start:stop] for start, stop in ranges]
