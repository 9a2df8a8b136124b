"""The three files of a report: what they say, that they are whole, small, and harmless whatever the captions are."""

from __future__ import annotations

import dataclasses
import html.parser
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.reports import is_silent, shape_items, shape_report, shape_rows

from mmcl.evaluation import gallery, gallery_data, template
from mmcl.evaluation.gallery import GalleryItem, clip_webp, poster_jpeg, sound_webm, waveform_svg
from mmcl.evaluation.protocols import fingerprint
from mmcl.evaluation.ranking import retrieval_metrics
from mmcl.evaluation.report import (
    ModalityRows,
    RetrievalReport,
    evaluate_list,
    write_report,
)
from mmcl.evaluation.tables import table
from mmcl.media.audio import read_audio
from mmcl.types import ConfigError, RunError

SIX = ["text->video", "video->text", "text->audio", "audio->text", "video->audio", "audio->video"]
HOSTILE = (
    "<script>document.title='taken'</script>",
    '"><img src=x onerror="document.title=\'taken\'">',
    "</script ><!--<script >",
    "مرحبا بالعالم \u202e reversed",
    "long " * 2000,
    "$title ${data} {braces} \u2028 \ud800",
    "",
)


def payload(page: str) -> dict:
    """The gallery's data: everything up to the next ``<``, whatever that begins."""
    return json.loads(page.split('<script type="application/json" id="data">')[1].split("<")[0])


def hostile_items(count: int = 36) -> list[GalleryItem]:
    items = shape_items(count)
    return [
        dataclasses.replace(item, key=f"{HOSTILE[number % 7]}{number}", captions=(HOSTILE[number % 7],))
        for number, item in enumerate(items)
    ]


def test_json_is_as_documented(tmp_path: Path) -> None:
    items = shape_items()
    report = shape_report(items)
    page = write_report(report, items, tmp_path / "deep" / "report")
    assert sorted(path.name for path in page.parent.iterdir()) == ["report.html", "report.json", "report.md"]
    found = json.loads((page.parent / "report.json").read_text(encoding="utf-8"))
    assert (found["protocol"], found["fingerprint"]) == ("Shapes and tones", report.fingerprint)
    assert list(found["lists"]) == ["known", "zero_shot"]
    assert found["directions"] == found["lists"]["known"]["directions"]
    assert list(found["directions"]) == SIX
    wanted = {"R@1", "R@5", "R@10", "MedR", "MnR", "mAP@10", "nDCG@10"}
    for direction in found["directions"].values():
        assert wanted | {"ci95", "queries", "gallery", "ties", "unanswerable"} <= set(direction)
        assert wanted <= set(direction["ci95"])
    assert found["lists"]["known"]["items"] == 108
    assert found["lists"]["known"]["missing"] == {"audio": 4}
    assert found["directions"]["text->audio"]["unanswerable"] == 4
    assert found["directions"]["text->audio"]["gallery"] == 104
    ranks = found["lists"]["known"]["ranks"]["text->audio"]
    assert len(ranks) == 108 and [number for number, rank in enumerate(ranks) if rank is None] == [23, 47, 71, 95]


def test_directions_are_not_mixed_up() -> None:
    """text->video: text asks. The figures of both ways differ here and are those of the bare function."""
    rows = shape_rows(range(60), 1.1)
    found = evaluate_list("all", rows).directions
    text, video = rows["text"].embeddings, rows["video"].embeddings
    assert dict(found["text->video"].metrics) == retrieval_metrics(text, video)
    assert dict(found["video->text"].metrics) == retrieval_metrics(video, text)
    assert found["text->video"].metrics["MnR"] != found["video->text"].metrics["MnR"]


def test_several_captions_and_labels() -> None:
    eye = torch.eye(3)
    text = ModalityRows(eye[[0, 0, 1, 2]], np.array([0, 0, 1, 2]), np.array([0, 1, 0, 0]))
    video = ModalityRows(eye, np.array([0, 1, 2]))
    found = evaluate_list("all", {"text": text, "video": video})
    assert found.directions["text->video"].metrics["queries"] == 4
    assert found.directions["video->text"].ranks.relevant.tolist() == [2, 1, 1]
    assert [row[1] for row in table(found)] == ["100.0 (100.0–100.0)"] * 2
    same = evaluate_list("all", {"text": text, "video": video}, labels=np.array([5, 5, 7]))
    assert same.directions["video->text"].ranks.relevant.tolist() == [3, 3, 1]
    assert same.is_right(same.directions["video->text"], 1, 0)
    assert not found.is_right(found.directions["video->text"], 1, 0)


