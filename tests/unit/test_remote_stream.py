"""Remote shards: the same stream as from a local folder, read ahead within a budget; what a server does is named."""

from __future__ import annotations

import importlib
import itertools
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.http_server import FileServer, serve
from support.shards import write_shards

from mmcl.config import build
from mmcl.data import ClipStream
from mmcl.data.options import DataOptions
from mmcl.media.text import ByteTokenizer
from mmcl.shards import ShardReader, load_manifest, remote_shard
from mmcl.shards.ahead import ReadAhead
from mmcl.shards.remote import RemoteOptions
from mmcl.shards.remote_shard import JOINED_BYTES, JOINED_GAP_BYTES, group_span, join_spans
from mmcl.types import Batch, ConfigError, RunError, SampleError, TextSpec, View

TEXT = View(TextSpec(ByteTokenizer(32)))
SAMPLES, PER_SHARD = 48, 12
FAST = RemoteOptions(read_ahead_bytes=1 << 20, connections=8, retries=2, retry_seconds=5.0, stall_seconds=0.3)


def write_samples(folder: Path, samples: int = SAMPLES, num_bytes: int = 30_000) -> None:
    rng = np.random.default_rng(0)
    contents = {
        f"k{i:03d}": {"bin": rng.bytes(num_bytes + 100 * i), "txt": f"caption {i}".encode()} for i in range(samples)
    }
    write_shards(folder, contents, max_count=PER_SHARD)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FileServer]:
    write_samples(tmp_path)
    with serve(tmp_path) as server:
        yield server


def stream(url: str | Path, **options: object) -> ClipStream:
    options = {"global_batch": 8, "in_process": True, "seed": 3, "remote": FAST, **options}
    return ClipStream(load_manifest(url), (TEXT,), **options)  # type: ignore[arg-type]


def take(source: ClipStream, count: int) -> list[Batch]:
    return list(itertools.islice(iter(source), count))


def rows_of(batches: list[Batch]) -> list[tuple[object, ...]]:
    return [(batch.keys, batch.draws.tolist(), batch.views[TEXT].data.tolist(), batch.skipped) for batch in batches]


def assert_all_but(batches: list[Batch], local: list[Batch], missing: set[str]) -> None:
    """One epoch: row for row the local one, but for holes, each named."""
    for batch, whole in zip(batches, local, strict=True):
        assert batch.keys == tuple("" if key in missing else key for key in whole.keys)
    skipped = [skip for batch in batches for skip in batch.skipped]
    assert sorted(key for _, key, _, _ in skipped) == sorted(missing)


def test_a_remote_stream_is_the_local_one(server: FileServer) -> None:
    """Over an epoch border; in worker processes too, after this process has opened sessions of its own."""
    local = rows_of(take(stream(server.root), 9))
    assert rows_of(take(stream(server.url), 9)) == local
    assert rows_of(take(stream(server.url, in_process=False, workers=2), 9)) == local
    second = stream(server.url, in_process=False, workers=1)
    second.load_state_dict(json.loads(json.dumps({**stream(server.root).state_dict(), "draws": 32})))
    assert rows_of(take(second, 3)) == local[4:7]
    in_order = stream(server.url, global_batch=10, shuffle=False, rule="even")
    assert rows_of(list(in_order)) == rows_of(list(stream(server.root, global_batch=10, shuffle=False, rule="even")))


@pytest.mark.parametrize("shuffle", [True, False])
def test_the_first_batch_reads_at_most_twice_its_own_bytes(server: FileServer, shuffle: bool) -> None:
    """All that the server sends counts, the tables of the shards too; also where the next samples lie beside."""
    source = stream(server.url, shuffle=shuffle)
    server.clear()
    batch = next(iterator := iter(source))
    own = sum(30_000 + 100 * int(key[1:]) for key in batch.keys)
    time.sleep(0.2)  # what is on its way comes
    assert own < server.bytes_sent <= 2 * own
    assert shuffle or len(server.spans()) == 1, "neighbours share a request"
    next(iterator)
    iterator.close()  # type: ignore[attr-defined]


