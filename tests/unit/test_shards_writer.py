"""Shards are plain tars of reproducible bytes, read alike by webdataset and by us; other tools' tars can be indexed."""

from __future__ import annotations

import hashlib
import io
import tarfile
from pathlib import Path

import pytest
import webdataset as wds

from mmcl.shards import ShardReader, ShardWriter, load_manifest, write_manifest
from mmcl.shards.index import index_shards
from mmcl.types import ConfigError, RunError


def write_shards(folder: Path, **options) -> list[Path]:
    with ShardWriter(folder, **options) as writer:
        for i in range(10):
            writer.write(f"key{i}", {"txt": f"né {i}".encode(), "mp4": bytes(1000 * i), "json": b"{}"})
    write_manifest(folder, writer.entries)
    return sorted(folder.glob("*.tar"))


def add(archive: tarfile.TarFile, name: str, data: bytes = b"x", kind: bytes = tarfile.REGTYPE) -> None:
    info = tarfile.TarInfo(name)
    info.size, info.type = (len(data) if kind == tarfile.REGTYPE else 0), kind
    archive.addfile(info, io.BytesIO(data))


def write_tar(path: Path, names: list[str]) -> Path:
    with tarfile.open(path, "w") as archive:
        for number, name in enumerate(names):
            add(archive, name, f"{number}".encode() * 700)
    return path


def read_all(folder: Path) -> dict[str, dict[str, bytes]]:
    reader = ShardReader(load_manifest(folder))
    positions = [(s, i) for s, size in enumerate(reader.manifest.sizes) for i in range(size)]
    samples = [reader.read(*position) for position in positions]
    return {sample.key: {name: bytes(data) for name, data in sample.members.items()} for sample in samples}


def test_equal_samples_make_equal_bytes_and_webdataset_reads_them(tmp_path):
    first, second = (write_shards(tmp_path / name, max_count=4) for name in "ab")
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    assert len(first) == 3 and not list(tmp_path.rglob("*.part"))
    for entry, path in zip(load_manifest(tmp_path / "a").checksums, first, strict=True):
        assert entry.tobytes() == hashlib.sha256(path.read_bytes()).digest()
    ours = read_all(tmp_path / "a")
    theirs = {}
    for sample in wds.WebDataset([str(path) for path in first], shardshuffle=False):
        theirs[sample["__key__"]] = {name: data for name, data in sample.items() if not name.startswith("__")}
    assert theirs == ours and len(ours) == 10 and ours["key3"]["txt"] == "né 3".encode()


def test_a_shard_ends_at_its_limits(tmp_path):
    paths = write_shards(tmp_path, max_bytes=20_000)
    assert all(path.stat().st_size <= 20_000 + 20 * 512 for path in paths) and len(paths) > 3
    assert len(read_all(tmp_path)) == 10


def test_the_order_of_members_does_not_matter(tmp_path):
    members = {"txt": b"t", "mp4": b"v", "json": b"{}"}
    for name, order in (("a", sorted(members)), ("b", sorted(members, reverse=True))):
        with ShardWriter(tmp_path / name) as writer:
            writer.write("key", {extension: members[extension] for extension in order})
    first, second = (tmp_path / name / "shard-000000.tar" for name in "ab")
    assert first.read_bytes() == second.read_bytes()


def test_an_error_leaves_no_half_shard(tmp_path):
    with pytest.raises(ZeroDivisionError), ShardWriter(tmp_path) as writer:
        writer.write("a", {"txt": b"x"})
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_one_clear_line(tmp_path):
    (tmp_path / ".shard-000000.tar.part").symlink_to("/dev/full")
    with pytest.raises(RunError, match=r"cannot write .*disk is full"), ShardWriter(tmp_path) as writer:
        writer.write("a", {"mp4": bytes(1 << 20)})
    assert list(tmp_path.glob("*.tar")) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot write"):
        ShardWriter(tmp_path / "file" / "below")


