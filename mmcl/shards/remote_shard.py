"""One remote tar: which ranges hold a sample, and whether what came is what was indexed.

A sample is fetched from the tar header before its first file to the end of its last, so every answer carries the names
and sizes that the tar gives its files: a tar that was changed or shifted since it was indexed does not pass.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import Any, TypeAlias

from mmcl.shards.cache import RangeCache
from mmcl.shards.member_index import Member, ShardIndex
from mmcl.shards.remote import ChangedError, RemoteOptions, answers_tell, fetch, stat
from mmcl.types import SampleError

Span: TypeAlias = tuple[int, int]
"""bytes ``[start, stop)`` of a tar"""

JOINED_GAP_BYTES = 256 << 10
JOINED_BYTES = 8 << 20
"""of a request for several samples, at most: the first of them is not kept waiting for all"""
RECHECK_SECONDS = 60.0
"""after which a store whose answers do not tell the version of the file (gs, hf) is asked for it again"""
_HEADER_BYTES = 512


def join_spans(spans: Iterable[Span], *, spare_bytes: int = 1 << 62) -> list[list[Span]]:
    """Spans that one request may cover, each group ascending.

    Two are joined where at most 256 KiB lie between them; what lies between never exceeds what is wanted of a request,
    nor ``spare_bytes`` in all.
    """
    groups: list[list[Span]] = []
    first = last = wanted = between = 0
    for start, stop in sorted(spans):
        gap = max(0, start - last)
        size = stop - max(start, last if groups else start)
        if (
            groups
            and gap <= min(JOINED_GAP_BYTES, spare_bytes)
            and between + gap <= wanted + size
            and max(last, stop) - first <= JOINED_BYTES
        ):
            groups[-1].append((start, stop))
            last, wanted, between, spare_bytes = (
                max(last, stop),
                wanted + max(0, size),
                between + gap,
                spare_bytes - gap,
            )
        else:
            groups.append([(start, stop)])
            first, last, wanted, between = start, stop, stop - start, 0
    return groups


def group_span(group: Sequence[Span]) -> Span:
    """What a request for a group covers."""
    return group[0][0], max(stop for _, stop in group)


class RemoteShard:
    """A remote tar and its member index."""

    def __init__(
        self, url: str, index: ShardIndex, *, checksum: str = "", version: str = "", options: RemoteOptions
    ) -> None:
        self.index, self.url, self.options = index, url, options
        self.version = version
        """the ETag of the first answer; "": not told yet"""
        self._checksum = checksum
        self._lock = threading.Lock()
        self._checked_at = -RECHECK_SECONDS
        self._tells = answers_tell(url)

    def spans(self, index: int, members: Sequence[Member] | None = None) -> list[Span]:
        """Where a sample lies with its headers: one span, unless its files lie far apart."""
        spans = [
            (max(0, offset - _HEADER_BYTES), offset + num_bytes)
            for _, offset, num_bytes in members or self.index.members(index)
        ]
        # as tars are written: one file after the other, nothing between them but what fills the last block
        if spans and all(0 <= after[0] - before[1] < _HEADER_BYTES for before, after in itertools.pairwise(spans)):
            joined = (spans[0][0], spans[-1][1])
            if joined[1] - joined[0] <= JOINED_BYTES:
                return [joined]
        return [group_span(group) for group in join_spans(spans)]

    def read(self, index: int) -> dict[str, memoryview]:
        """The files of a sample by their extensions, fetched now."""
        spans = self.spans(index)
        return self.unpack(index, spans, self.fetch(spans))

    def fetch(
        self, spans: Sequence[Span], *, pause: Callable[[float], Any] = time.sleep
    ) -> list[memoryview | SampleError]:
        """Each of the spans, or why it could not be had; neighbours with one request, those in the cache with none.

        Raises ``RunError`` where the file is gone or another one than was indexed.
        """
        found: dict[Span, memoryview | SampleError] = {}
        for span in dict.fromkeys(spans):
            kept = self._cache.get(self._name(span)) if self._cache is not None else None
            if kept is not None and len(kept) == span[1] - span[0]:
                found[span] = memoryview(kept)
        for group in join_spans(span for span in dict.fromkeys(spans) if span not in found):
            pieces = self._try_group(group, pause)
            if len(group) > 1 and isinstance(pieces[0], SampleError):
                # what cannot be read of one sample is not held against its neighbours
                pieces = [self._try_group([span], pause)[0] for span in group]
            found.update(zip(group, pieces, strict=True))
        return [found[span] for span in spans]

    def unpack(
        self, index: int, spans: Sequence[Span], pieces: Sequence[memoryview | SampleError]
    ) -> dict[str, memoryview]:
        """The files of a sample by their extensions, out of its spans.

        Raises ``SampleError`` where a span could not be had or holds something else, ``RunError`` where that is because
        the file is not the one that was indexed.
        """
        files, key = {}, self.index.key(index)
        for member in self.index.members(index):
            extension, offset, num_bytes = member
            at = 0
            while not (spans[at][0] <= offset and offset + num_bytes <= spans[at][1]):
                at += 1
            piece = pieces[at]
            if isinstance(piece, SampleError):
                raise SampleError(piece.reason, piece.detail)
            where = offset - spans[at][0]
            problem = _header_problem(piece[max(0, where - _HEADER_BYTES) : where], f"{key}.{extension}", member)
            if problem:
                if self._cache is not None:  # it would be found there again, also once the file is right
                    self._cache.drop(self._name(spans[at]))
                self.check_file()
                raise SampleError("changed", f"{self.url}: byte {offset}: {problem}")
            files[extension] = piece[where : where + num_bytes]
        return files

    def _try_group(self, group: Sequence[Span], pause: Callable[[float], Any]) -> Sequence[memoryview | SampleError]:
        """Each span of a group by one request; or, of each, why it failed."""
        first, last = group_span(group)
        content: bytes | memoryview = b""
        if first < last:
            try:
                fetched = fetch(self.url, first, last, options=self.options, pause=pause)
                if not self._tells and time.monotonic() - self._checked_at > RECHECK_SECONDS:
                    self.check_file()
            except FileNotFoundError:
                raise ChangedError(f"{self.url} is missing") from None
            except SampleError as error:
                return [error] * len(group)
            self._check(fetched.total_bytes, fetched.version)
            content = fetched.content
        pieces = [memoryview(content)[start - first : stop - first] for start, stop in group]
        if self._cache is not None:
            for span, piece in zip(group, pieces, strict=True):
                self._cache.put(self._name(span), piece)
        return pieces

    def _check(self, total_bytes: int | None, version: str) -> None:
        """Every answer is of the file that was indexed, and of the one that answered first."""
        hint = "run `mmcl shards index` on its folder again"
        if total_bytes is not None and total_bytes != self.index.tar_bytes:
            raise ChangedError(
                f"{self.url} holds {total_bytes} bytes, it was indexed with {self.index.tar_bytes}: {hint}"
            )
        with self._lock:
            self.version = self.version or version
            if version and version != self.version:
                raise ChangedError(f"{self.url} changed while it was read (ETag {self.version} → {version}): {hint}")

    def check_file(self) -> None:
        """Asks for size and version alone. Raises ``ChangedError``, ``SampleError``."""
        self._checked_at = time.monotonic()
        try:
            self._check(*stat(self.url, options=self.options))
        except FileNotFoundError:
            raise ChangedError(f"{self.url} is missing") from None

    @cached_property
    def _cache(self) -> RangeCache | None:
        folder = self.options.cache_dir
        return None if folder is None else RangeCache(folder, self.options.cache_bytes)

    def _name(self, span: Span) -> str:
        return f"{self.url} {self.index.tar_bytes} {self._checksum} {span[0]} {span[1]}"


def _header_problem(block: memoryview, name: str, member: Member) -> str:
    """What in a tar header does not fit to the member that the index has there; "": all does."""
    if len(block) < _HEADER_BYTES:
        return "no room for a tar header"
    raw = bytes(block)
    try:
        told = int(raw[148:156].strip(b" \0") or b"x", 8)
        size = int(raw[124:136].strip(b" \0") or b"0", 8) if raw[124] < 128 else int.from_bytes(raw[125:136], "big")
    except ValueError:
        return "no tar header"
    if told != sum(raw) - sum(raw[148:156]) + 8 * 32:
        return "no tar header"
    if size != member.num_bytes:
        return f"the tar has a file of {size} bytes there, the index one of {member.num_bytes}"
    wanted = name.encode() if name.isascii() else b""
    if raw.startswith(wanted + b"\0") and not raw[345] and wanted:
        return ""
    prefix, base = (raw[a:b].split(b"\0")[0] for a, b in ((345, 500), (0, 100)))
    found = (prefix + b"/" + base if prefix and raw[257:262] == b"ustar" else base).removeprefix(b"./")
    # longer names, and those of other letters, are spelt out in a header before this one
    if wanted and len(name) < 98 and found.lower() != wanted.lower():
        return f"the tar has {found.decode('utf-8', 'replace')!r} there, the index {name!r}"
    return ""
