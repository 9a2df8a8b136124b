"""Ranges over HTTP on kept connections, one per thread, straight into the memory that the samples are read from.

fsspec's own client copies every byte three times, in one thread: beside this it reaches half to three quarters of what
a server sends (measured, ``tools/bench/loader_remote.py``). What is out of the ordinary is left to it.
"""

from __future__ import annotations

import http.client
import os
import threading
import time
from dataclasses import dataclass
from functools import lru_cache
from urllib.parse import SplitResult, quote, urlsplit

import numpy as np

SLOWEST_BYTES_PER_SECOND = 64 << 10
"""a transfer below this counts as one that stands still"""

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
    ``http.client.HTTPException``.
    """
    parts, target = _target(url)
    if parts.username is not None or parts.hostname is None:
        return None
    headers = {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity", "User-Agent": "mmcl"}
    for is_kept in (True, False):
        connection = _connection(parts, stall_seconds, kept=is_kept)
        try:
            connection.request("GET", target, headers=headers)
            answer = connection.getresponse()
            break
        except (http.client.RemoteDisconnected, ConnectionError):
            _drop(parts)
            # a kept connection may have been closed by the server meanwhile: that is no failure
            if not is_kept or connection.is_new:
                raise
        except BaseException:
            _drop(parts)
            raise
    try:
        return _read(answer, start, stop, stall_seconds)
    finally:
        if not answer.isclosed():  # something is left of it
            _drop(parts)
        connection.is_new = False


@lru_cache(maxsize=4096)
def _target(url: str) -> tuple[SplitResult, str]:
    """The parts of a URL, and what of it is sent."""
    parts = urlsplit(url)
    path = quote(parts.path or "/", safe="/%:@!$&'()*+,;=~-._")
    return parts, path + (f"?{parts.query}" if parts.query else "")


def _read(answer: http.client.HTTPResponse, start: int, stop: int, stall_seconds: float) -> Answer | None:
    size = stop - start
    if 300 <= answer.status < 400:
        return None
    if answer.status >= 400:
        raise StatusError(answer.status, answer.reason)
    version = answer.headers.get("ETag", "")
    told = answer.headers.get("Content-Range", "").rpartition("/")[2]
    total = int(told) if answer.status == 206 and told.isdecimal() else None
    if answer.status == 200:
        total = answer.length
        if start or total is None or total > size:
            return Answer(None, total, version)
    if answer.length is None or answer.length > size:
        return None
    # not yet touched: what is received is the first that is written there
    content = memoryview(np.empty(answer.length, np.uint8))  # type: ignore[arg-type]
    latest = time.monotonic() + stall_seconds + size / SLOWEST_BYTES_PER_SECOND
    position = 0
    while position < len(content) and (count := answer.readinto(content[position:])):
        position += count
        if time.monotonic() > latest:
            raise TimeoutError(f"{position} of {len(content)} bytes in {stall_seconds:g} s and more")
    if position == len(content):
        answer.read()  # says that it was the last of it
    return Answer(content[:position], total, version)


class _Connection(http.client.HTTPConnection):
    is_new = True


class _SecureConnection(http.client.HTTPSConnection):
    is_new = True


def _connection(parts: SplitResult, stall_seconds: float, *, kept: bool) -> _Connection | _SecureConnection:
    """Of this thread and process: none is shared, and none is taken through a fork."""
    if getattr(_connections, "pid", None) != os.getpid():
        _connections.pid, _connections.by_host = os.getpid(), {}
    found: _Connection | _SecureConnection | None = _connections.by_host.get((parts.scheme, parts.netloc))
    if found is None or not kept:
        kind = _SecureConnection if parts.scheme == "https" else _Connection
        assert parts.hostname is not None
        found = kind(parts.hostname, parts.port, timeout=stall_seconds)
        _connections.by_host[parts.scheme, parts.netloc] = found
    elif found.sock is not None:
        found.sock.settimeout(stall_seconds)
    return found


def _drop(parts: SplitResult) -> None:
    connection = _connections.by_host.pop((parts.scheme, parts.netloc), None)
    if connection is not None:
        connection.close()
