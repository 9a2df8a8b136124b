"""A remote file from its first byte to its last, as tar readers want it: pieces are fetched ahead, in order."""

from __future__ import annotations

import io
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from mmcl.shards.remote import ChangedError, RemoteOptions, fetch, stat
from mmcl.types import RunError, SampleError

PIECE_BYTES = 8 << 20
AHEAD = 4
"""pieces"""


class RemoteFile(io.RawIOBase):
    """Read forward; it may be set back within the last two pieces.

    ``watch`` sees every byte once, in order, also those that were passed over. Raises ``SampleError`` where a piece
    cannot be read, ``ChangedError`` where the file changes meanwhile, ``FileNotFoundError``.
    """

    def __init__(
        self,
        url: str,
        *,
        options: RemoteOptions | None = None,
        watch: Callable[[bytes | memoryview], object] | None = None,
    ) -> None:
        self.url, self._options, self._watch = url, options or RemoteOptions(), watch
        # before anything can fail: a file is closed also where it was never opened
        self._pool = ThreadPoolExecutor(AHEAD, thread_name_prefix="remote-file")
        size, self._version = stat(url, options=self._options)
        if size is None:
            raise RunError(f"{url}: the server does not say how large the file is")
        self.num_bytes = size
        self._position = 0
        self._pieces: dict[int, bytes | memoryview] = {}
        self._next = 0
        self._coming: deque[Future[bytes | memoryview]] = deque()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = offset + (0, self._position, self.num_bytes)[whence]
        return self._position

    def read(self, size: int = -1) -> bytes:
        """Up to ``size`` bytes; b"" at the end."""
        stop = self.num_bytes if size < 0 else min(self._position + size, self.num_bytes)
        parts = []
        while self._position < stop:
            number, start = divmod(self._position, PIECE_BYTES)
            part = self._piece(number)[start : start + stop - self._position]
            parts.append(part)
            self._position += len(part)
        return b"".join(parts)

    def drain(self) -> None:
        """Fetches what is left."""
        if self.num_bytes:
            self._piece((self.num_bytes - 1) // PIECE_BYTES)

    def close(self) -> None:
        if not self.closed:
            self._pool.shutdown(wait=False, cancel_futures=True)
        super().close()

    def _piece(self, number: int) -> bytes | memoryview:
        count = -(-self.num_bytes // PIECE_BYTES)
        while self._next <= number:
            while len(self._coming) < AHEAD and self._next + len(self._coming) < count:
                self._coming.append(self._pool.submit(self._fetch, self._next + len(self._coming)))
            content = self._coming.popleft().result()
            if self._watch is not None:
                self._watch(content)
            self._pieces[self._next] = content
            self._pieces.pop(self._next - 2, None)
            self._next += 1
        if number not in self._pieces:
            raise SampleError("unreadable", f"{self.url}: byte {number * PIECE_BYTES} was passed already")
        return self._pieces[number]

    def _fetch(self, number: int) -> bytes | memoryview:
        start, stop = number * PIECE_BYTES, min((number + 1) * PIECE_BYTES, self.num_bytes)
        fetched = fetch(self.url, start, stop, options=self._options)
        if fetched.total_bytes not in (None, self.num_bytes) or fetched.version not in ("", self._version):
            raise ChangedError(f"{self.url} changed while it was read")
        return fetched.content
