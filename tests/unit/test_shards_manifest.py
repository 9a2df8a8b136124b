"""A manifest says what its folder holds, refuses what lies elsewhere, and opens at once with very many shards."""

from __future__ import annotations

import json
import pickle
import time
from pathlib import Path

import numpy as np
import pytest
from support.http_server import serve

from mmcl.shards import Manifest, ShardReader, ShardWriter, load_manifest, write_manifest
from mmcl.shards import manifest as manifest_module
from mmcl.shards.manifest import ShardEntry
from mmcl.shards.member_index import Member, ShardIndex, pack_index
from mmcl.types import ConfigError, RunError, SampleError


def write_some(folder: Path, count: int = 7, max_count: int = 3) -> Manifest:
    with ShardWriter(folder, max_count=max_count) as writer:
        for i in range(count):
            writer.write(f"key{i}", {"mp4": bytes([i]) * (i * 100), "txt": f"caption {i}".encode()})
    return write_manifest(folder, writer.entries)


def test_what_is_written_is_what_is_read(tmp_path):
    written = write_some(tmp_path)
    manifest = load_manifest(tmp_path)
    assert manifest.sizes.tolist() == [3, 3, 1] and manifest.sizes.dtype == np.int64
    assert (manifest.num_shards, manifest.num_samples, len(manifest)) == (3, 7, 3)
    assert manifest.fingerprint == written.fingerprint == load_manifest(tmp_path / "index.json").fingerprint
    reader = ShardReader(manifest)
    for shard in range(3):
        for index in range(manifest.sizes[shard]):
            raw, i = reader.read(shard, index), 3 * shard + index
            assert raw.key == reader.key(shard, index) == f"key{i}"
            assert {name: bytes(data) for name, data in raw.members.items()} == {
                "mp4": bytes([i]) * (i * 100),
                "txt": f"caption {i}".encode(),
            }
            assert (raw.source.shard, raw.source.index) == (shard, index)
    with pytest.raises(IndexError):
        reader.read(2, 1)
    with pytest.raises(IndexError):
        reader.read(3, 0)


def test_index_json_is_a_superset_of_the_wids_form(tmp_path):
    write_some(tmp_path)
    document = json.loads((tmp_path / "index.json").read_text())
    assert document["__kind__"] == "wids-shard-index-v1" and document["wids_version"] == 1
    first = document["shardlist"][0]
    assert first["url"] == "shard-000000.tar" and first["nsamples"] == 3
    assert first["filesize"] == (tmp_path / first["url"]).stat().st_size
    assert len(first["sha256"]) == 64
    assert json.loads((tmp_path / "sizes.json").read_text())["shard-000002.tar"] == 1


def test_fingerprint_tells_names_sizes_and_checksums_apart_but_not_folders(tmp_path):
    entries = [ShardEntry("a.tar", 3, 10, "0" * 64), ShardEntry("b.tar", 4, 20, "1" * 64)]
    variants = [
        entries,
        entries[::-1],
        [ShardEntry("a.tar", 4, 10, "0" * 64), entries[1]],
        [ShardEntry("c.tar", 3, 10, "0" * 64), entries[1]],
        [ShardEntry("a.tar", 3, 10, "2" * 64), entries[1]],
    ]
    prints = []
    for number, variant in enumerate([*variants, entries]):
        folder = tmp_path / str(number)
        folder.mkdir()
        prints.append(write_manifest(folder, variant).fingerprint)
    assert len(set(prints)) == len(variants) and prints[0] == prints[-1]


def test_a_pickle_is_small_and_notices_that_the_manifest_changed(tmp_path):
    manifest = write_some(tmp_path, 100, 2)
    sent = pickle.dumps(ShardReader(manifest))
    assert len(sent) < 600
    assert pickle.loads(sent).read(0, 1).key == "key1"
    write_manifest(tmp_path, [ShardEntry("shard-000000.tar", 2)])
    with pytest.raises(RunError, match="changed"):
        pickle.loads(sent)


