"""Reading remote shards in shuffled order, nothing decoded, beside a plain GET of the same tars, in one run, as JSON.

    python tools/bench/loader_remote.py --quick

A local HTTP server in a process of its own answers every request 20 ms late. ``mmcl`` reads each sample once, in the
order of a training epoch, in one process; ``plain`` asks for one whole tar after the other on one kept connection, as
fast as the server sends, and does nothing with what comes. Passes take turns, and which side begins; a ratio is of
bytes of samples per second of ours over bytes of tars per second of plain, between neighbours, and the median counts.

Twice: ``network``, where the server sends 200 MB/s in all, as networks have their limits: there the reader has to hide
the latency. And ``loopback``, without a limit: there both sides, and the server, take what the processor gives, so the
ratio is one of processor time as well, and moves with whatever else runs.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import multiprocessing
import os
import socket
import socketserver
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from mmcl.data.order import sample_order
from mmcl.shards import ShardReader, ShardWriter, load_manifest, write_manifest
from mmcl.shards.ahead import ReadAhead
from mmcl.shards.remote import RemoteOptions

LATENCY_SECONDS = 0.02
NETWORK_BYTES_PER_SECOND = 200e6
MIN_RATIO = 0.9
_SLICE_BYTES = 128 << 10


def write_samples(folder: Path, shards: int, per_shard: int, num_bytes: int) -> None:
    rng = np.random.default_rng(0)
    noise = rng.bytes(2 * num_bytes)
    with ShardWriter(folder, max_count=per_shard) as writer:
        for number in range(shards * per_shard):
            start, size = int(rng.integers(num_bytes)), int(rng.integers(num_bytes // 2, num_bytes * 3 // 2))
            writer.write(f"{number:06d}", {"mp4": noise[start : start + size], "txt": b"a clip", "json": b"{}"})
    write_manifest(folder, writer.entries)


class _Pace:
    """Lets all connections together send so many bytes per second, in the order in which they ask."""

    def __init__(self, bytes_per_second: float) -> None:
        self._rate, self._free_at, self._lock = bytes_per_second, 0.0, threading.Lock()

    def __call__(self, num_bytes: int) -> None:
        with self._lock:
            now = time.monotonic()
            # what was not used for longer than this is lost, as on a network
            self._free_at = max(self._free_at, now - 0.005) + num_bytes / self._rate
            wait = self._free_at - now
        if wait > 0:
            time.sleep(wait)


class _Handler(socketserver.BaseRequestHandler):
    """HTTP/1.1 with ranges, and no more: the kernel copies from the page cache to the socket."""

    server: _Server

    def handle(self) -> None:
        self.request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        lines = self.request.makefile("rb")
        with contextlib.suppress(OSError):
            while request := lines.readline():
                headers = {}
                while (line := lines.readline().strip()) and b":" in line:
                    name, _, value = line.partition(b":")
                    headers[name.lower()] = value.strip().decode()
                self._answer(request.split()[1].decode().lstrip("/"), headers.get(b"range", ""))

    def _answer(self, name: str, wanted: str) -> None:
        time.sleep(LATENCY_SECONDS)
        pace = self.server.pace
        with (self.server.folder / name).open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            first, stop, status = 0, size, "200 OK"
            head = f'Content-Type: application/x-tar\r\nAccept-Ranges: bytes\r\nETag: "{size}"\r\n'
            if wanted:
                start, _, end = wanted.removeprefix("bytes=").partition("-")
                first, stop, status = int(start), min(int(end) + 1 if end else size, size), "206 Partial Content"
                head += f"Content-Range: bytes {first}-{stop - 1}/{size}\r\n"
            head = f"HTTP/1.1 {status}\r\n{head}Content-Length: {stop - first}\r\n\r\n"
            self.request.sendall(head.encode())
            while first < stop:
                size = stop - first if pace is None else min(_SLICE_BYTES, stop - first)
                if pace is not None:
                    pace(size)
                first += os.sendfile(self.request.fileno(), file.fileno(), first, size)


class _Server(socketserver.ThreadingTCPServer):
    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 256
    folder: Path
    pace: _Pace | None


def _serve(folder: Path, bytes_per_second: float | None, told: Connection) -> None:
    with _Server(("127.0.0.1", 0), _Handler) as server:
        server.folder, server.pace = folder, None if bytes_per_second is None else _Pace(bytes_per_second)
        told.send(server.server_address[1])
        server.serve_forever()


@contextlib.contextmanager
def serving(folder: Path, bytes_per_second: float | None = None) -> Iterator[int]:
    """The port of a server of a folder, in a process of its own; None: as fast as it can."""
    context = multiprocessing.get_context("spawn")
    told, teller = context.Pipe()
    process = context.Process(target=_serve, args=(folder, bytes_per_second, teller), daemon=True)
    process.start()
    try:
        yield told.recv()
    finally:
        process.terminate()
        process.join()


def read_ours(port: int, shards: int, options: RemoteOptions, seed: int) -> int:
    manifest = load_manifest(f"http://127.0.0.1:{port}")
    places = [(0, shard, index) for shard, index in sample_order(manifest, seed=seed, epoch=0) if shard < shards]
    ahead = ReadAhead([ShardReader(manifest, remote=options)], iter(places), first=64)
    num_bytes = 0
    for _ in places:
        num_bytes += sum(len(data) for data in ahead.next().read().members.values())
    ahead.close()
    return num_bytes


def read_plain(port: int, names: list[str]) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", port)
    buffer, num_bytes = memoryview(bytearray(1 << 20)), 0
    for name in names:
        connection.request("GET", f"/{name}")
        answer = connection.getresponse()
        while count := answer.readinto(buffer):
            num_bytes += count
    connection.close()
    return num_bytes


def cpu_seconds() -> float:
    times = os.times()
    return times.user + times.system


def compare(port: int, names: list[str], shards: int, *, pairs: int, options: RemoteOptions) -> dict[str, Any]:
    """Pairs of passes over the first shards, after one of each that does not count."""
    passes: dict[str, list[tuple[float, float]]] = {"mmcl": [], "plain": []}
    for turn in range(pairs + 1):
        sides: list[tuple[str, Callable[[], int]]] = [
            ("plain", lambda: read_plain(port, names[:shards])),
            ("mmcl", lambda turn=turn: read_ours(port, shards, options, turn)),  # type: ignore[misc]
        ]
        for name, side in sides[:: 1 if turn % 2 else -1]:
            cpu, wall = cpu_seconds(), time.perf_counter()
            megabytes = side() / 1e6
            wall = time.perf_counter() - wall
            if turn:
                passes[name].append((megabytes / wall, 1e3 * (cpu_seconds() - cpu) / megabytes))
    ratios = [ours[0] / plain[0] for ours, plain in zip(passes["mmcl"], passes["plain"], strict=True)]
    found: dict[str, Any] = {}
    for name, figures in passes.items():
        speed, cpu = (statistics.median(column) for column in zip(*figures, strict=True))
        found[name] = {"megabytes_per_second": speed, "cpu_ms_per_megabyte": cpu}
    return {**found, "pairs": pairs, "ratios": ratios, "ratio": statistics.median(ratios)}


def measure(quick: bool, *, repeats: int = 7, options: RemoteOptions | None = None) -> dict[str, Any]:
    """Medians of so many pairs, for both kinds of server."""
    options = options or RemoteOptions()
    shards, per_shard, num_bytes = (8, 200, 400_000) if quick else (16, 250, 400_000)
    limited = shards // 2
    with tempfile.TemporaryDirectory() as work:
        write_samples(Path(work), shards, per_shard, num_bytes)
        names = [f"shard-{number:06d}.tar" for number in range(shards)]
        with serving(Path(work), NETWORK_BYTES_PER_SECOND) as port:
            network = compare(port, names, limited, pairs=repeats, options=options)
        with serving(Path(work)) as port:
            loopback = compare(port, names, shards, pairs=repeats, options=options)
    return {
        "quick": quick,
        "repeats": repeats,
        "latency_ms": 1e3 * LATENCY_SECONDS,
        "megabytes": shards * per_shard * num_bytes / 1e6,
        "samples": shards * per_shard,
        "connections": options.connections,
        "read_ahead_bytes": options.read_ahead_bytes,
        "network": {**network, "limit_megabytes_per_second": NETWORK_BYTES_PER_SECOND / 1e6, "shards": limited},
        "loopback": loopback,
        "load": os.getloadavg()[0] / (os.cpu_count() or 1),
        "network_ratio": network["ratio"],
        "loopback_ratio": loopback["ratio"],
        "target": MIN_RATIO,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer samples: about a minute")
    parser.add_argument("--repeats", type=int, default=7, help="pairs of passes")
    parser.add_argument("--connections", type=int, default=RemoteOptions().connections)
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    given = parser.parse_args()
    options = RemoteOptions(connections=given.connections)
    text = json.dumps(measure(given.quick, repeats=given.repeats, options=options), indent=2)
    if given.out is not None:
        given.out.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
