"""A server whose every answer is written byte by byte: what HTTP allows, and what it does not."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

CONTENT = bytes(range(256)) * 40


@dataclass
class RawServer:
    """``answer`` gives the bytes for the head of a request; a list of them is sent in pieces, 50 ms apart."""

    answer: Callable[[str], bytes | list[bytes]]
    port: int = 0
    heads: list[str] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


def wanted(head: str) -> tuple[int, int]:
    """[start, stop) of CONTENT that a request asks for."""
    lines = [line for line in head.lower().split("\r\n") if line.startswith("range: bytes=")]
    if not lines:
        return 0, len(CONTENT)
    first, _, last = lines[0].removeprefix("range: bytes=").partition("-")
    return int(first), int(last) + 1 if last else len(CONTENT)


def partial(head: str, *fields: str, shift: int = 0, length: int | None = None, place: bool = True) -> bytes:
    """A 206, right but for what is asked to be wrong."""
    start, stop = wanted(head)
    body = CONTENT[start + shift : stop + shift]
    lines = ["HTTP/1.1 206 Partial Content", f"Content-Length: {len(body) if length is None else length}", *fields]
    if place:
        lines.append(f"Content-Range: bytes {start + shift}-{stop + shift - 1}/{len(CONTENT)}")
    return "\r\n".join([*lines, "", ""]).encode() + body


@contextlib.contextmanager
def raw_server(
    answer: Callable[[str], bytes | list[bytes]], *, certificate: Path | None = None, host: str = "127.0.0.1"
) -> Iterator[RawServer]:
    """Serves until the context ends; over TLS where there is a certificate (with its key)."""
    listener = socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    server = RawServer(answer, listener.getsockname()[1])
    context = None
    if certificate is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
    ended = threading.Event()

    def talk(connection: socket.socket) -> None:
        with contextlib.suppress(OSError):
            connection.settimeout(10)
            if context is not None:
                connection = context.wrap_socket(connection, server_side=True)
            with connection, connection.makefile("rb") as lines:
                while not ended.is_set():
                    head = b""
                    while (line := lines.readline()).strip():
                        head += line
                    if not head:
                        return
                    server.heads.append(head.decode())
                    pieces = server.answer(head.decode())
                    for piece in [pieces] if isinstance(pieces, bytes) else pieces:
                        connection.sendall(piece)
                        if not isinstance(pieces, bytes):
                            time.sleep(0.05)
                        if ended.is_set():
                            return

    def listen() -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=talk, args=(listener.accept()[0],), daemon=True).start()

    threading.Thread(target=listen, daemon=True).start()
    try:
        yield server
    finally:
        ended.set()
        listener.close()
