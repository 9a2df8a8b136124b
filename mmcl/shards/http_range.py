"""Ranges over HTTP on kept connections, one per thread, straight into the memory that the samples are read from.

fsspec's own client copies every byte three times, in one thread: beside this it reaches half to three quarters of what
a server sends (measured, ``tools/bench/loader_remote.py``). What is out of the ordinary is left to it.
"""

from __future__ import annotations

import http.client
import os
import socket
import ssl
import struct
import sys
import threading
import time
from dataclasses import dataclass
from functools import cache, lru_cache
from urllib.parse import SplitResult, quote, urlsplit

import numpy as np

SLOWEST_BYTES_PER_SECOND = 64 << 10
"""a transfer below this counts as one that stands still"""

_HEAD_BYTES, _MAX_HEAD_BYTES = 4096, 64 << 10
_connections = threading.local()


class StatusError(OSError):
    """An answer that is an error."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(f"HTTP {status} {reason}".strip())
        self.status = status


@dataclass(frozen=True, slots=True)
class Answer:
    """What a server said to a request for a range."""

    content: memoryview | None
    """None: it does not answer requests for ranges"""
    total_bytes: int | None
    version: str


def get_range(url: str, start: int, stop: int, *, stall_seconds: float) -> Answer | None:
    """Bytes ``start … stop − 1``; None where this is a case for fsspec: a redirect, a password, a transfer in chunks.

    Raises ``StatusError``, ``OSError`` (a ``TimeoutError`` after ``stall_seconds`` without a byte),
    ``http.client.HTTPException`` on what is no HTTP.
    """
    parts, target = _target(url)
    if parts.username is not None or parts.hostname is None or not parts.netloc.isascii():
        return None
    request = (
        f"GET {target} HTTP/1.1\r\nHost: {parts.netloc}\r\nRange: bytes={start}-{stop - 1}\r\n"
        "Accept-Encoding: identity\r\nUser-Agent: mmcl\r\n\r\n"
    ).encode("ascii")
    connection = _kept(parts)
    try:
        head = connection.ask(request, stall_seconds) if connection is not None else None
    except TimeoutError:
        raise
    except OSError:
        head = None  # the server closed it meanwhile: that is no failure
    if connection is None or head is None:
        connection = _Connection(parts, stall_seconds)
        head = connection.ask(request, stall_seconds)
    try:
        answer = _read(connection, head, start, stop, stall_seconds)
    finally:
        if connection.is_free:
            _connections.by_host[parts.scheme, parts.netloc] = connection
        else:
            connection.close()
    return answer


@lru_cache(maxsize=4096)
def _target(url: str) -> tuple[SplitResult, str]:
    """The parts of a URL, and what of it is sent."""
    parts = urlsplit(url)
    path = quote(parts.path or "/", safe="/%:@!$&'()*+,;=~-._")
    query = quote(parts.query, safe="/?%:@!$&'()*+,;=~-._")
    return parts, path + (f"?{query}" if query else "")


def _read(connection: _Connection, head: _Head, start: int, stop: int, stall_seconds: float) -> Answer | None:
    size, headers = stop - start, head.headers
    if head.status >= 400:
        raise StatusError(head.status, head.reason)
    length = headers.get("content-length", "")
    odd = "transfer-encoding" in headers or headers.get("content-encoding", "identity") != "identity"
    if head.status not in (200, 206) or odd or not length.isdecimal():
        return None
    version = headers.get("etag", "")
    told = headers.get("content-range", "").rpartition("/")[2]
    total = int(told) if head.status == 206 and told.isdecimal() else None
    if head.status == 200:
        total = int(length)
        if start or total > size:
            return Answer(None, total, version)
    if int(length) > size:
        return None
    # not yet touched: what is received is the first that is written there
    content = memoryview(np.empty(int(length), np.uint8))  # type: ignore[arg-type]
    connection.read_into(content, stall_seconds)
    connection.is_free = headers.get("connection", "").lower() != "close" and head.version == "HTTP/1.1"
    return Answer(content, total, version)


@dataclass(frozen=True, slots=True)
class _Head:
    version: str
    status: int
    reason: str
    headers: dict[str, str]
    """by name, in lower case"""


class _Connection:
    """A socket on which one request after the other is made."""

    def __init__(self, parts: SplitResult, stall_seconds: float) -> None:
        secure = parts.scheme == "https"
        address = (parts.hostname or "", parts.port or (443 if secure else 80))
        self._socket = socket.create_connection(address, timeout=stall_seconds)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if secure:
            self._socket = _tls().wrap_socket(self._socket, server_hostname=parts.hostname)
        # the kernel itself waits for all of a range, or until nothing more comes: one call, without Python in between
        self._waits_for_all = not secure and sys.platform == "linux"
        self._rest = b""
        self.is_free = False
        """nothing of an answer is left, the next may be asked for"""

    def ask(self, request: bytes, stall_seconds: float) -> _Head:
        """Sends a request; the head of the answer."""
        self.is_free = False
        try:
            self._limit(stall_seconds)
            self._socket.sendall(request)
            content = b""
            while (end := content.find(b"\r\n\r\n")) < 0:
                if len(content) > _MAX_HEAD_BYTES:
                    raise http.client.HTTPException(f"over {_MAX_HEAD_BYTES} bytes of headers")
                received = self._socket.recv(_HEAD_BYTES)
                if not received:
                    raise ConnectionResetError("closed without an answer")
                content += received
            self._rest = content[end + 4 :]
            first, *lines = content[:end].decode("latin-1").split("\r\n")
            version, status, reason = (first + "  ").split(" ", 2)
            if not version.startswith("HTTP/") or not status.isdecimal():
                raise http.client.BadStatusLine(first[:100])
            pairs = (line.partition(":") for line in lines)
            return _Head(
                version, int(status), reason.strip(), {name.lower(): value.strip() for name, _, value in pairs}
            )
        except BlockingIOError:
            self.close()
            raise TimeoutError(f"no byte in {stall_seconds:g} s") from None
        except BaseException:
            self.close()
            raise

    def read_into(self, content: memoryview, stall_seconds: float) -> None:
        """What follows a head, to the last byte of ``content``."""
        latest = time.monotonic() + stall_seconds + len(content) / SLOWEST_BYTES_PER_SECOND
        position = len(self._rest)
        flags = socket.MSG_WAITALL if self._waits_for_all else 0
        try:
            if position > len(content):
                raise http.client.HTTPException(f"more than the {len(content)} bytes that were announced")
            content[:position] = self._rest
            while position < len(content):
                count = self._socket.recv_into(content[position:], 0, flags)
                if not count:
                    raise ConnectionResetError(f"closed after {position} of {len(content)} bytes")
                position += count
                if position < len(content) and time.monotonic() > latest:
                    raise TimeoutError(f"{position} of {len(content)} bytes in {stall_seconds:g} s and more")
        except BlockingIOError:
            self.close()
            raise TimeoutError(f"no byte in {stall_seconds:g} s") from None
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._socket.close()

    def _limit(self, stall_seconds: float) -> None:
        if not self._waits_for_all:
            self._socket.settimeout(stall_seconds)
            return
        limit = struct.pack("ll", int(stall_seconds), int(stall_seconds % 1 * 1e6))
        self._socket.settimeout(None)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)


def _kept(parts: SplitResult) -> _Connection | None:
    """The free connection of this thread and process: none is shared, and none is taken through a fork."""
    if getattr(_connections, "pid", None) != os.getpid():
        _connections.pid, _connections.by_host = os.getpid(), {}
    connection: _Connection | None = _connections.by_host.pop((parts.scheme, parts.netloc), None)
    return connection


@cache
def _tls() -> ssl.SSLContext:
    return ssl.create_default_context()
