"""Bytes of remote files through fsspec: one range at a time, tried again where that can help, each failure named."""

from __future__ import annotations

import asyncio
import http.client
import os
import random
import ssl
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, NoReturn
from urllib.parse import urlsplit

from mmcl.shards.http_range import (
    SLOWEST_BYTES_PER_SECOND,
    Answer,
    check_encoding,
    check_place,
    get_range,
)
from mmcl.types import ConfigError, RunError, SampleError, redact

FIRST_PAUSE_SECONDS = 0.1
MAX_PAUSE_SECONDS = 10.0

_TRANSPORT_ERRORS = {
    "aiohttp": ("ClientError",),
    "botocore.exceptions": ("BotoCoreError", "ClientError"),
    "gcsfs.retry": ("HttpError",),
    "httpx": ("HTTPError",),
    "huggingface_hub.errors": ("HfHubHTTPError",),
    "requests.exceptions": ("RequestException",),
}
"""what the libraries below fsspec raise beside ``OSError``; looked up only where they are loaded"""


@dataclass(frozen=True, slots=True)
class RemoteOptions:
    """How remote shards are read, in each process that reads them."""

    read_ahead_bytes: int = 256 << 20
    """asked for and not yet handed out, at most"""
    connections: int = 64
    retries: int = 5
    """further tries of a request that failed"""
    retry_seconds: float = 60.0
    """after which a request that keeps failing is given up"""
    stall_seconds: float = 20.0
    """without any byte, then a request counts as failed"""
    cache_dir: str | None = None
    cache_bytes: int = 64 << 30


@dataclass(frozen=True, slots=True)
class Fetched:
    """A range of a file, and what the answer said about the whole."""

    content: bytes | memoryview
    total_bytes: int | None = None
    """of the file; None: not told"""
    version: str = ""
    """the ETag; "": not told"""


def open_filesystem(url: str, *, connections: int = 64, stall_seconds: float = 20.0) -> Any:
    """The fsspec file system of a remote URL, of this process: none is taken through a fork.

    Raises ``ConfigError`` with the line that installs what is missing.
    """
    import fsspec

    scheme = urlsplit(url).scheme
    options: dict[str, Any] = {}
    if scheme == "s3":
        # botocore keeps ten connections unless told otherwise, and waits a minute for each byte
        limits = {"read_timeout": stall_seconds, "connect_timeout": stall_seconds}
        options["config_kwargs"] = {"max_pool_connections": max(64, connections), **limits}
    elif scheme in ("http", "https"):  # proxies of the environment, passwords of ~/.netrc
        options["client_kwargs"] = {"trust_env": True, **fsspec.config.conf.get(scheme, {}).get("client_kwargs", {})}
    try:
        return fsspec.filesystem(scheme, **options)
    except ImportError as error:
        raise ConfigError(f'{url}: {error}. pip install "mmcl[remote]"') from None


def fetch(
    url: str,
    start: int = 0,
    stop: int | None = None,
    *,
    max_bytes: int | None = None,
    options: RemoteOptions | None = None,
    pause: Callable[[float], Any] = time.sleep,
) -> Fetched:
    """Bytes ``start … stop − 1`` of a file, or to its end; ``pause`` waits between two tries.

    Of a whole file that holds more than ``max_bytes`` one byte more than these may be all that comes. Raises
    ``FileNotFoundError``, ``SampleError("unreadable")`` where trying again did not help or cannot,
    ``ChangedError`` where the file ends before ``stop``.
    """
    options = options or RemoteOptions()
    began = time.monotonic()
    for attempt in range(1, options.retries + 2):
        try:
            return _fetch_once(url, start, stop, max_bytes, options)
        except FileNotFoundError:
            raise
        except transport_errors() as error:
            status = _status(error)
            if status == 404:
                raise FileNotFoundError(url) from None
            if status == 416:
                raise ChangedError(f"{url} ends before byte {stop}") from None
            seconds = time.monotonic() - began
            # half of the pause is drawn: workers that failed together do not come back together
            waiting = min(FIRST_PAUSE_SECONDS * 2 ** (attempt - 1), MAX_PAUSE_SECONDS) * random.uniform(0.5, 1.0)
            hopeless = isinstance(error, (PermissionError, ssl.SSLCertVerificationError)) or (
                isinstance(getattr(error, "certificate_error", None), ssl.SSLCertVerificationError)
                or (status is not None and 400 <= status < 500 and status not in (408, 425, 429))
            )
            if hopeless or attempt > options.retries or seconds + waiting > options.retry_seconds:
                what = f"bytes {start}–{stop}" if stop is not None else "the file"
                raise SampleError(
                    "unreadable",
                    f"{url}: {what}, {attempt} {'try' if attempt == 1 else 'tries'} in {seconds:.1f} s: "
                    f"{_describe(error)}",
                ) from None
        pause(waiting)
    raise AssertionError("the last try returns or raises")