def test_indexing_our_own_shards_changes_nothing(tmp_path):
    write_shards(tmp_path, max_count=4)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    report = index_shards(tmp_path)
    assert report.problems == [] and report.ignored == {}
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_shards_of_webdataset_with_long_names_and_folders(tmp_path):
    with wds.TarWriter(str(tmp_path / "00000.tar")) as writer:
        for i in range(3):
            writer.write({"__key__": f"{'long' * 40}/{i:05d}", "mp4": b"v" * i, "cam0.jpg": b"i", "txt": f"t{i}"})
    (tmp_path / "more").mkdir()
    write_tar(tmp_path / "more/1.tar", ["./a.MP4", "./a.txt", "b.mp4"])
    assert index_shards(tmp_path).problems == []
    samples = read_all(tmp_path)
    assert samples[f"{'long' * 40}/00002"] == {"mp4": b"vv", "cam0.jpg": b"i", "txt": b"t2"}
    assert samples["a"].keys() == {"mp4", "txt"}
    assert load_manifest(tmp_path).shard_name(1) == "more/1.tar"


def test_scattered_members_are_joined_and_named_repeated_ones_left_out_and_named(tmp_path):
    write_tar(tmp_path / "0.tar", ["a.mp4", "b.mp4", "a.txt", "b.txt", "c.mp4", "c.mp4"])
    report = index_shards(tmp_path)
    assert len(report.problems) == 2
    assert "2 samples" in report.problems[0] and "a, b" in report.problems[0]
    assert "1 keys come twice" in report.problems[1] and report.problems[1].endswith("c")
    samples = read_all(tmp_path)
    assert samples["a"] == {"mp4": b"0" * 700, "txt": b"2" * 700} and samples["c"]["mp4"] == b"4" * 700


def test_keys_of_several_shards_that_are_equal_are_counted(tmp_path):
    write_tar(tmp_path / "0.tar", ["a.mp4", "b.mp4"])
    write_tar(tmp_path / "1.tar", ["a.mp4", "c.mp4"])
    assert "1 keys" in index_shards(tmp_path).problems[0]


def test_members_that_leave_their_folder_are_ignored_and_counted(tmp_path):
    with tarfile.open(tmp_path / "0.tar", "w") as archive:
        add(archive, "good.mp4")
        for name in ("/etc/passwd.mp4", "../up.mp4", "a/../../up.mp4", "noextension", ".hidden", "__meta__.json"):
            add(archive, name)
        add(archive, "link.mp4", kind=tarfile.SYMTYPE)
        add(archive, "folder.mp4", kind=tarfile.DIRTYPE)
        add(archive, "pipe.mp4", kind=tarfile.FIFOTYPE)
    report = index_shards(tmp_path)
    assert read_all(tmp_path).keys() == {"good"}
    assert report.ignored == {
        "path outside of its folder": 3,
        "no key or no extension": 2,
        "WebDataset metadata": 1,
        "not a plain file": 2,
        "folder": 1,
    }


@pytest.mark.parametrize("damage", ["cut in a member", "cut in a header", "cut between", "header overwritten"])
def test_a_damaged_tar_is_named_and_keeps_the_samples_before(tmp_path, damage):
    names = [f"{i}.{extension}" for i in range(4) for extension in ("mp4", "txt")]
    path = write_tar(tmp_path / "bad.tar", names)
    write_tar(tmp_path / "good.tar", ["z.mp4"])
    data = path.read_bytes()
    step = 512 + 1024
    if damage == "header overwritten":
        data = data[: 5 * step] + b"\x55" * 512 + data[5 * step + 512 :]
    else:
        data = data[: 5 * step + {"cut in a member": 700, "cut in a header": 100, "cut between": 0}[damage]]
    path.write_bytes(data)
    report = index_shards(tmp_path)
    assert len(report.problems) == 1 and report.problems[0].startswith("bad.tar: damaged")
    assert read_all(tmp_path).keys() == {"0", "1", "z"}


def test_what_cannot_be_indexed_is_one_clear_line(tmp_path):
    with pytest.raises(ConfigError, match="not there"):
        index_shards(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"no \*\.tar"):
        index_shards(tmp_path)
    (tmp_path / "a.tar.gz").write_bytes(b"")
    with pytest.raises(ConfigError, match="unpack"):
        index_shards(tmp_path)
    (tmp_path / "b.tar").write_bytes(b"not a tar")
    with pytest.raises(RunError, match="no sample"):
        index_shards(tmp_path)
