"""Shards that others made as the input of ``make``: their layouts, and what is hostile or broken in them."""

from __future__ import annotations

import io
import json
import os
import pickle
import tarfile
from pathlib import Path

import pytest
from PIL import Image
from support.media import encode, tone, write_clip

from mmcl.shards import MakeOptions, ShardReader, load_manifest, make_shards, parse_sample
from mmcl.shards.input_tars import find_tars
from mmcl.types import ConfigError


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def samples_of(folder: Path) -> dict:
    """By the key in the source shard."""
    reader = ShardReader(load_manifest(folder))
    places = [(shard, index) for shard, size in enumerate(reader.manifest.sizes) for index in range(size)]
    return {sample.key.rpartition("-")[0]: sample for sample in (parse_sample(reader.read(*place)) for place in places)}


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.fixture(scope="module")
def media(tmp_path_factory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("media")
    write_clip(folder / "a.mp4", colour="red", seconds=1.0)
    write_clip(folder / "silent.mp4", colour="blue", seconds=1.0, audio=False)
    write_clip(folder / "b.webm", colour="green", seconds=1.0, codec="vp8", audio=False)
    write_clip(folder / "c.avi", colour="white", seconds=1.0, codec="mpeg4", audio=False)
    for name, codec in (("w.wav", "pcm_s16le"), ("f.flac", "flac"), ("m.m4a", "aac")):
        encode(folder / name, None, tone(440, 1.0, 16_000), audio_codec=codec)
    Image.new("RGB", (64, 48), "red").save(folder / "p.png")
    Image.new("RGB", (64, 48), "blue").save(folder / "j.jpg")
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def foreign(media, tmp_path_factory) -> Path:
    """Two shards as video2dataset writes them, one as open_clip reads them."""
    folder = tmp_path_factory.mktemp("foreign")
    url = "https://videos.test/watch?v=1"
    clip = json.dumps({"url": url, "caption": "from json", "clips": [[2.0, 3.0]], "start_seconds": 2})
    several = json.dumps({"captions": ["one", "two"], "group": "film", "mood": 3})
    write_tar(
        folder / "00000.tar",
        {
            "000000000_00000.mp4": media["a.mp4"],
            "000000000_00000.txt": b"from txt",
            "000000000_00000.json": clip.encode(),
            "000000000_00001.webm": media["b.webm"],
            "000000000_00001.json": clip.encode(),
            "000000001.avi": media["c.avi"],
            "000000001.json": several.encode(),
        },
    )
    write_tar(
        folder / "00001.tar",
        {
            "000000100.mp4": media["a.mp4"],
            "000000100.m4a": media["m.m4a"],
            "000000100.txt": b"sound beside",
            "000000101.wav": media["w.wav"],
            "000000102.flac": media["f.flac"],
        },
    )
    write_tar(
        folder / "00002.tar",
        {
            "img0.jpg": media["j.jpg"],
            "img0.txt": b"a picture",
            "img0.json": b'{"label": 7}',
            "img1.png": media["p.png"],
            "img1.wav": media["w.wav"],
            "img1.cls": b"3",
        },
    )
    return folder


@pytest.mark.parametrize("pattern", ["", "*.tar", "{00000..00002}.tar", "{00000,0000[12]}.tar"])
def test_layouts_of_other_tools(foreign, tmp_path, pattern):
    report = make_shards(foreign / pattern, tmp_path, MakeOptions(workers=2))
    assert (report.samples, report.failures) == (8, {})
    if pattern:
        return
    samples = samples_of(tmp_path)
    first = samples["000000000_00000"]
    assert first.captions == ("from json",) and first.metadata["audio"] and first.duration_seconds == 1.0
    assert first.group == samples["000000000_00001"].group == "https://videos.test/watch?v=1"
    assert first.metadata["source"]["path"] == "00000.tar/000000000_00000" and first.metadata["clips"] == [[2.0, 3.0]]
    assert samples["000000001"].captions == ("one", "two") and samples["000000001"].group == "film"
    assert samples["000000001"].metadata["mood"] == 3
    beside = samples["000000100"]
    assert beside.captions == ("sound beside",) and beside.audio and beside.video
    assert beside.metadata["audio"]["samples"] == 16_000 and b"mp4a" not in bytes(beside.video)
    assert samples["000000101"].audio and samples["000000102"].metadata["audio"]["sample_rate_hz"] == 16_000
    assert samples["img0"].image and samples["img0"].captions == ("a picture",) and samples["img0"].label == 7
    assert samples["img1"].image and samples["img1"].audio and samples["img1"].label == 3
    assert samples["img1"].duration_seconds == 1.0
    assert make_shards(foreign / pattern, tmp_path, MakeOptions(workers=1)).reused == 8


def test_what_a_stranger_may_put_there(media, tmp_path):
    bomb = pickle.dumps(Bomb(tmp_path / "ran"))
    write_tar(
        tmp_path / "in/a.tar",
        {
            "good.mp4": media["silent.mp4"],
            "good.pyd": bomb,
            "good.pickle": bomb,
            "evil.pth": bomb,
            "../outside.mp4": media["a.mp4"],
            "broken.mp4": media["a.mp4"][:3000],
            "broken.txt": b"half",
            "text.txt": b"alone",
            "badjson.mp4": media["a.mp4"],
            "badjson.json": b"{",
        },
    )
    cut = write_tar(tmp_path / "in/b.tar", {"x.mp4": media["a.mp4"], "y.mp4": media["c.avi"]})
    cut.write_bytes(cut.read_bytes()[: len(media["a.mp4"]) + 4000])
    report = make_shards(tmp_path / "in", tmp_path / "out", MakeOptions(workers=2))
    assert not (tmp_path / "ran").exists() and not (tmp_path / "outside.mp4").exists()
    assert set(samples_of(tmp_path / "out")) == {"good", "x"} and report.ignored == {"pickle": 1, "pyd": 1}
    assert "ignored: 1 × .pickle, 1 × .pyd" in report.lines(tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "out/failures.jsonl").read_text().splitlines()]
    named = {(Path(line["path"]).name, line.get("sample")): line["reason"] for line in lines}
    assert named.pop(("a.tar", "broken")) in ("not_media", "truncated")
    assert named == {
        ("a.tar", None): "bad_shard",
        ("a.tar", "evil"): "no_media_and_no_caption",
        ("a.tar", "text"): "no_media",
        ("a.tar", "badjson"): "bad_json",
        ("b.tar", None): "bad_shard",
    }
    details = {line["detail"] for line in lines if line["reason"] == "bad_shard"}
    assert any("outside of its folder" in detail for detail in details) and any("damaged" in d for d in details)
    assert not list(tmp_path.rglob("source-*"))


