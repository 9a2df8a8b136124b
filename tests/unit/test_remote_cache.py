"""The local cache of remote shards: whole entries or none, never above its limit, shared by processes."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
from dataclasses import replace
from pathlib import Path

import pytest
from support.http_server import serve
from test_remote_stream import FAST, rows_of, stream, take, write_samples

from mmcl.shards import ShardReader, load_manifest
from mmcl.shards.cache import RangeCache
from mmcl.types import ConfigError, SampleError


def used(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("??/*"))


def entries(folder: Path) -> list[Path]:
    return sorted(folder.glob("??/*"))


def test_a_second_run_reads_nothing_again_but_what_was_damaged(tmp_path: Path) -> None:
    write_samples(tmp_path / "shards")
    cache = tmp_path / "cache"
    with serve(tmp_path / "shards") as server:
        options = replace(FAST, cache_dir=str(cache))
        first = rows_of(take(stream(server.url, remote=options), 6))
        assert server.spans()
        server.clear()
        assert rows_of(take(stream(server.url, remote=options), 6)) == first
        assert server.spans() == []
        damaged = entries(cache)[::7]
        for path in damaged:
            content = bytearray(path.read_bytes())
            content[-5] ^= 1
            path.write_bytes(content if path != damaged[0] else content[:100])
        server.clear()
        assert rows_of(take(stream(server.url, remote=options), 6)) == first
        # neighbours share a request; the next epoch, read ahead, may ask while the first answer is on its way
        assert 0 < len(set(server.spans())) <= len(damaged)


def test_the_limit_holds_and_the_least_recently_used_go(tmp_path: Path) -> None:
    cache = RangeCache(tmp_path, 10_000)
    for number in range(40):
        cache.put(f"n{number}", bytes([number]) * 900)
        assert cache.get("n0") is not None, "used again and again, it stays"
        assert used(tmp_path) <= 10_000
    kept = [number for number in range(40) if cache.get(f"n{number}") is not None]
    assert kept[0] == 0 and kept[1:] == list(range(kept[1], 40)) and len(kept) >= 8
    cache.put("large", bytes(10_001))
    assert cache.get("large") is None and cache.get("n39") == bytes([39]) * 900


def test_a_killed_writer_leaves_nothing_that_counts(tmp_path: Path) -> None:
    cache = RangeCache(tmp_path, 10_000)
    cache.put("a", bytes(3_000))
    (tmp_path / "lock").write_bytes(b"")  # it was inside when it was killed
    half = entries(tmp_path)[0].with_name("half.part")
    half.write_bytes(bytes(50_000))
    cache.put("b", bytes(3_000))
    assert not half.exists() and cache.get("a") == bytes(3_000) and cache.get("b") == bytes(3_000)


def test_what_does_not_fit_its_index_is_not_kept(tmp_path: Path) -> None:
    write_samples(tmp_path / "shards", 4, 500)
    tar = next((tmp_path / "shards").glob("*.tar"))
    content = tar.read_bytes()
    with serve(tmp_path / "shards") as server:
        server.with_etag = False
        reader = ShardReader(load_manifest(server.url), remote=replace(FAST, cache_dir=str(tmp_path / "cache")))
        tar.write_bytes(bytes(len(content)))
        with pytest.raises(SampleError, match="changed"):
            reader.read(0, 0)
        tar.write_bytes(content)
        assert reader.read(0, 0).members["txt"] == b"caption 0"


def test_a_cache_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"data\.cache_dir"):
        RangeCache(tmp_path / "file", 1)


def hammer(folder: str, seed: int) -> None:
    cache = RangeCache(folder, 60_000)
    for step, number in itertools.product(range(6), range(40)):
        name = f"n{(number * (seed + 3) + step) % 60}"
        content = cache.get(name)
        assert content in (None, name.encode() * 500)
        cache.put(name, name.encode() * 500)


@pytest.mark.slow
def test_processes_share_it(tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    processes = [context.Process(target=hammer, args=(str(tmp_path), seed)) for seed in range(4)]
    for process in processes:
        process.start()
    while any(process.is_alive() for process in processes):
        with contextlib.suppress(FileNotFoundError):  # a file that was seen may be gone
            assert used(tmp_path) <= 75_000  # what comes and goes while we count is seen both
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4
    assert 40_000 < used(tmp_path) <= 60_000
    assert RangeCache(tmp_path, 60_000)._evict(60_000) == used(tmp_path)
