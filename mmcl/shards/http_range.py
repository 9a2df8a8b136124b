"""Ranges over HTTP on kept connections, one per thread, straight into the memory that the samples are read from.

fsspec's own client copies every byte three times, in one thread: beside this it reaches half to three quarters of what
a server sends (measured, ``tools/bench/loader_remote.py``). What is out of the ordinary is left to it.
"""

from __future__ import annotations

import http.client
import os
import re
import socket
import ssl
import struct
import sys
import threading
import time
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from urllib.parse import SplitResult, quote, urlsplit

import numpy as np

from mmcl.types import ConfigError, RunError

SLOWEST_BYTES_PER_SECOND = 64 << 10
"""a transfer below this counts as one that stands still"""

_HEAD_BYTES, _MAX_HEAD_BYTES = 4096, 64 << 10
_FIELDS = re.compile(
    rb"^(content-(?:length|range|encoding)|transfer-encoding|etag|connection)[ \t]*:[ \t]*(.*?)[ \t]*\r?$", re.I | re.M
)
_ODD_SECONDS = 60.0
"""for which a host that answered oddly is left to fsspec: asking twice for every range would cost more"""
_connections = threading.local()
_odd_hosts: dict[tuple[str, str], float] = {}


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
    """Bytes ``start … stop − 1``; None where this is a case for fsspec: a redirect, a password, a proxy, chunks.

    Raises ``StatusError``, ``OSError`` (a ``TimeoutError`` after ``stall_seconds`` without a byte, or where all comes
    too slowly), ``http.client.HTTPException`` on what is no HTTP, ``ConfigError`` on an impossible port.
    """
    parts, target = _target(url)
    if parts.username is not None or parts.hostname is None or not parts.netloc.isascii():
        return None
    host = parts.scheme, parts.netloc
    if uses_proxy(*host) or _odd_hosts.get(host, 0.0) > time.monotonic():
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
        answer = _read(connection, head, url, start, stop, stall_seconds)
    finally:
        if connection.is_free:
            _connections.by_host[host] = connection
        else:
            connection.close()
    if answer is None:
        _odd_hosts[host] = time.monotonic() + _ODD_SECONDS
    return answer


@lru_cache(maxsize=256)
def uses_proxy(scheme: str, netloc: str) -> bool:
    """Whether the environment (``http_proxy``, ``https_proxy``, ``all_proxy``, ``no_proxy``) has one for this host."""
    proxies = urllib.request.getproxies()
    return bool(proxies.get(scheme) or proxies.get("all")) and not urllib.request.proxy_bypass(netloc)


def check_place(url: str, start: int, told: str) -> None:
    """Refuses what a 206 says of itself, where that is another place than was asked for, or nothing."""
    found = re.match(r"bytes +(\d+)-", told, re.I)
    if found is None:
        raise http.client.HTTPException("a part of the file without Content-Range, it may be any")
    if int(found[1]) != start:
        raise http.client.HTTPException(f"bytes from {int(found[1])} on came, {start} was asked for")


def check_encoding(url: str, headers: Mapping[str, str]) -> None:
    """Refuses a range of something packed. Raises ``RunError``."""
    encoding = next((value for name, value in headers.items() if name.lower() == "content-encoding"), "identity")
    if encoding.lower() not in ("", "identity"):
        raise RunError(
            f"{url}: the server packs what it sends (Content-Encoding: {encoding[:40]}) though asked not to: ranges of "
            "that are not ranges of the file"
        )


@lru_cache(maxsize=4096)
def _target(url: str) -> tuple[SplitResult, str]:
    """The parts of a URL, and what of it is sent."""
    parts = urlsplit(url)
    path = quote(parts.path or "/", safe="/%:@!$&'()*+,;=~-._")
    query = quote(parts.query, safe="/?%:@!$&'()*+,;=~-._")
    return parts, path + (f"?{query}" if query else "")