def test_above_the_limit_the_table_is_binary_and_says_the_same(tmp_path, monkeypatch):
    entries = [ShardEntry(f"part/{i}-é.tar", i, 10 * i, f"{i:064x}") for i in range(30)]
    (tmp_path / "json").mkdir()
    (tmp_path / "bin").mkdir()
    plain = write_manifest(tmp_path / "json", entries)
    monkeypatch.setattr(manifest_module, "MAX_JSON_SHARDS", 10)
    write_manifest(tmp_path / "bin", entries)
    table = load_manifest(tmp_path / "bin")
    assert json.loads((tmp_path / "bin/index.json").read_text())["table"] == "index.bin"
    assert table.fingerprint == plain.fingerprint
    assert table.shard_name(29) == "part/29-é.tar" and table.shard_url(3) == str(tmp_path / "bin/part/3-é.tar")
    assert table.shard_bytes.tolist() == plain.shard_bytes.tolist()
    data = bytearray((tmp_path / "bin/index.bin").read_bytes())
    data[100] ^= 1
    (tmp_path / "bin/index.bin").write_bytes(data)
    with pytest.raises(ConfigError, match="damaged"):
        load_manifest(tmp_path / "bin")


HOSTILE = [
    "/etc/passwd",
    "../other.tar",
    "a/../../b.tar",
    "a/%2e%2e/b.tar",
    "file:///etc/passwd",
    "file:x.tar",
    "pipe:touch /tmp/x",
    "http://example.org/a.tar",
    "s3://bucket/a.tar",
    "zip::s3://bucket/a.tar",
    "simplecache::a.tar",
    "C:\\shards\\a.tar",
    "\\\\host\\share\\a.tar",
    "~/a.tar",
    "a\nb.tar",
    "",
    "\ud800.tar",
]


@pytest.mark.parametrize("url", HOSTILE)
def test_a_manifest_names_nothing_outside_of_its_folder(tmp_path, url):
    document = {"__kind__": "wids-shard-index-v1", "wids_version": 1, "shardlist": [{"url": url, "nsamples": 1}]}
    (tmp_path / "index.json").write_text(json.dumps(document))
    with pytest.raises(ConfigError, match="shard"):
        load_manifest(tmp_path)
    with pytest.raises(ConfigError):
        write_manifest(tmp_path, [ShardEntry(url, 1)])


@pytest.mark.parametrize(
    "url",
    [
        *HOSTILE,
        "https://HOST/a.tar",
        "http://127.0.0.1/a.tar",
        "http://HOST@evil.test/a.tar",
        "http://HOST.evil.test/a.tar",
        "http://HOST/../a.tar",
        "http://HOST/x/%2e%2e/%2e%2e/a.tar",
        "http:///etc/a.tar",
        "//evil.test/a.tar",
        "http://HOST/a.tar::simplecache",
    ],
)
def test_nor_does_one_on_a_server(tmp_path, url):
    """Nothing but the manifest is asked for, neither here nor elsewhere."""
    with serve(tmp_path) as server:
        host = server.url.removeprefix("http://")
        shard = {"url": url.replace("HOST", host), "nsamples": 1}
        document = {"__kind__": "wids-shard-index-v1", "wids_version": 1, "shardlist": [shard]}
        (tmp_path / "index.json").write_text(json.dumps(document))
        with pytest.raises(ConfigError, match="shard"):
            load_manifest(server.url)
        assert [path for path, _ in server.requests] == ["index.json"]
        shard["url"] = f"{server.url}/more/a.tar"
        (tmp_path / "index.json").write_text(json.dumps(document))
        assert load_manifest(server.url).shard_url(0) == shard["url"], "its own host, in full"


