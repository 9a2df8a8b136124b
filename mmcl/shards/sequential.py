"""Tars without an index, read from their first byte to their last: files, URLs, and the output of commands.

What cannot be used is named in its place: a tar that breaks off, a sample whose files do not lie together, a source
that cannot be read. The sample before a break may be half, so it is left out.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import select
import signal
import subprocess
import tarfile
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, TypeAlias

from mmcl.shards.files import is_remote
from mmcl.shards.index import split_name
from mmcl.shards.manifest import Manifest, load_manifest
from mmcl.shards.reader import MAX_SAMPLE_BYTES, RawSample
from mmcl.shards.remote import ChangedError, RemoteOptions
from mmcl.shards.remote_file import RemoteFile
from mmcl.types import ConfigError, RunError, SampleError, Source, redact

PIPE = "pipe:"
_BLOCK_BYTES = 512
_PACKED = {b"\x1f\x8b": "gzip", b"BZ": "bzip2", b"\xfd7": "xz", b"(\xb5": "zstandard"}


@dataclass(frozen=True, slots=True)
class Problem:
    """What stands in the place of a sample that cannot be used."""

    key: str
    """of the sample, or its place"""
    error: SampleError

    def read(self) -> RawSample:
        """Raises why there is nothing to read."""
        raise self.error


Item: TypeAlias = "RawSample | Problem"


@dataclass(frozen=True)
class TarList:
    """Tars in their order, without any index."""

    urls: tuple[str, ...]
    """paths, URLs, or ``pipe:COMMAND``"""
    remote: RemoteOptions = field(default_factory=RemoteOptions)

    @property
    def fingerprint(self) -> str:
        """32 hexadecimal digits of the names in order."""
        return hashlib.sha256("\n".join(self.urls).encode("utf-8", "replace")).hexdigest()[:32]

    @property
    def num_shards(self) -> int:
        """Tars; how many samples they hold is not known."""
        return len(self.urls)

    def items(self, reader: int, readers: int, *, skip: int = 0) -> Generator[tuple[int, Item], None, None]:
        """(pass, sample or problem) of one of ``readers`` readers, without end; ``skip`` of them are read over.

        Where there are enough tars each reader has its own, else all read all and keep every ``readers``-th sample.
        Raises ``RunError`` where a whole pass gives no sample.
        """
        own = len(self.urls) >= readers
        urls = self.urls[reader::readers] if own else self.urls
        turn = 0
        while True:
            read = (read_items(url, number, self.remote) for number, url in self._mine(urls))
            items: Iterator[Item] = itertools.chain.from_iterable(read)
            if not own:
                items = itertools.islice(items, reader, None, readers)
            good = count = 0
            for item in items:
                count += 1
                good += not isinstance(item, Problem)
                if count > skip:
                    yield turn, item
            if not good:
                raise RunError(f"{', '.join(urls[:3])}{', …' if len(urls) > 3 else ''}: no sample in {count} tries")
            # passes are alike: those that are skipped whole need not be read
            passes, skip = divmod(max(0, skip - count), count)
            turn += 1 + passes

    def _mine(self, urls: Sequence[str]) -> Iterator[tuple[int, str]]:
        numbers = {url: number for number, url in enumerate(self.urls)}
        return ((numbers[url], url) for url in urls)


def is_tar_list(shards: str | Path | Sequence[str]) -> bool:
    """Whether this names tars, and not a folder of shards with its index."""
    if isinstance(shards, Path):
        return False
    return not isinstance(shards, str) or shards.startswith(PIPE) or shards.endswith(".tar")


def expand_tars(shards: str | Sequence[str], *, allow_pipe: bool, remote: RemoteOptions | None = None) -> TarList:
    """The tars that a pattern such as ``https://host/{000..099}.tar`` names, or a list of such patterns.

    Raises ``ConfigError`` on ``pipe:`` without ``allow_pipe``, on chained URLs and other schemes.
    """
    import webdataset

    urls: list[str] = []
    for pattern in [shards] if isinstance(shards, str) else shards:
        if pattern.startswith(PIPE):
            if not allow_pipe:
                raise ConfigError(f"data.shards: {pattern!r} runs a command; data.allow_pipe=true lets it")
            # only the command's own braces of this form are a pattern
            urls += _expand(webdataset, pattern)
            continue
        if not pattern.endswith(".tar"):
            raise ConfigError(f"data.shards: {pattern!r} in a list of tars must end with .tar")
        is_remote(pattern)  # refuses chained URLs and unknown schemes
        urls += _expand(webdataset, pattern)
    if not urls:
        raise ConfigError("data.shards: an empty list of tars")
    for url in urls:
        if not url.startswith(PIPE) and not is_remote(url) and not Path(url).expanduser().is_file():
            raise ConfigError(f"data.shards: {url} is not there")
    return TarList(tuple(urls), remote or RemoteOptions())


def _expand(webdataset: Any, pattern: str) -> list[str]:
    # its "::" would separate patterns: commands keep theirs whole, URLs with it are refused before
    return [pattern] if "::" in pattern else list(webdataset.shardlists.expand_urls(pattern))


def open_shards(
    shards: str | Path | Sequence[str], *, allow_pipe: bool = False, remote: RemoteOptions | None = None
) -> Manifest | TarList:
    """What ``data.shards`` names: a folder or URL with an index, or tars without one."""
    if is_tar_list(shards):
        return expand_tars(shards, allow_pipe=allow_pipe, remote=remote)  # type: ignore[arg-type]  # no path
    return load_manifest(shards)  # type: ignore[arg-type]  # no list


def describe_order(tars: TarList) -> str:
    """What a user of tars without an index should know."""
    folder = tars.urls[0].rpartition("/")[0] or "."
    how = (
        "write the output of the commands to tars and run `mmcl shards index` on their folder"
        if tars.urls[0].startswith(PIPE)
        else f"`mmcl shards index {folder}` makes an index"
    )
    return redact(
        f"{len(tars.urls)} tars without an index are read one after the other: the order depends on the number of "
        f"workers, nothing is shuffled, and a resumed run reads again what it skips; {how}"
    )


def read_items(url: str, number: int, remote: RemoteOptions) -> Iterator[Item]:
    """The samples of one tar in their order, and a problem for each thing that cannot be used."""
    last: tuple[str, dict[str, bytes | memoryview]] | None = None
    name = redact(url)
    seen: set[str] = set()
    count = 0
    try:
        with _open(url, remote) as file:
            for key, extension, content in _members(file):
                if last is not None and key != last[0]:
                    yield _finish(url, number, count, *last, seen)
                    count, last = count + 1, None
                if last is None:
                    last = (key, {})
                    file.allowance = MAX_SAMPLE_BYTES
                last[1].setdefault(extension, content)
    except SampleError as error:
        yield Problem(f"{name}#{count}" + (f" ({last[0]})" if last else ""), error)
        return
    except (tarfile.TarError, EOFError, ValueError, OverflowError) as error:
        detail = str(error).partition(" @ ")[0] + "; "  # webdataset adds the name of the stream
        detail += f"the sample {last[0]} before it may be half" if last else "no sample before it"
        yield Problem(last[0] if last else f"{name}#{count}", SampleError("truncated_tar", f"{url}: {detail}"))
        return
    except FileNotFoundError:
        raise RunError(f"{url} is missing") from None
    except OSError as error:
        yield Problem(f"{name}#{count}", SampleError("unreadable", f"{url}: {error}"))
        return
    if last is not None:
        yield _finish(url, number, count, *last, seen)


def _finish(
    url: str, number: int, index: int, key: str, members: dict[str, bytes | memoryview], seen: set[str]
) -> Item:
    if key in seen:
        return Problem(key, SampleError("scattered", f"{url}: the files of the sample do not lie together"))
    seen.add(key)
    return RawSample(key, members, Source(number, index))


def _members(file: _Blocks) -> Iterator[tuple[str, str, bytes]]:
    """(key, extension, content) of each file of the tar that belongs to a sample."""
    from webdataset.tariterators import tar_file_iterator

    for member in tar_file_iterator(file, handler=_raise):
        info = tarfile.TarInfo(member["fname"])
        key, extension, why = split_name(info)
        if not why:
            yield key, extension, member["data"]
    if file.at_end or file.last_block.strip(b"\0"):
        # the iterator takes any block that it cannot read for the end
        raise tarfile.ReadError(
            "ends without an end mark" if file.at_end else f"no member header at byte {file.position - _BLOCK_BYTES}"
        )


def _raise(error: Exception) -> bool:
    raise error


class _Blocks:
    """A stream handed out block by block, so that it is known which block ended the tar, and in bounded memory."""

    def __init__(self, raw: IO[bytes] | Any, name: str) -> None:
        self._raw, self._name = raw, name
        self._buffer, self._start = b"", 0
        self.position = 0
        self.last_block = b""
        self.at_end = False
        self.allowance = MAX_SAMPLE_BYTES
        """bytes that may be read until the next sample begins"""

    def read(self, size: int = -1) -> bytes:
        """At most one block."""
        if self._start >= len(self._buffer):
            self._buffer, self._start = self._raw.read(1 << 20), 0
        block = self._buffer[self._start : self._start + _BLOCK_BYTES]
        while 0 < len(block) < _BLOCK_BYTES and (more := self._raw.read(1 << 20)):  # short reads of a pipe
            self._buffer, self._start = block + more, 0
            block = self._buffer[:_BLOCK_BYTES]
        if self.position == 0 and block[:2] in _PACKED:
            raise SampleError(
                "compressed", f"{self._name}: {_PACKED[block[:2]]}; unpack it to .tar, media do not shrink"
            )
        self._start += len(block)
        self.position += len(block)
        self.last_block, self.at_end = block, not block
        self.allowance -= len(block)
        if self.allowance < 0:
            raise SampleError("too_large", f"{self._name}: a sample holds over {MAX_SAMPLE_BYTES} bytes")
        return block


@contextlib.contextmanager
def _open(url: str, remote: RemoteOptions) -> Iterator[_Blocks]:
    if url.startswith(PIPE):
        with _Pipe(url[len(PIPE) :], remote.stall_seconds) as pipe:
            yield _Blocks(pipe, url)
            pipe.finish()
    elif is_remote(url):
        try:
            yield _Blocks(RemoteFile(url, options=remote), url)
        except ChangedError as error:
            raise SampleError("changed", str(error)) from None
    else:
        with Path(url).expanduser().open("rb") as file:
            yield _Blocks(file, url)


class _Pipe:
    """The output of a command; one that stands still is ended."""

    def __init__(self, command: str, stall_seconds: float) -> None:
        self._command, self._stall_seconds = command, stall_seconds
        # in a group of its own: what the shell started ends with it
        self._process = subprocess.Popen(
            command, shell=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, start_new_session=True
        )

    def __enter__(self) -> _Pipe:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()

    def read(self, size: int) -> bytes:
        assert self._process.stdout is not None
        handle = self._process.stdout.fileno()
        if not select.select([handle], [], [], self._stall_seconds)[0]:
            raise SampleError("unreadable", f"{PIPE}{self._command}: no byte in {self._stall_seconds:g} s")
        return os.read(handle, size)

    def finish(self) -> None:
        """Reads what is left, and how the command ended. Raises ``SampleError`` where it failed."""
        while self.read(1 << 20):
            pass
        code = self._process.wait()
        if code:
            raise SampleError("unreadable", f"{PIPE}{self._command}: ended with exit code {code}")