def test_one_request_per_sample(server: FileServer) -> None:
    """From the header of its first file to the end of its last, and nothing beside."""
    reader = ShardReader(load_manifest(server.url), remote=FAST)
    for shard, index in itertools.product(range(4), (0, 5, 11)):
        sample = reader.read(shard, index)
        members = reader.open_index(shard).members(index)
        assert list(map(len, sample.members.values())) == [member.num_bytes for member in members]
        wanted = (members[0].offset - 512, members[-1].offset + members[-1].num_bytes)
        assert server.requests[-1] == (f"shard-{shard:06d}.tar", wanted)
    assert len(server.spans()) == 12


@given(
    st.lists(st.tuples(st.integers(0, 1 << 22), st.integers(1, 1 << 20)), min_size=1, max_size=30),
    st.integers(0, 1 << 20),
)
def test_joined_spans(pairs: list[tuple[int, int]], spare: int) -> None:
    spans = {(start, start + size) for start, size in pairs}
    groups = join_spans(spans, spare_bytes=spare)
    assert sorted(span for group in groups for span in group) == sorted(spans)
    waste = 0
    for group in groups:
        first, last = group_span(group)
        covered = np.zeros(last - first, bool)
        for start, stop in group:
            covered[start - first : stop - first] = True
        between = int((~covered).sum())
        waste += between
        assert between <= covered.sum()
        assert len(group) == 1 or last - first <= JOINED_BYTES
        edges = np.flatnonzero(np.diff(np.concatenate([[1], covered, [1]]).astype(int)))
        assert all(b - a <= JOINED_GAP_BYTES for a, b in zip(edges[::2], edges[1::2], strict=True))
    assert waste <= spare
    near = [(0, 300_000), (300_000 + JOINED_GAP_BYTES, 900_000)]
    assert len(join_spans(near)) == 1 and len(join_spans([near[0], (near[1][0] + 1, 900_000)])) == 2