def test_the_binary_table_is_checked_too(tmp_path, monkeypatch):
    monkeypatch.setattr(manifest_module, "MAX_JSON_SHARDS", 1)
    with monkeypatch.context() as patch:
        patch.setattr(manifest_module, "_check_name", lambda base, name: None)
        write_manifest(tmp_path, [ShardEntry("good.tar", 1), ShardEntry("/etc/passwd", 1)])
    with pytest.raises(ConfigError, match="absolute"):
        load_manifest(tmp_path)
    index = tmp_path / "index.json"
    index.write_text(index.read_text().replace('"index.bin"', '"../index.bin"'))
    with pytest.raises(ConfigError, match="leaves"):
        load_manifest(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[]", "__kind__"),
        (b'{"__kind__": "wids-shard-index-v1"}', "shardlist"),
        (b'{"__kind__": "wids-shard-index-v1", "shardlist": [{"url": "a.tar"}]}', "shardlist.0"),
        (b'{"__kind__": "wids-shard-index-v1", "shardlist": [{"url": "a.tar", "nsamples": -1}]}', "nsamples"),
        (b'{"__kind__": "wids-shard-index-v1", "shardlist": [{"url": "a.tar", "nsamples": 1e300}]}', "nsamples"),
    ],
)
def test_a_broken_index_is_one_clear_line(tmp_path, content, message):
    (tmp_path / "index.json").write_bytes(content)
    with pytest.raises(ConfigError, match=message) as caught:
        load_manifest(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_folder_without_index_names_the_command(tmp_path):
    with pytest.raises(ConfigError, match="not there"):
        load_manifest(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="holds no shards"):
        load_manifest(tmp_path)
    (tmp_path / "a.tar").write_bytes(b"")
    with pytest.raises(ConfigError, match="mmcl shards index"):
        load_manifest(tmp_path)
    with pytest.raises(ConfigError, match="ftp"):
        load_manifest("ftp://host/shards")


def test_a_shard_that_is_not_the_indexed_one_stops_the_run(tmp_path):
    manifest = write_some(tmp_path)
    with (tmp_path / "shard-000000.tar").open("ab") as file:
        file.write(b"more")
    with pytest.raises(RunError, match="indexed with"):
        ShardReader(manifest).read(0, 0)
    (tmp_path / "shard-000001.tar").unlink()
    with pytest.raises(RunError, match="cannot read"):
        ShardReader(manifest).read(1, 0)
    (tmp_path / "shard-000002.members").unlink()
    with pytest.raises(ConfigError, match="mmcl shards index"):
        ShardReader(manifest).read(2, 0)


def test_a_sample_beyond_the_limit_is_refused_alone(tmp_path):
    reader = ShardReader(write_some(tmp_path), max_sample_bytes=250)
    with pytest.raises(SampleError, match="too_large"):
        reader.read(1, 0)
    assert reader.read(0, 2).key == "key2"


def test_only_so_many_shards_stay_open_and_old_views_stay_valid(tmp_path):
    reader = ShardReader(write_some(tmp_path, 60, 1), max_open=4)
    samples = [reader.read(shard, 0) for shard in range(60)]
    assert len(reader._open) == 4
    assert [bytes(sample.members["txt"]).decode() for sample in samples] == [f"caption {i}" for i in range(60)]


@pytest.mark.parametrize(("offset", "length"), [(0, 2000), (2**63, 2**63), (999, 2)])
def test_a_member_index_cannot_point_outside_of_its_tar(offset, length):
    packed = pack_index(["a"], [[Member("mp4", offset, length)]], 1000)
    with pytest.raises(RunError, match="outside"):
        ShardIndex(packed, "x.members")


def test_a_damaged_member_index_is_named():
    packed = pack_index(["a", "b"], [[Member("mp4", 0, 10)], []], 1000)
    assert ShardIndex(packed, "x").members(0) == [("mp4", 0, 10)] and ShardIndex(packed, "x").keys() == ["a", "b"]
    for broken in (b"", packed[:-1], packed[:80] + b"!" + packed[81:], b"X" + packed[1:], packed + b"x"):
        with pytest.raises(RunError, match=r"x\.members"):
            ShardIndex(broken, "x.members")


def test_remote_shards_are_read_by_range(tmp_path, monkeypatch):
    import fsspec

    from mmcl.shards import files

    write_some(tmp_path)
    memory = fsspec.filesystem("memory")
    memory.put(str(tmp_path) + "/", "/bucket/data/", recursive=True)
    monkeypatch.setattr(files, "REMOTE_SCHEMES", (*files.REMOTE_SCHEMES, "memory"))
    manifest = load_manifest("memory://bucket/data/")
    assert manifest.fingerprint == load_manifest(tmp_path).fingerprint
    sample = ShardReader(manifest).read(1, 2)
    assert sample.key == "key5" and bytes(sample.members["mp4"]) == bytes([5]) * 500
    memory.pipe_file("/bucket/data/shard-000001.tar", b"short")
    with pytest.raises(RunError, match=r"shard-000001\.tar holds 5 bytes"):
        ShardReader(manifest).read(1, 2)
    with pytest.raises(ConfigError, match="missing"):
        load_manifest("memory://bucket/nothing")


@pytest.mark.slow
def test_a_million_shards_open_at_once(tmp_path):
    write_manifest(tmp_path, (ShardEntry(f"{i // 1000}/{i}.tar", 10_000, 1, f"{i:064x}") for i in range(1_000_000)))
    start = time.perf_counter()
    manifest = load_manifest(tmp_path)
    assert manifest.num_samples == 10**10 and len(manifest.fingerprint) == 32
    assert manifest.shard_name(999_999) == "999/999999.tar"
    assert time.perf_counter() - start < 2