class ChangedError(RunError):
    """A file is not the one that was indexed."""


class ShortAnswerError(OSError):
    """Fewer or more bytes than were asked for."""


def _fetch_once(url: str, start: int, stop: int | None, max_bytes: int | None, options: RemoteOptions) -> Fetched:
    scheme = urlsplit(url).scheme
    is_http = scheme in ("http", "https")
    if is_http and stop is not None and _is_plain(os.getpid(), scheme):
        answer = get_range(url, start, stop, stall_seconds=options.stall_seconds)
        if answer is not None:
            return _whole(url, start, stop, _checked(url, stop, answer))
    filesystem = open_filesystem(url, connections=options.connections, stall_seconds=options.stall_seconds)
    end = stop if max_bytes is None else max_bytes + 1
    fetched: Fetched
    if is_http:
        fetched = _run(filesystem, _get_http(filesystem, url, start, stop, max_bytes, options), start, stop, options)
    elif scheme == "s3":
        fetched = _run(filesystem, _get_s3(filesystem, url, start, end), start, stop, options)
    elif filesystem.async_impl:
        limits = {} if end is None and start == 0 else {"start": start, "end": end}
        fetched = Fetched(_run(filesystem, filesystem._cat_file(url, **limits), start, stop, options))
    else:
        fetched = Fetched(filesystem.cat_file(url, start=start, end=end))
    return _whole(url, start, stop, fetched)


def _whole(url: str, start: int, stop: int | None, fetched: Fetched) -> Fetched:
    """What was fetched, if it is all that was asked for."""
    if stop is not None and len(fetched.content) != stop - start:
        total_bytes = fetched.total_bytes if answers_tell(url) else stat(url)[0]
        if total_bytes is not None and total_bytes < stop:
            raise ChangedError(f"{url} holds {total_bytes} bytes, byte {stop} was asked for")
        raise ShortAnswerError(f"{len(fetched.content)} bytes came, {stop - start} were asked for")
    return fetched


@cache
def _is_plain(pid: int, scheme: str) -> bool:
    """Whether fsspec is configured with nothing (headers, proxies, …) that its own client would have to send."""
    filesystem = open_filesystem(f"{scheme}://")
    return not filesystem.kwargs and filesystem.client_kwargs == {"trust_env": True}


def _checked(url: str, stop: int | None, answer: Answer) -> Fetched:
    """Refuses a server that knows no ranges, unless its answer shows that the file is too short for this one."""
    if answer.content is None:
        _refuse_whole(url, stop, answer.total_bytes)
    return Fetched(answer.content or memoryview(b""), answer.total_bytes, answer.version)


def _refuse_whole(url: str, stop: int | None, total_bytes: int | None) -> NoReturn:
    if total_bytes is not None and stop is not None and total_bytes < stop:
        raise ChangedError(f"{url} holds {total_bytes} bytes, byte {stop} was asked for")
    raise RunError(f"{url}: the server does not answer requests for a range of bytes, shards need that")


def _run(filesystem: Any, work: Any, start: int, stop: int | None, options: RemoteOptions) -> Any:
    """A coroutine in the loop of its file system; ended where it stands still."""
    size = 0 if stop is None else stop - start
    seconds = options.stall_seconds + size / SLOWEST_BYTES_PER_SECOND if stop is not None else None
    waiting = asyncio.wait_for(work, seconds)
    return asyncio.run_coroutine_threadsafe(waiting, filesystem.loop).result()


async def _get_http(
    filesystem: Any, url: str, start: int, stop: int | None, max_bytes: int | None, options: RemoteOptions
) -> Fetched:
    """A range with the headers of its answer, which say of every answer whether the file is still the same one."""
    import aiohttp

    headers = {"Accept-Encoding": "identity"}
    is_range = bool(start) or stop is not None
    if is_range:
        headers["Range"] = f"bytes={start}-{'' if stop is None else stop - 1}"
    stall = options.stall_seconds
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=stall, sock_read=stall)
    session = await filesystem.set_session()
    size = None if stop is None else stop - start
    limit = size if max_bytes is None else max_bytes
    request = session.get(
        filesystem.encode_url(url), headers=headers, timeout=timeout, read_bufsize=1 << 20, **filesystem.kwargs
    )
    # redirects and their handshakes have their time, headers that never end have not
    async with await asyncio.wait_for(request, 4 * stall) as answer:
        answer.raise_for_status()
        total = _total_bytes(answer.headers, answer.status)
        if size is not None and answer.status == 200 and (start or (total is None or total > size)):
            answer.close()
            _refuse_whole(url, stop, total)
        if is_range:
            check_encoding(url, answer.headers)
        if answer.status == 206:
            check_place(url, start, answer.headers.get("Content-Range", ""))
        content = await _read_up_to(answer.content, None if limit is None else limit + 1, stall)
        return Fetched(content, total, answer.headers.get("ETag", ""))