def test_windows_of_members(media, tmp_path):
    write_clip(tmp_path / "long.mp4", colour="red", seconds=3.0, audio=False)
    encode(tmp_path / "short.wav", None, tone(440, 1.5, 16_000), audio_codec="pcm_s16le")
    members = {"k.mp4": (tmp_path / "long.mp4").read_bytes(), "k.wav": (tmp_path / "short.wav").read_bytes()}
    tar = write_tar(tmp_path / "in/a.tar", members)
    report = make_shards(tar, tmp_path / "out", MakeOptions(windows=(1.0, 1.0), shuffle=None, workers=1))
    assert report.samples == 3 and not report.failures
    reader = ShardReader(load_manifest(tmp_path / "out"))
    sounds = [parse_sample(reader.read(0, index)).metadata["audio"] for index in range(3)]
    assert [sound and sound["samples"] for sound in sounds] == [16_000, 8_000, None]


def test_inputs_that_are_no_shards_are_refused(media, tmp_path):
    write_tar(tmp_path / "a.tar", {"x.mp4": media["a.mp4"]})
    assert find_tars(tmp_path) == [tmp_path / "a.tar"]
    with pytest.raises(ConfigError, match=r"a\{0..1\}.tar: .*a0.tar is not there"):
        find_tars(tmp_path / "a{0..1}.tar")
    with pytest.raises(ConfigError, match=r"b\*.tar is not there"):
        find_tars(tmp_path / "b*.tar")
    (tmp_path / "v.mp4").write_bytes(media["a.mp4"])
    with pytest.raises(ConfigError, match=r"holds both shards \(a.tar\) and media files \(v.mp4\)"):
        make_shards(tmp_path, tmp_path / "out")
    write_tar(tmp_path / "none/a.tar", {"readme": b"x"})
    with pytest.raises(ConfigError, match="no sample in 1 tars"):
        make_shards(tmp_path / "none", tmp_path / "out")


@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_what_is_no_file_is_refused_by_its_type(kind, tmp_path):
    odd = tmp_path / "odd.mp4"
    {"pipe": os.mkfifo, "device": lambda path: path.symlink_to("/dev/zero"), "folder": Path.mkdir}[kind](odd)
    write_clip(tmp_path / "good.mp4", colour="red", seconds=1.0)
    table = tmp_path / "t.csv"
    table.write_text("path\ngood.mp4\nodd.mp4\n")
    for windows in (None, (0.5, 0.5)):
        options = MakeOptions(windows=windows, workers=1, timeout_seconds=60)
        report = make_shards(table, tmp_path / f"out{windows}", options)
        assert report.failures == {"not_a_file": 1}
    os.mkfifo(tmp_path / "pipe.csv")
    with pytest.raises(ConfigError, match="is needed"):
        make_shards(tmp_path / "pipe.csv", tmp_path / "out")
