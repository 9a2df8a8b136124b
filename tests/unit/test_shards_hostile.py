"""A stranger's shards: nothing of them is run, nothing outside of their folder is touched, memory stays bounded.

URLs in a manifest are covered beside the manifest's own tests, text and JSON beside those of the members.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import resource
import struct
import tarfile
import zlib
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from support.media import encode, write_clip
from support.shards import write_shards

from mmcl.shards import MakeOptions, ShardReader, load_manifest, make_shards, write_manifest
from mmcl.shards.index import index_shards
from mmcl.shards.manifest import ShardEntry, index_url
from mmcl.shards.member_index import Member, pack_index
from mmcl.shards.pool import Lost
from mmcl.shards.preview import draw_card, preview_shards
from mmcl.shards.reshard import reshard
from mmcl.shards.scan import choose_places, scan
from mmcl.shards.stats import look_at, shard_stats
from mmcl.shards.verify import VerifyOptions, _check_sample, repair_shards, verify_shards

MAX_MEGABYTES = 100
"""that looking at a sample may add to a process"""


class Touch:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def huge_png(side: int, bits: int = 1) -> bytes:
    """A black picture, whole and valid, a thousandth of its pixels' bytes."""
    rows = zlib.compressobj(1)
    data = b"".join([*(rows.compress(bytes(1 + (side * bits + 7) // 8)) for _ in range(side)), rows.flush()])
    header = struct.pack(">IIBBBBB", side, side, bits, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", data) + png_chunk(b"IEND", b"")


def png_with_text_bomb(megabytes: int) -> bytes:
    picture = io.BytesIO()
    from PIL import Image

    Image.new("RGB", (8, 8)).save(picture, "PNG")
    data = picture.getvalue()
    bomb = png_chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(megabytes << 20), 9))
    return data[:33] + bomb + data[33:]


def huge_frames(folder: Path) -> bytes:
    """A QuickTime file that states 64×48 pixels; its frame is a PNG of 16,000×16,000, which FFmpeg would take."""
    path, picture = folder / "huge.mov", huge_png(16_000, bits=8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("png", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "gray"
        packet = av.Packet(picture)
        packet.stream, packet.pts, packet.dts, packet.time_base = stream, 0, 0, Fraction(1, 25)
        packet.is_keyframe = True
        container.mux(packet)
    return path.read_bytes()


def one_frame(folder: Path) -> dict[str, bytes]:
    """Files of one frame that state 10^9, by which of their tables states it."""
    grey = [np.full((48, 64, 3), 120, np.uint8)]
    mp4 = encode(folder / "one.mp4", grey, None).read_bytes()
    avi = encode(folder / "one.avi", grey, None, codec="mjpeg").read_bytes()

    def patched(data: bytes, form: str, *places: int) -> bytes:
        changed = bytearray(data)
        for place in places:
            struct.pack_into(form, changed, place, 10**9)
        return bytes(changed)

    durations, sizes = mp4.index(b"stts") + 12, mp4.index(b"stsz") + 12
    constant_size = bytearray(patched(mp4, ">I", durations, sizes))
    struct.pack_into(">I", constant_size, sizes - 4, 500)  # all of one size: no table that would have to be there
    return {
        "durations.mp4": patched(mp4, ">I", durations),
        "sizes.mp4": bytes(constant_size),
        "header.avi": patched(avi, "<I", avi.index(b"avih") + 24, avi.index(b"strh") + 40),
    }


def examine(reader: ShardReader, shard: int, index: int) -> int:
    """Opens a sample in all the ways there are; megabytes that this added to the process at its largest."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    _check_sample(reader, shard, index, decoder="decord", tolerance_seconds=0.5)
    look_at(reader, shard, index)
    draw_card(reader, shard, index)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024


def most_megabytes(folder: Path) -> int:
    manifest = load_manifest(folder)
    added = [result for _, result in scan(manifest, examine, choose_places(manifest), workers=1)]
    assert not any(isinstance(result, Lost) for result in added), added
    return max(added)


def test_pickles_are_counted_and_nothing_of_them_runs(tmp_path):
    mark = tmp_path / "it ran"
    evil = pickle.dumps(Touch(mark))
    clip = write_clip(tmp_path / "a.mp4", colour="red", seconds=0.5).read_bytes()
    kinds = ("pyd", "pickle", "pkl", "pth", "pt", "npy", "mp", "py", "so")
    folder = tmp_path / "in"
    write_shards(folder, {"k": {"mp4": clip, "txt": b"x", **dict.fromkeys(kinds, evil)}})
    index_shards(folder)
    report = verify_shards(folder, VerifyOptions(workers=1))
    assert report.ok and report.ignored == dict.fromkeys(sorted(kinds), 1)
    assert shard_stats(folder, workers=1).document["ignored_files"] == dict.fromkeys(kinds, 1)
    preview_shards(folder, tmp_path / "p.html", workers=1)
    reshard([folder], tmp_path / "out")
    assert not mark.exists()
    assert pickle.loads(evil) is None and mark.exists()  # it would have run


def test_members_that_leave_their_folder_are_no_samples(tmp_path):
    folder, outside = tmp_path / "in/shards", tmp_path / "in/secret.txt"
    folder.mkdir(parents=True)
    outside.write_text("a secret")
    names = ("../escape", "a/../../escape", "/tmp/absolute", "..\\escape", "C:\\escape", "a\x1bb")
    with tarfile.open(folder / "a.tar", "w") as tar:

        def add(name: str, kind: bytes = tarfile.REGTYPE, target: str = "") -> None:
            info = tarfile.TarInfo(name)
            info.type, info.linkname, info.size = kind, target, 4 if kind == tarfile.REGTYPE else 0
            tar.addfile(info, io.BytesIO(b"evil"))

        for name in names:
            add(f"{name}.txt")
        add("link.txt", tarfile.SYMTYPE, str(outside))
        add("hard.txt", tarfile.LNKTYPE, "../secret.txt")
        add("device.txt", tarfile.CHRTYPE)
        add("pipe.txt", tarfile.FIFOTYPE)
        add("plain.txt")
    index_shards(folder)
    report = verify_shards(folder, VerifyOptions(workers=1))
    assert report.ok and report.samples == 1
    assert report.ignored == {"no key or no extension": 1, "not a plain file": 4, "path outside of its folder": 5}
    before = sorted(path.name for path in tmp_path.rglob("*"))
    reshard([folder], tmp_path / "out")
    repair_shards(report, tmp_path / "fixed")
    for new in ("out", "fixed"):
        assert ShardReader(load_manifest(tmp_path / new)).read(0, 0).key == "plain"
        with tarfile.open(next((tmp_path / new).glob("*.tar"))) as tar:
            assert tar.getnames() == ["plain.txt"]
    new_names = {"out", "fixed", "index.json", "sizes.json", "a.tar", "a.members"}
    after = sorted(path.name for path in tmp_path.rglob("*"))
    assert set(after) - set(before) <= new_names | {"shard-000000.tar", "shard-000000.members"}
    assert outside.read_text() == "a secret"


def test_a_side_file_cannot_name_what_a_tar_does_not(tmp_path):
    """The index is a stranger's as well: a key of it never becomes a path, and verification says that it differs."""
    folder = tmp_path / "in"
    write_shards(folder, {"k": {"txt": b"x"}})
    tar = folder / "shard-000000.tar"
    side = pack_index(["../../escape"], [[Member("txt", 512, 1)]], tar.stat().st_size)
    Path(index_url(str(tar))).write_bytes(side)
    report = verify_shards(folder, VerifyOptions(workers=1))
    assert [finding.reason for finding in report.findings] == ["index_differs"]
    before = sorted(tmp_path.rglob("*"))
    reshard([folder], tmp_path / "out")
    assert {path.parent for path in set(tmp_path.rglob("*")) - set(before)} <= {tmp_path, tmp_path / "out"}


def test_pictures_and_videos_that_state_too_much_are_named_in_bounded_memory(tmp_path):
    samples = {"picture": {"png": huge_png(30_000)}, "frames": {"mov": huge_frames(tmp_path)}}
    samples |= {name.replace(".", "_"): {name[-3:]: data} for name, data in one_frame(tmp_path).items()}
    samples["text"] = {"png": png_with_text_bomb(400)}
    assert max(len(data) for members in samples.values() for data in members.values()) < 2 << 20
    write_shards(tmp_path / "in", samples)
    report = verify_shards(tmp_path / "in", VerifyOptions(workers=1))
    # The one frame of the two other files is there and is read; what they state of more is never believed.
    assert {finding.key: finding.reason for finding in report.findings} == {
        "picture": "too_large",
        "frames": "decode",
        "sizes_mp4": "decode",
        "text": "not_an_image",
    }
    assert most_megabytes(tmp_path / "in") < MAX_MEGABYTES


def test_a_caption_that_unpacks_to_gigabytes_is_never_unpacked(tmp_path):
    bomb = zlib.compress(bytes(64 << 20), 9)
    samples = {
        "gz": {"txt.gz": bomb, "txt": b"x"},
        "zip": {"zip": bomb, "caption.json.gz": bomb, "txt": b"x"},
        "long": {"txt": b"a" * (8 << 20)},
        "json": {"json": b'{"caption": "' + b"a" * (3 << 20) + b'"}'},
    }
    write_shards(tmp_path / "in", samples)
    report = verify_shards(tmp_path / "in", VerifyOptions(workers=1))
    assert {finding.key: finding.reason for finding in report.findings} == {"long": "too_large", "json": "too_large"}
    assert report.ignored == {"caption.json.gz": 1, "txt.gz": 1, "zip": 1}
    assert most_megabytes(tmp_path / "in") < MAX_MEGABYTES


def test_a_member_of_a_terabyte_is_refused_by_its_size(tmp_path):
    """A tar with a hole: nothing on disk, a terabyte to whoever reads it."""
    tar, size = tmp_path / "hole.tar", 1 << 40
    with tar.open("wb") as file:
        try:
            os.truncate(file.fileno(), size)
        except OSError:
            pytest.skip("the file system has no files of this size")
    Path(index_url(str(tar))).write_bytes(pack_index(["k"], [[Member("txt", 512, size - 512)]], size))
    write_manifest(tmp_path, [ShardEntry(tar.name, 1)])
    report = verify_shards(tmp_path, VerifyOptions(workers=1, checksums=False))
    assert [finding.reason for finding in report.findings] == ["too_large"]
    assert shard_stats(tmp_path, workers=1).document["unreadable"] == {"too_large": 1}


def test_making_shards_of_such_files_names_them_too(tmp_path):
    files = {**one_frame(tmp_path), "huge.mov": huge_frames(tmp_path), "picture.png": huge_png(30_000)}
    (tmp_path / "in").mkdir()
    for name, data in files.items():
        (tmp_path / "in" / name).write_bytes(data)
    write_clip(tmp_path / "in/good.mp4", colour="red", seconds=0.5)
    report = make_shards(tmp_path / "in", tmp_path / "out", MakeOptions(workers=1, timeout_seconds=60))
    lines = map(json.loads, (tmp_path / "out/failures.jsonl").read_text().splitlines())
    assert {line["path"].rpartition("/")[2]: line["reason"] for line in lines} == {
        "sizes.mp4": "truncated",
        "header.avi": "truncated",
        "huge.mov": "decode",
        "picture.png": "too_large",
    }
    assert report.samples == 2