@pytest.mark.parametrize("budget", [20_000, 200_000])
def test_no_more_than_the_budget_is_on_its_way(server: FileServer, budget: int) -> None:
    """20,000 bytes hold no sample: each goes alone."""
    manifest = load_manifest(server.url)
    reader = ShardReader(manifest, remote=RemoteOptions(read_ahead_bytes=budget, connections=8))
    places = [(0, shard, index) for index in range(PER_SHARD) for shard in range(4)]
    ahead = ReadAhead([reader], iter(places), first=4)
    handed = 0
    for count, (_, shard, index) in enumerate(places):
        assert ahead.next().read().key == f"k{shard * PER_SHARD + index:03d}"
        ((first, last),) = reader.open(shard).spans(index)  # type: ignore[union-attr]
        held = last - first
        if count % 8 == 0:
            time.sleep(0.05)  # whatever may be asked for has been asked for
        with server.lock:
            asked = sum(stop - start for start, stop in server.spans())
        assert asked - handed <= max(budget, held)
        handed += -(-held // 512) * 512  # what lies between two neighbours in one request belongs to it
    with pytest.raises(IndexError):
        ahead.next()
    ahead.close()
    assert ahead.most_bytes <= max(budget, 40_000)
    assert budget < 100_000 or ahead.most_bytes > budget // 2, "the budget is used"


TRANSIENT = ["stall", "reset", "500", "503", "429", "truncate"]


def test_what_passes_is_tried_again(server: FileServer) -> None:
    """Every first request fails, in six ways; that for the tables of the shards too."""
    local = take(stream(server.root), 6)
    server.fault = lambda path, span, count: (
        TRANSIENT[span[0] // 512 % len(TRANSIENT)] if count == 1 and not path.endswith(".json") else ""
    )
    batches = take(stream(server.url), 6)
    assert_all_but(batches, local, set())
    assert min(server.asked[asked] for asked in server.requests[1 : SAMPLES // 2]) >= 2


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "fault", [*(pytest.param(fault, marks=SLOW) for fault in ("stall", "reset", "500")), "403", "truncate"]
)
def test_what_stays_is_a_hole_with_a_name(server: FileServer, fault: str) -> None:
    """Two samples that the server never gives; their neighbours in a request, and all others, come once."""
    local = take(stream(server.root), 6)
    index = load_manifest(server.root).shard_index(1)
    lost = {index.key(i): index.members(i)[0].offset for i in (4, 9)}
    server.fault = lambda path, span, count: (
        fault if path.endswith("1.tar") and any(span[0] <= at < span[1] for at in lost.values()) else ""
    )
    options = RemoteOptions(read_ahead_bytes=1 << 20, retries=1, retry_seconds=5.0, stall_seconds=0.3)
    batches = take(stream(server.url, remote=options), 6)
    assert_all_but(batches, local, set(lost))
    for batch in batches:
        for _, _, reason, detail in batch.skipped:
            assert reason == "unreadable" and "shard-000001.tar: bytes" in detail
            assert ("1 try" if fault == "403" else "2 tries") in detail


def test_a_table_that_cannot_be_read_costs_the_samples_of_its_shard(server: FileServer) -> None:
    local = take(stream(server.root), 6)
    server.fault = lambda path, span, count: "500" if path.endswith("2.members") else ""
    index = load_manifest(server.root).shard_index(2)
    names = {key: f"{server.url}/shard-000002.tar#{i}" for i, key in enumerate(index.keys())}
    batches = take(stream(server.url), 6)
    for batch, whole in zip(batches, local, strict=True):
        assert batch.keys == tuple("" if key in names else key for key in whole.keys)
    assert sorted(skip[1] for batch in batches for skip in batch.skipped) == sorted(names.values())
    assert max(server.asked.values()) == 1 + FAST.retries, "not asked for again by every sample"


def change(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "truncated":
        del content[len(content) // 2 :]
    elif how == "grown":
        content += bytes(10_240)
    elif how == "shifted":
        content = content[1024:] + content[:1024]
    else:
        content[600] ^= 1
    path.write_bytes(content)


CHANGES = ["truncated", "grown", "shifted", "other bytes", "gone"]


@pytest.mark.parametrize(
    ("etag", "how"),
    [(True, how) for how in CHANGES]
    + [pytest.param(False, how, marks=SLOW if how == "shifted" else ()) for how in CHANGES if how != "other bytes"],
)
def test_a_changed_shard_is_noticed(server: FileServer, etag: bool, how: str) -> None:
    """While it is read: the run stops and names the file, or, where a server tells nothing, the samples are bad."""
    server.with_etag = etag
    source = iter(stream(server.url))
    next(source)
    for path in server.root.glob("*.tar"):
        if how == "gone":
            path.unlink()
        else:
            change(path, how)
            os.utime(path, (1, 1))
    if etag or how in ("truncated", "grown", "gone"):
        with pytest.raises(RunError, match=r"shard-00000\d.tar (holds|changed while|is missing)"):
            list(itertools.islice(source, 6))
    elif how == "shifted":
        skipped = [skip for batch in itertools.islice(source, 6) for skip in batch.skipped]
        assert len(skipped) > 30 and {reason for _, _, reason, _ in skipped} == {"changed"}


def test_a_shard_that_was_closed_must_be_the_same_when_it_is_opened_again(server: FileServer) -> None:
    reader = ShardReader(load_manifest(server.url), max_open=1, remote=FAST)
    for shard in (0, 1, 0, 1):
        reader.read(shard, 0)
    tar = server.root / "shard-000000.tar"
    change(tar, "other bytes")
    os.utime(tar, (1, 1))
    with pytest.raises(RunError, match="changed while it was read"):
        reader.read(0, 0)
    assert reader.read(1, 1)


def test_a_store_that_tells_no_version_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As gs:// and hf:// are: the version comes beside the bytes, at most a minute old."""
    from fsspec.implementations.local import LocalFileSystem

    class Store(LocalFileSystem):
        protocol = ("gs",)

        @classmethod
        def _strip_protocol(cls, path: str) -> str:
            return path.removeprefix("gs:/")

        def info(self, path: str, **_: object) -> dict[str, object]:
            facts = super().info(path)
            return {**facts, "etag": str(facts["mtime"])}

    write_samples(tmp_path)
    monkeypatch.setitem(importlib.import_module("fsspec.registry")._registry, "gs", Store)
    reader = ShardReader(load_manifest(f"gs:/{tmp_path}"), remote=FAST)
    assert reader.read(0, 0).members["txt"] == b"caption 0"
    tar = tmp_path / "shard-000000.tar"
    change(tar, "other bytes")
    os.utime(tar, (1, 1))
    reader.read(0, 1)
    monkeypatch.setattr(remote_shard, "RECHECK_SECONDS", 0.0)
    with pytest.raises(RunError, match=r"shard-000000\.tar changed while"):
        reader.read(0, 2)


def test_a_server_without_ranges_is_named(server: FileServer) -> None:
    server.with_ranges = False
    with pytest.raises(RunError, match="range of bytes"):
        take(stream(server.url), 1)


def test_connections_are_kept_and_their_end_is_no_failure(server: FileServer) -> None:
    """A server that closes after each answer without saying so, and one that sends elsewhere, cost no further try."""
    reader = ShardReader(load_manifest(server.url), remote=RemoteOptions(retries=0, stall_seconds=2.0))
    read = [reader.read(0, index).members["txt"] for index in range(6)]
    assert len(server.connections) <= 2, "one of fsspec, for whole files, and one for ranges"
    for fault in ("close", "redirect"):
        server.fault = lambda path, span, count, fault=fault: "" if fault == "redirect" and count % 2 == 0 else fault  # type: ignore[misc]
        server.clear()
        assert [bytes(reader.read(0, index).members["txt"]) for index in range(6)] == list(map(bytes, read))


def test_the_header_of_another_file_is_noticed(server: FileServer) -> None:
    """Of equal sizes, but for the names."""
    reader = ShardReader(load_manifest(server.url), remote=FAST)
    server.with_etag = False
    tar = server.root / "shard-000000.tar"
    content = tar.read_bytes()
    other = bytearray(content[:512].replace(b"k000", b"k999"))
    checksum = sum(other[:148]) + 8 * 32 + sum(other[156:])
    other[148:156] = f"{checksum:06o}\0 ".encode()
    tar.write_bytes(bytes(other) + content[512:])
    with pytest.raises(SampleError, match=r"changed: .*k999\.bin.*k000\.bin"):
        reader.read(0, 0)
    assert reader.read(0, 1).key == "k001"


def test_options_of_a_run_reach_the_reader(tmp_path: Path) -> None:
    tree = {"shards": "http://x/y", "read_ahead_bytes": 1000, "cache_dir": str(tmp_path), "timeout_seconds": 8.0}
    remote = build(DataOptions, tree).remote
    assert (remote.read_ahead_bytes, remote.cache_dir) == (1000, str(tmp_path))
    assert (remote.retry_seconds, remote.stall_seconds) == (4.0, 2.0), "given up before the worker would be ended"
    with pytest.raises(ConfigError, match="read_ahead_bytes"):
        build(DataOptions, {"shards": "x", "read_ahead_bytes": 0})
    source = stream(write_and_load(tmp_path), workers=4, in_process=False, remote=FAST)
    assert source.plan.worker_remote().read_ahead_bytes * 4 == FAST.read_ahead_bytes


def write_and_load(folder: Path) -> Path:
    write_samples(folder / "shards", 4, 100)
    return folder / "shards"
