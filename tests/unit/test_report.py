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
from support.reports import shape_items, shape_report, shape_rows

from mmcl.evaluation import template
from mmcl.evaluation.gallery import GalleryItem, poster_jpeg, waveform_svg
from mmcl.evaluation.protocols import fingerprint
from mmcl.evaluation.ranking import retrieval_metrics
from mmcl.evaluation.report import (
    ModalityRows,
    RetrievalReport,
    evaluate_list,
    write_report,
)
from mmcl.evaluation.tables import table
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
    assert not [tag for tag, _ in tags.found if tag in ("img", "iframe", "object", "base")]
    assert [found for tag, found in tags.found if tag == "link"] == [{"rel": "icon", "href": "data:,"}]
    assert not [name for _, attributes in tags.found for name in attributes if name.startswith("on")]
    shown = {text for item in payload(page)["items"].values() for text in item["captions"].values()}
    assert HOSTILE[0] in shown and HOSTILE[2] in shown
    assert max(map(len, shown)) <= template.CAPTION_LETTERS
    assert "<script>" not in template.render(report, items)[1]
    assert "http" not in re.sub(r"data:image/[^\"]*|http-equiv", "", page)


def test_each_picture_is_embedded_once() -> None:
    items = shape_items()
    page = template.render(shape_report(items), items)[0]
    shown = payload(page)["items"].values()
    pictures = [item[kind] for item in shown for kind in ("poster", "waveform") if kind in item]
    assert len(pictures) > 200 and page.count("data:image/") == len(pictures)


def test_right_answers_are_marked() -> None:
    items = shape_items()
    report = shape_report(items, noise=0.9)
    data = payload(template.render(report, items)[0])
    for shown, direction in zip(data["lists"][0]["directions"], report.headline.directions.values(), strict=True):
        for example in shown["examples"]["worst"] + shown["examples"]["best"]:
            own = example["query"][0]
            assert [entry[0] == own for entry in example["top"]] == [bool(entry[3]) for entry in example["top"]]
            assert example.get("right", [own])[0] == own
            assert ("right" in example) == (example["rank"] > 5)
        worst = [example["rank"] for example in shown["examples"]["worst"]]
        assert worst == sorted(worst, reverse=True)
        assert worst[0] == round(np.nanmax(direction.ranks.expected_rank), 1)


@pytest.mark.parametrize("bytes_each", [30_000, 60_000, 70_000])
def test_the_page_keeps_its_budget(bytes_each: int) -> None:
    count = 600
    poster = b"\xff\xd8\xff" + bytes(bytes_each)
    items = [GalleryItem(f"{number}", ("word " * 3000,), poster, poster) for number in range(count)]
    rows = shape_rows(range(count), 3.0)
    page = template.render(RetrievalReport("large", "", (evaluate_list("all", rows),)), items)[0]
    assert len(page) < template.GALLERY_BYTES + 100_000
    assert payload(page)["lists"][0]["directions"][0]["examples"]["worst"]


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
    assert len(poster_jpeg(noise)) < template.PICTURE_BYTES / 2
    for wrong in (frame.astype(np.float32), frame[0], np.zeros((4, 2, 2), np.uint8), np.zeros((3, 0, 2), np.uint8)):
        with pytest.raises(ValueError, match="a frame must be uint8"):
            poster_jpeg(wrong)


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
