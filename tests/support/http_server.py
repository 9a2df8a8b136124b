"""A file server on the loopback interface that counts what it sends, and fails as servers do."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

Span = tuple[int, int]


@dataclass
class FileServer:
    """Serves ``root``; ``fault`` says of each request (path, span, how many times it was asked) what goes wrong."""

    root: Path
    url: str = ""
    with_etag: bool = True
    with_ranges: bool = True
    fault: Callable[[str, Span, int], str] = lambda path, span, count: ""
    requests: list[tuple[str, Span]] = field(default_factory=list)
    asked: Counter[tuple[str, Span]] = field(default_factory=Counter)
    bytes_sent: int = 0
    connections: set[tuple[str, int]] = field(default_factory=set)
    release: threading.Event = field(default_factory=threading.Event)
    """lets requests that stand still go"""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def spans(self, suffix: str = ".tar") -> list[Span]:
        return [span for path, span in self.requests if path.endswith(suffix)]

    def clear(self) -> None:
        with self.lock:
            self.requests.clear()
            self.asked.clear()
            self.bytes_sent = 0


def _handler(server: FileServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self._send(501, b"", {})  # nobody needs it

        def do_GET(self) -> None:
            path = unquote(self.path.partition("?")[0]).lstrip("/")
            file = server.root / path
            with server.lock:
                server.connections.add(self.client_address)
            if file.is_dir():
                links = "".join(f'<a href="{p.name}">{p.name}</a>' for p in sorted(file.iterdir()))
                return self._send(200, links.encode(), {"Content-Type": "text/html"})
            if not file.is_file():
                return self._send(404, b"", {})
            facts = file.stat()
            span, partial = (0, facts.st_size), self.headers.get("Range") if server.with_ranges else None
            if partial:
                first, _, last = partial.removeprefix("bytes=").partition("-")
                span = (int(first), min(int(last) + 1 if last else facts.st_size, facts.st_size))
            with server.lock:
                server.requests.append((path, span))
                server.asked[path, span] += 1
                fault = server.fault(path, span, server.asked[path, span])
            if fault == "stall":
                server.release.wait(30)
                self.close_connection = True
                return None
            if fault == "reset":
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()
                self.close_connection = True
                return None
            if fault == "redirect":
                return self._send(302, b"", {"Location": f"/{path}?moved"})
            if fault.isdecimal():
                return self._send(int(fault), b"", {})
            if span[0] >= facts.st_size:
                return self._send(416, b"", {"Content-Range": f"bytes */{facts.st_size}"})
            with file.open("rb") as stream:
                stream.seek(span[0])
                content = stream.read(span[1] - span[0])
            headers = {"ETag": f'"{facts.st_mtime_ns:x}-{facts.st_size:x}"'} if server.with_etag else {}
            if partial:
                headers["Content-Range"] = f"bytes {span[0]}-{span[1] - 1}/{facts.st_size}"
            if fault == "slow":
                time.sleep(0.2)
            self.close_connection = self.close_connection or fault == "close"
            self._send(206 if partial else 200, content, headers, cut=fault == "truncate")
            return None

        def _send(self, status: int, content: bytes, headers: dict[str, str], cut: bool = False) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(content)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "HEAD":
                return
            content = content[: len(content) // 2] if cut else content
            with contextlib.suppress(OSError):
                self.wfile.write(content)
            with server.lock:
                server.bytes_sent += len(content)
            self.close_connection = self.close_connection or cut

    return Handler


@contextlib.contextmanager
def serve(root: Path) -> Iterator[FileServer]:
    """A server of a folder for the length of the context."""

    class Quiet(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 128

        def handle_error(self, request: object, client_address: object) -> None:
            pass

    server = FileServer(root)
    http = Quiet(("127.0.0.1", 0), _handler(server))
    server.url = f"http://127.0.0.1:{http.server_address[1]}"
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.release.set()
        http.shutdown()
        http.server_close()