async def _read_up_to(stream: Any, max_bytes: int | None, stall_seconds: float) -> bytes:
    """What comes, if it does not come too slowly as a whole."""
    pieces, size, began = [], 0, time.monotonic()
    while piece := await stream.read(1 << 20 if max_bytes is None else min(1 << 20, max_bytes - size)):
        pieces.append(piece)
        size += len(piece)
        seconds = time.monotonic() - began
        if seconds > stall_seconds + size / SLOWEST_BYTES_PER_SECOND:
            raise TimeoutError(f"{size} bytes in {seconds:.1f} s")
    return b"".join(pieces)


async def _get_s3(filesystem: Any, url: str, start: int, end: int | None) -> Fetched:
    """As s3fs itself reads it, but with the ETag and the size that come with each answer."""
    bucket, key, version = filesystem.split_path(url)
    limits = {"Range": f"bytes={start}-{'' if end is None else end - 1}"} if start or end is not None else {}
    if version:
        limits["VersionId"] = version
    answer = await filesystem._call_s3("get_object", Bucket=bucket, Key=key, **limits)
    async with answer["Body"] as body:
        content = await body.read()
    told = answer.get("ContentRange", "").rpartition("/")[2] if limits else str(answer.get("ContentLength", ""))
    return Fetched(content, int(told) if told.isdecimal() else None, answer.get("ETag", ""))


def _total_bytes(headers: Any, status: int) -> int | None:
    """Of the whole file, as an answer says it."""
    told = headers.get("Content-Range", "").rpartition("/")[2] if status == 206 else headers.get("Content-Length", "")
    return int(told) if told.isdecimal() else None


def answers_tell(url: str) -> bool:
    """Whether every answer says how large the file is, and which version of it."""
    return urlsplit(url).scheme in ("http", "https", "s3")


def stat(url: str, *, options: RemoteOptions | None = None) -> tuple[int | None, str]:
    """Size in bytes and version of a file, as far as its server tells. Raises as ``fetch`` does."""
    if answers_tell(url):
        try:
            fetched = fetch(url, 0, 1, options=options)
        except ChangedError:  # it has no first byte
            return 0, ""
        return fetched.total_bytes, fetched.version
    filesystem = open_filesystem(url)
    try:
        filesystem.invalidate_cache()
        facts = filesystem.info(url)
    except FileNotFoundError:
        raise
    except transport_errors() as error:
        raise SampleError("unreadable", f"{url}: {_describe(error)}") from None
    return facts.get("size"), str(facts.get("ETag") or facts.get("etag") or "")


def transport_errors() -> tuple[type[BaseException], ...]:
    """What a file system raises where a transfer failed: nothing that a mistake in a program raises."""
    found: list[type[BaseException]] = [
        OSError,
        EOFError,
        asyncio.TimeoutError,
        TimeoutError,
        http.client.HTTPException,
    ]
    for module, names in _TRANSPORT_ERRORS.items():
        loaded = sys.modules.get(module)
        found += [getattr(loaded, name) for name in names if hasattr(loaded, name)]
    return tuple(found)


def _status(error: BaseException) -> int | None:
    """The HTTP status in an error, where there is one."""
    answer = getattr(error, "response", None)
    for holder in (error, answer):
        for name in ("status", "status_code", "code"):
            if isinstance(status := getattr(holder, name, None), int):
                return status
    answer = answer or getattr(error.__cause__, "response", None)  # s3fs raises its own over that of botocore
    status = answer.get("ResponseMetadata", {}).get("HTTPStatusCode") if isinstance(answer, dict) else None
    return status if isinstance(status, int) else None


def _describe(error: BaseException) -> str:
    return redact(f"{type(error).__name__} {error}".strip())[:300]


class Stopwatch:
    """A pause that ends early once it is told to stop."""

    def __init__(self) -> None:
        self._stop = threading.Event()

    def __call__(self, seconds: float) -> None:
        if self._stop.wait(seconds):
            raise ReadStoppedError("reading was stopped")

    def stop(self) -> None:
        """Ends all pauses, those to come too."""
        self._stop.set()

    @property
    def stopped(self) -> bool:
        """Whether it was told to."""
        return self._stop.is_set()


class ReadStoppedError(Exception):
    """Nobody waits for this read any more."""