def _read(connection: _Connection, head: _Head, url: str, start: int, stop: int, stall_seconds: float) -> Answer | None:
    size, headers = stop - start, head.headers
    if head.status == 401:
        return None  # fsspec looks into ~/.netrc
    if head.status >= 400:
        raise StatusError(head.status, head.reason)
    length = headers.get("content-length", "")
    if head.status not in (200, 206) or "transfer-encoding" in headers or not length.isdecimal():
        return None
    check_encoding(url, headers)
    version = headers.get("etag", "")
    total: int | None
    if head.status == 200:
        total = int(length)
        if start or total > size:
            return Answer(None, total, version)
    else:
        told = headers.get("content-range", "")
        check_place(url, start, told)
        told = told.rpartition("/")[2]
        total = int(told) if told.isdecimal() else None
    if int(length) > size:
        raise http.client.HTTPException(f"{int(length)} bytes are announced, {size} were asked for")
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
    """those that matter, by name, in lower case"""


class _Connection:
    """A socket on which one request after the other is made."""

    def __init__(self, parts: SplitResult, stall_seconds: float) -> None:
        secure = parts.scheme == "https"
        try:
            port = parts.port
        except ValueError as error:
            raise ConfigError(f"{parts.scheme}://{parts.netloc}: {error}") from None
        address = (parts.hostname or "", (443 if secure else 80) if port is None else port)
        self._socket = socket.create_connection(address, timeout=stall_seconds)
        try:
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if secure:
                self._socket = _tls().wrap_socket(self._socket, server_hostname=parts.hostname)
        except BaseException:
            self._socket.close()
            raise
        # the kernel itself waits for all of a range, or until nothing more comes: one call, without Python in between
        self._waits_for_all = not secure and sys.platform == "linux"
        self._stall_seconds = -1.0
        self._rest = b""
        self.is_free = False
        """nothing of an answer is left, the next may be asked for"""

    def ask(self, request: bytes, stall_seconds: float) -> _Head:
        """Sends a request; the head of the answer."""
        self.is_free = False
        latest = time.monotonic() + 2 * stall_seconds
        try:
            self._limit(stall_seconds)
            self._socket.sendall(request)
            content = b""
            while (end := content.find(b"\r\n\r\n")) < 0:
                if len(content) > _MAX_HEAD_BYTES:
                    raise http.client.HTTPException(f"over {_MAX_HEAD_BYTES} bytes of headers")
                if content and time.monotonic() > latest:
                    raise TimeoutError(f"headers without an end in {2 * stall_seconds:g} s")
                received = self._socket.recv(_HEAD_BYTES)
                if not received:
                    raise ConnectionResetError("closed without an answer")
                content += received
            self._rest = content[end + 4 :]
            return _parse_head(content[:end])
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
        if stall_seconds == self._stall_seconds:
            return
        self._stall_seconds = stall_seconds
        if not self._waits_for_all:
            self._socket.settimeout(stall_seconds)
            return
        limit = struct.pack("ll", int(stall_seconds), int(stall_seconds % 1 * 1e6))
        self._socket.settimeout(None)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)


def _parse_head(content: bytes) -> _Head:
    first, _, fields = content.partition(b"\r\n")
    version, status, reason = (first.decode("latin-1") + "  ").split(" ", 2)
    if not version.startswith("HTTP/") or not status.isdecimal():
        raise http.client.BadStatusLine(first[:100].decode("latin-1"))
    headers = {name.lower().decode(): value.decode("latin-1") for name, value in _FIELDS.findall(fields)}
    return _Head(version, int(status), reason.strip(), headers)


def _kept(parts: SplitResult) -> _Connection | None:
    """The free connection of this thread and process: none is shared, and none is taken through a fork."""
    if getattr(_connections, "pid", None) != os.getpid():
        _connections.pid, _connections.by_host = os.getpid(), {}
    connection: _Connection | None = _connections.by_host.pop((parts.scheme, parts.netloc), None)
    return connection


@cache
def _tls() -> ssl.SSLContext:
    return ssl.create_default_context()
