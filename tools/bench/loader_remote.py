"""Reading remote shards in shuffled order, nothing decoded, beside a plain GET of the same tars, in one run, as JSON.

    python tools/bench/loader_remote.py --quick

A local HTTP server in a process of its own answers every request 20 ms late. ``mmcl`` reads each sample once, in the
order of a training epoch, in one process; ``plain`` asks for one whole tar after the other on one kept connection, as
fast as the server sends, and does nothing with what comes. Passes take turns; ``ratio`` is the median over pairs of
neighbours: bytes of samples per second of ours, over bytes of tars per second of plain.
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
MIN_RATIO = 0.9


def write_samples(folder: Path, shards: int, per_shard: int, num_bytes: int) -> None:
    rng = np.random.default_rng(0)
    noise = rng.bytes(2 * num_bytes)
    with ShardWriter(folder, max_count=per_shard) as writer:
        for number in range(shards * per_shard):
            start, size = int(rng.integers(num_bytes)), int(rng.integers(num_bytes // 2, num_bytes * 3 // 2))
            writer.write(f"{number:06d}", {"mp4": noise[start : start + size], "txt": b"a clip", "json": b"{}"})
    write_manifest(folder, writer.entries)


class _Handler(socketserver.BaseRequestHandler):
    """HTTP/1.1 with ranges, and no more: the kernel copies from the page cache to the socket."""

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
        with (Path(os.environ["SERVED_FOLDER"]) / name).open("rb") as file:
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
                first += os.sendfile(self.request.fileno(), file.fileno(), first, stop - first)


class _Server(socketserver.ThreadingTCPServer):
    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 256


def _serve(folder: str, told: Connection) -> None:
    os.environ["SERVED_FOLDER"] = folder
    with _Server(("127.0.0.1", 0), _Handler) as server:
        told.send(server.server_address[1])
        server.serve_forever()


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[int]:
    """The port of a server of a folder, in a process of its own."""
    context = multiprocessing.get_context("spawn")
    told, teller = context.Pipe()
    process = context.Process(target=_serve, args=(str(folder), teller), daemon=True)
    process.start()
    try:
        yield told.recv()
    finally:
        process.terminate()
        process.join()


def read_ours(port: int, options: RemoteOptions, seed: int) -> int:
    manifest = load_manifest(f"http://127.0.0.1:{port}")
    places = [(0, shard, index) for shard, index in sample_order(manifest, seed=seed, epoch=0)]
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


def measure(quick: bool, *, repeats: int = 5, options: RemoteOptions | None = None) -> dict[str, Any]:
    """Medians of passes that take turns, after one of each that does not count."""
    options = options or RemoteOptions()
    shards, per_shard, num_bytes = (8, 200, 400_000) if quick else (16, 250, 400_000)
    with tempfile.TemporaryDirectory() as work:
        write_samples(Path(work), shards, per_shard, num_bytes)
        names = [f"shard-{number:06d}.tar" for number in range(shards)]
        passes: dict[str, list[tuple[float, float]]] = {"mmcl": [], "plain": []}
        with serving(Path(work)) as port:
            for turn in range(repeats + 1):
                sides: dict[str, Callable[[], int]] = {
                    "plain": lambda: read_plain(port, names),
                    "mmcl": lambda turn=turn: read_ours(port, options, turn),  # type: ignore[misc]
                }
                for name, side in sides.items():
                    cpu, wall = cpu_seconds(), time.perf_counter()
                    megabytes = side() / 1e6
                    wall = time.perf_counter() - wall
                    if turn:
                        passes[name].append((megabytes / wall, 1e3 * (cpu_seconds() - cpu) / megabytes))
    ratios = [ours[0] / plain[0] for ours, plain in zip(passes["mmcl"], passes["plain"], strict=True)]
    report: dict[str, Any] = {
        "quick": quick,
        "repeats": repeats,
        "latency_ms": 1e3 * LATENCY_SECONDS,
        "megabytes": shards * per_shard * num_bytes / 1e6,
        "samples": shards * per_shard,
        "connections": options.connections,
        "read_ahead_bytes": options.read_ahead_bytes,
    }
    for name, figures in passes.items():
        speed, cpu = (statistics.median(column) for column in zip(*figures, strict=True))
        report[name] = {"megabytes_per_second": speed, "cpu_ms_per_megabyte": cpu}
    return {**report, "ratios": ratios, "ratio": statistics.median(ratios), "target": MIN_RATIO}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer samples: well under a minute")
    parser.add_argument("--repeats", type=int, default=5)
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
