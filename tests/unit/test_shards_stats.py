"""Shards are counted and shown as they are, on pages that a stranger's captions cannot change."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from support.media import encode, tone, write_clip
from support.shards import write_shards
from typer.testing import CliRunner

from mmcl.cli import shards_app as app
from mmcl.shards.page import bars, histogram
from mmcl.shards.preview import preview_shards
from mmcl.shards.stats import render_stats, shard_stats
from mmcl.types import RunError

EVIL = '<script>alert(1)</script><img src="http://example.org/x.png" onerror=alert(2)>"\'&\x1b[2J'


def run(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


class Page(HTMLParser):
    """The tags and addresses of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.addresses: list[str] = []
        self.handlers: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "srcset")]
        self.handlers += [name for name, _ in attrs if name.startswith("on")]


def check_page(text: str) -> Page:
    page = Page(text)
    assert not page.tags & {"script", "u", "b"} and not page.handlers
    assert all(address.startswith("data:image/jpeg;base64,") for address in page.addresses)
    assert "default-src 'none'" in text and 'http://example.org/x.png"' not in text
    return page


@pytest.fixture(scope="module")
def various(tmp_path_factory) -> Path:
    """Seven samples: two equal clips, one silent and larger, one of sound alone, a picture, a text, a damaged one."""
    work, folder = tmp_path_factory.mktemp("work"), tmp_path_factory.mktemp("various")
    clip = write_clip(work / "a.mp4", colour="red", seconds=1.0).read_bytes()
    silent = write_clip(work / "b.mp4", colour="blue", seconds=2.5, audio=False, size=(96, 128), fps=25).read_bytes()
    sound = encode(work / "c.flac", None, tone(440, 3.0, 22_050), audio_codec="flac", sample_rate_hz=22_050)
    from PIL import Image

    Image.new("RGB", (200, 100), "green").save(work / "d.jpg")
    write_shards(
        folder,
        {
            "clip": {"mp4": clip, "json": json.dumps({"captions": ["one two", EVIL], "group": "film"}).encode()},
            "again": {"mp4": clip, "txt": b"one two", "pyd": b"code"},
            "silent": {"mp4": silent, "txt": b"a b c"},
            "sound": {"flac": sound.read_bytes()},
            "picture": {"jpg": (work / "d.jpg").read_bytes(), "txt": b"green"},
            "words": {"txt": b"nothing but words"},
            "<u>key": {"mp4": b"damaged", "txt": b"x"},
        },
        max_count=4,
    )
    return folder


def test_everything_is_counted(various):
    document = shard_stats(various, workers=2).document
    assert (document["samples"], document["looked_at"], document["shards"], document["groups"]) == (7, 7, 2, 1)
    assert document["resolutions"] == {"64×48": 2, "128×96": 1}
    assert document["frames_per_second"] == {"12": 2, "25": 1} and document["video_codecs"] == {"h264": 3}
    assert document["audio_codecs"] == {"aac": 2, "flac": 1}
    assert document["audio_rates_hz"] == {"16000": 2, "22050": 1}
    assert document["missing"] == {"video": 2, "audio": 3, "captions": 1} and document["images"] == 1
    assert document["seconds"]["total"] == pytest.approx(1.0 + 1.0 + 2.5 + 3.0, abs=0.2)
    assert document["captions"] == 6 and document["caption_words"]["max"] == len(EVIL.split())
    assert document["duplicates"]["media"] == 1 and document["duplicates"]["captions"] == 1
    assert document["duplicates"]["examples_of_media"] == [["clip", "again"]]
    assert document["unreadable"] == {"not_media": 1} and document["ignored_files"] == {"pyd": 1}
    assert document["samples_per_shard"]["max"] == 4


def test_a_sample_of_them_is_enough_and_depends_on_the_seed_alone(various):
    first, again = (shard_stats(various, sample=3, seed=5, workers=n) for n in (1, 2))
    assert first == again and first.document["looked_at"] == 3 and first.document["samples"] == 7


def test_keys_that_come_twice_are_counted(tmp_path):
    write_shards(tmp_path, {"k": {"txt": b"x"}})
    manifest = write_shards(tmp_path / "b", {"k": {"txt": b"y"}})
    assert manifest.num_samples == 1
    (tmp_path / "index.json").unlink()
    assert run("index", tmp_path).exit_code == 0
    duplicates = shard_stats(tmp_path, workers=1).document["duplicates"]
    assert duplicates["keys"] == 1 and duplicates["examples_of_keys"] == ["k"]