def test_a_modality_that_nobody_has() -> None:
    rows = shape_rows(range(5), 0.1)
    rows["audio"] = ModalityRows(torch.zeros(0, 24), np.zeros(0, np.int64))
    found = evaluate_list("all", rows, items=range(6))
    assert list(found.directions) == SIX[:2]
    assert found.missing == {"text": 1, "video": 1, "audio": 6}
    with pytest.raises(ConfigError, match="nothing to retrieve"):
        evaluate_list("all", {"text": rows["text"], "audio": rows["audio"]})


def test_wrong_use_is_named(tmp_path: Path) -> None:
    items = shape_items(24)
    report = shape_report(items, new=2)
    with pytest.raises(ConfigError, match="beyond the 10 given"):
        write_report(report, items[:10], tmp_path)
    with pytest.raises(ConfigError, match="at least one list"):
        RetrievalReport("none", "", ())
    with pytest.raises(ConfigError, match="two lists"):
        RetrievalReport("twice", "", (report.headline, report.headline))
    with pytest.raises(ConfigError, match="for 3 embedded rows"):
        ModalityRows(torch.eye(3), np.arange(2))
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot write the report to"):
        write_report(report, items, tmp_path / "file" / "report")


def test_a_failed_write_leaves_the_old_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    items = shape_items(24)
    report = shape_report(items, new=2)
    write_report(report, items, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match="No space left on device"):
        write_report(dataclasses.replace(report, protocol="other"), items, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_equal_reports_are_equal_files(tmp_path: Path) -> None:
    items = shape_items(24)
    first = write_report(shape_report(items, new=2), items, tmp_path / "a")
    second = write_report(shape_report(items, new=2), items, tmp_path / "b")
    for name in ("report.html", "report.md", "report.json"):
        assert (first.parent / name).read_bytes() == (second.parent / name).read_bytes()


class Tags(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    items = hostile_items()
    report = dataclasses.replace(
        shape_report(items, new=4), protocol=HOSTILE[0], note=HOSTILE[1], facts={HOSTILE[2]: HOSTILE[5]}
    )
    page = write_report(report, items, tmp_path).read_text(encoding="utf-8")
    tags = Tags()
    tags.feed(page)
    assert sum(tag == "script" for tag, _ in tags.found) == 2
    assert not [tag for tag, _ in tags.found if tag in ("img", "video", "iframe", "object", "base")]
    assert [found for tag, found in tags.found if tag == "link"] == [{"rel": "icon", "href": "data:,"}]
    assert not [name for _, attributes in tags.found for name in attributes if name.startswith("on")]
    shown = {text for item in payload(page)["items"].values() for text in item["captions"].values()}
    assert HOSTILE[0] in shown and HOSTILE[2] in shown
    assert max(map(len, shown)) <= gallery_data.CAPTION_LETTERS
    assert "<script>" not in template.render(report, items)[1]
    assert "http" not in re.sub(r"data:image/[^\"]*|http-equiv", "", page)


def test_every_medium_is_embedded_once() -> None:
    items = shape_items(36, media=True)
    page = template.render(shape_report(items, new=6), items)[0]
    shown = payload(page)["items"]
    assert len(shown) == 36 and not [item for item in shown.values() if "left" in item]
    for kind in ("poster", "waveform", "clip", "sound"):
        have = {int(number) for number, item in shown.items() if kind in item}
        assert have == {number for number, item in enumerate(items) if getattr(item, kind) is not None}, kind
    assert page.count(";base64,") == sum(len({"poster", "waveform", "clip", "sound"} & set(i)) for i in shown.values())
    assert page.count("data:image/webp") == 36 and page.count("data:audio/webm") == 35


def test_queries_are_listed_worst_first_and_their_right_answers_marked() -> None:
    items = shape_items()
    report = shape_report(items, noise=0.9)
    data = payload(template.render(report, items)[0])
    known = data["lists"][0]
    for shown, direction in zip(known["directions"], report.headline.directions.values(), strict=True):
        ask, answer = known["rows"][shown["query"]], known["rows"][shown["gallery"]]
        answerable = np.flatnonzero(direction.ranks.answerable)
        assert shown["asked"] == len(shown["queries"]) == len(answerable)
        assert sorted(shown["shuffled"]) == list(range(len(answerable))) != shown["shuffled"]
        for query, rank, _, bits, found, scores, *right in shown["queries"]:
            own = ask[query][0]
            assert [answer[row][0] == own for row in found] == [bool(bits >> place & 1) for place in range(5)]
            assert scores == sorted(scores, reverse=True)
            assert bool(right) == (rank > 5) == (bits == 0)
            assert not right or answer[right[0]][0] == own
        ranks = [query[1] for query in shown["queries"]]
        assert ranks == sorted(ranks, reverse=True)
        assert ranks[0] == round(np.nanmax(direction.ranks.expected_rank), 1)


def test_hubs_are_those_that_most_queries_find() -> None:
    items = shape_items(60)
    rows = shape_rows(range(60), 0.5)
    text, video = rows["text"], rows["video"]
    video.embeddings[7] = torch.nn.functional.normalize(text.embeddings.sum(0), dim=0)
    report = RetrievalReport("hubs", "", (evaluate_list("all", {"text": text, "video": video}),))
    data = payload(template.render(report, items)[0])["lists"][0]
    way = data["directions"][0]
    found = report.headline.directions["text->video"].ranks.top_indices[:, :10]
    counts = [(found == row).sum() for row in range(60)]
    assert [hub[1] for hub in way["hubs"]] == sorted((count for count in counts if count), reverse=True)[:30]
    row, count, queries, bits = way["hubs"][0]
    assert data["rows"]["video"][row][0] == 7 and count == counts[7] == max(counts)
    asked = [data["rows"]["text"][query][0] for query in queries]
    places = [int(np.flatnonzero(found[query] == 7)[0]) for query in asked]
    assert len(asked) == 5 and places == sorted(places)
    assert [bool(bits >> place & 1) for place in range(5)] == [query == 7 for query in asked]


@pytest.mark.parametrize("bytes_each", [2_000, 20_000, 60_000, 70_000])
def test_the_page_keeps_its_budget_and_says_what_it_left_out(bytes_each: int) -> None:
    count = 600
    jpeg, webm = b"\xff\xd8\xff" + bytes(bytes_each), b"\x1a\x45\xdf" + bytes(bytes_each)
    items = [GalleryItem(f"{number}", ("word " * 3000,), jpeg, jpeg, (), jpeg, webm) for number in range(count)]
    rows = shape_rows(range(count), 3.0)
    page = template.render(RetrievalReport("large", "", (evaluate_list("all", rows),)), items)[0]
    data = payload(page)
    assert len(page) < gallery_data.GALLERY_BYTES + 100_000
    assert len(data["lists"][0]["directions"][0]["queries"]) == count
    kinds = {"poster": "jpeg", "waveform": "jpeg", "clip": "jpeg", "sound": "webm"}
    for number, item in data["items"].items():
        unseen = {"waveform"} if is_silent(int(number)) else set()
        assert {*item} & {*kinds} | {*item.get("left", [])} == {*kinds} - unseen
    used = {kind: sum(len(item.get(kind, "")) for item in data["items"].values()) for kind in kinds}
    assert used["poster"] + used["waveform"] <= gallery_data.STILL_BYTES
    limits = {"poster": 64 << 10, "waveform": 64 << 10, "clip": 48 << 10, "sound": 24 << 10}
    assert {kind for kind in kinds if used[kind]} == {kind for kind, limit in limits.items() if bytes_each < limit}
    if bytes_each == 20_000:  # used up, but for one medium
        assert len(page) > gallery_data.GALLERY_BYTES - 250_000
    first = data["lists"][0]["directions"][0]["queries"][0]
    worst = [data["items"][str(data["lists"][0]["rows"]["video"][row][0])] for row in first[4]]
    assert bytes_each > 64 << 10 or all("poster" in item for item in worst)


def test_what_has_no_room_is_not_even_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clips cost a second each: once one found no room, no other is decoded."""
    made: list[str] = []

    class Slow:
        captions, missing, poster, waveform, sound = ("a caption",), (), None, None, None

        def __init__(self, key: str) -> None:
            self.key = key

        @property
        def clip(self) -> bytes:
            made.append(self.key)
            return b"RIFF" + bytes(30_000 if len(made) < 4 else 3)

    monkeypatch.setattr(gallery_data, "GALLERY_BYTES", 130_000)
    rows = shape_rows(range(60), 1.0)
    found = evaluate_list("all", {name: rows[name] for name in ("text", "video")})
    page = template.render(RetrievalReport("slow", "", (found,)), [Slow(str(number)) for number in range(60)])[0]
    shown = payload(page)["items"].values()
    assert len(made) == 3 and sum("clip" in item for item in shown) == 2
    assert sum("clip" in item.get("left", []) for item in shown) == 58


def test_text_that_is_too_long_lists_fewer_queries_the_worst_and_a_random_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    count = 600
    items = [GalleryItem(f"{number}", ("word",)) for number in range(count)]
    found = evaluate_list("all", {name: shape_rows(range(count), 3.0)[name] for name in ("text", "video")})
    monkeypatch.setattr(gallery_data, "TEXT_BYTES", 80_000)
    way = payload(template.render(RetrievalReport("long", "", (found,)), items)[0])["lists"][0]["directions"][0]
    assert (len(way["queries"]), way["asked"]) == (200, 600)
    ranks = np.sort(found.directions["text->video"].ranks.expected_rank)[::-1].round(1)
    shown = [query[1] for query in way["queries"]]
    assert shown[:100] == ranks[:100].tolist() and shown[100:] != ranks[100:200].tolist()
    assert min(shown[100:]) < np.median(ranks)


def test_histogram_counts_every_query() -> None:
    rows = shape_rows(range(60), 3.0)
    found = evaluate_list("all", {name: rows[name] for name in ("text", "video")})
    report = RetrievalReport("ranks", "", (found,))
    page = template.render(report, [GalleryItem(str(number)) for number in range(60)])[0]
    spoken = re.search(r'aria-label="text-&gt;video: share of queries[^"]*"', page)[0]
    shares = [float(value) for value in re.findall(r": ([\d.]+) %", spoken)]
    assert sum(shares) == pytest.approx(100, abs=0.5)
    assert shares[0] == pytest.approx(found.directions["text->video"].metrics["R@1"], abs=0.1)


def test_poster() -> None:
    frame = np.zeros((3, 90, 320), np.uint8)
    frame[0, :, 160:] = 255
    picture = Image.open(io.BytesIO(poster_jpeg(frame)))
    assert (picture.format, picture.size) == ("JPEG", (160, 45))
    assert picture.getpixel((150, 20))[0] > 240 > 15 > picture.getpixel((10, 20))[0]
    assert Image.open(io.BytesIO(poster_jpeg(np.zeros((1, 20, 10), np.uint8)))).size == (10, 20)
    noise = np.random.default_rng(0).integers(0, 256, (3, 720, 720), dtype=np.uint8)
    assert len(poster_jpeg(noise)) < gallery_data.PICTURE_BYTES / 2
    for wrong in (frame.astype(np.float32), frame[0], np.zeros((4, 2, 2), np.uint8), np.zeros((3, 0, 2), np.uint8)):
        with pytest.raises(ValueError, match="a frame must be uint8"):
            poster_jpeg(wrong)


def test_clip() -> None:
    frames = np.zeros((4, 3, 90, 320), np.uint8)
    for step in range(4):
        frames[step, step % 3, :, 80 * step : 80 * step + 80] = 255
    clip = Image.open(io.BytesIO(clip_webp(frames, 1.0) or b""))
    assert (clip.format, clip.size, clip.n_frames, clip.info["loop"]) == ("WEBP", (128, 36), 4, 0)
    clip.seek(1)
    clip.load()
    assert clip.info["duration"] == 250 and clip.convert("RGB").getpixel((48, 18))[1] > 200
    noise = np.random.default_rng(0).integers(0, 256, (12, 3, 128, 128), dtype=np.uint8)
    assert len(clip_webp(noise, 3.0) or b"") <= gallery.CLIP_BYTES
    assert clip_webp(np.concatenate([noise] * 5), 15.0) is None
    assert clip_webp(frames[:1], 1.0) is None and clip_webp(frames[[1, 1, 1]], 1.0) is None
    with pytest.raises(ValueError, match="a clip must be uint8"):
        clip_webp(frames[0], 1.0)


def test_sound() -> None:
    seconds = np.arange(5 * gallery.SOUND_RATE_HZ) / gallery.SOUND_RATE_HZ
    wave = 0.5 * np.sin(2 * np.pi * 440 * seconds).astype(np.float32)
    sound = sound_webm(wave)
    assert sound and len(sound) < gallery.SOUND_BYTES and sound == sound_webm(wave)
    back = read_audio(sound, start_seconds=0.0, end_seconds=5.0, sample_rate_hz=8000)
    assert np.abs(np.fft.rfft(back)).argmax() / 5 == pytest.approx(440, abs=1)
    assert np.abs(back).max() == pytest.approx(0.5, abs=0.1)
    assert sound_webm(np.zeros(0, np.float32)) is None
    noise = np.random.default_rng(0).normal(size=len(wave)).astype(np.float32)
    assert len(sound_webm(noise) or b"") < gallery.SOUND_BYTES
    assert sound_webm(np.full(9, np.nan, np.float32))


def test_waveform() -> None:
    wave = np.zeros(6400, np.float32)
    wave[3200:3300] = -0.5
    picture = waveform_svg(wave).decode()
    assert picture.startswith("<svg") and len(picture) < 1500
    heights = [int(height) for height in re.findall(r"v(\d+)", picture)]
    assert len(heights) == 64 and heights[32] == 34 and sum(heights) == 34
    for silent in (np.zeros(0, np.float32), np.zeros(100, np.float32), np.full(9, np.nan, np.float32)):
        assert "v0" in waveform_svg(silent).decode()


def test_fingerprint() -> None:
    first = fingerprint({"name": "a", "k": 1}, ["x", "y"])
    assert re.fullmatch("[0-9a-f]{16}", first)
    assert first == fingerprint({"k": 1, "name": "a"}, ["x", "y"])
    others = [fingerprint({"name": "a", "k": 2}, ["x", "y"]), fingerprint({"name": "a", "k": 1}, ["y", "x"])]
    assert len({first, *others}) == 3