def test_the_command_writes_json_and_one_page(various, tmp_path):
    done = run("stats", various, "--out", tmp_path / "s", "--workers", 2)
    assert done.exit_code == 0, done.output
    assert "7 samples in 2 shards" in done.output and "video codec: h264 × 3" in done.output
    assert "missing: 2 video, 3 audio, 1 captions" in done.output and "unreadable: 1 not_media" in done.output
    document = json.loads((tmp_path / "s/stats.json").read_text())
    assert document["mixing"]["batch"] == 7 and "mixing (batch 7, 64 streams, block 256): " in done.output
    assert document["histograms"]["frames per second"] == {"12": 2, "25": 1}
    text = (tmp_path / "s/stats.html").read_text()
    page = check_page(text)
    assert "<div class=long><dt>mixing</dt><dd>(batch 7, 64 streams, block 256): " in text
    assert (
        "svg" in page.tags
        and "words per caption" in text
        and sorted(p.name for p in (tmp_path / "s").iterdir())
        == [
            "stats.html",
            "stats.json",
        ]
    )


def test_a_place_that_cannot_be_written_is_said_before_anything_is_read(tmp_path):
    (tmp_path / "file").touch()
    result = run("stats", tmp_path / "no shards", "--out", tmp_path / "file")
    assert isinstance(result.exception, RunError) and "is not a folder" in str(result.exception)


def test_shards_of_films_in_order_are_told_apart_from_shuffled_ones(tmp_path):
    """40 films of 20 clips each, in order: neighbours are alike, and streams × block is too small to mix them."""
    samples = {f"{i:04d}": {"txt": b"x", "json": json.dumps({"group": f"film {i // 20}"}).encode()} for i in range(800)}
    write_shards(tmp_path / "in_order", samples, max_count=100)
    settings = ("--batch", 32, "--streams", 4, "--block", 16, "--workers", 2)
    done = run("stats", tmp_path / "in_order", *settings, "--out", tmp_path / "s")
    assert "neighbours are of one group 96 % of the time, any two samples 2.38 %" in done.output
    assert "write them anew in random order: mmcl shards reshard --shuffle 0 …, or set data.block=" in done.output
    assert "reshard" in (tmp_path / "s/stats.html").read_text()
    assert run("reshard", tmp_path / "in_order", "--shuffle", 0, "--out", tmp_path / "mixed").exit_code == 0
    assert "nothing to do" in run("stats", tmp_path / "mixed", *settings).output


def test_names_of_files_are_escaped_in_the_numbers(tmp_path):
    write_shards(tmp_path, {"k": {"txt": b"x", "<b>": b"", "\x1b[2J": b""}})
    stats = shard_stats(tmp_path, workers=1)
    assert "<b>" not in render_stats(stats, "<i>title") and "<i>" not in render_stats(stats, "<i>title")
    assert all(line.isprintable() for line in stats.lines())


def test_the_contact_sheet_shows_frames_sound_and_escaped_captions(various, tmp_path):
    done = run("preview", various, "--out", tmp_path / "p/sheet.html", "--workers", 2)
    assert done.exit_code == 0, done.output
    text = (tmp_path / "p/sheet.html").read_text()
    page = check_page(text)
    assert len(page.addresses) == 4  # three videos, one picture
    assert text.count("loudness of its sound") == 3 and text.count("<figure>") == 7
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert "h264 128×96 at 25 fps" in text and "image 200×100" in text and "flac 22050 Hz" in text
    assert "not_media" in text and re.search(r"3\.0\d s of sound", text)


def test_the_contact_sheet_is_a_draw_by_seed(various, tmp_path):
    pages = [
        preview_shards(various, tmp_path / f"{i}.html", count=2, seed=s, workers=1) for i, s in enumerate((1, 1, 2))
    ]
    texts = [page.read_text() for page in pages]
    assert texts[0] == texts[1] != texts[2] and texts[0].count("<figure>") == 2


@pytest.mark.parametrize(
    "values", [[1.0] * 5, [0.001 * i for i in range(100)], list(range(1000)), [*range(50), 10**9], [7, 7, 8], [1e-9, 5]]
)
def test_every_value_falls_into_one_bar(values):
    counts = histogram(values)
    assert sum(counts.values()) == len(values) and 1 <= len(counts) <= 13
    assert "<svg" in bars("x", counts)


def test_nothing_to_count_is_no_card():
    assert histogram([]) == {} and bars("x", {}) == ""
