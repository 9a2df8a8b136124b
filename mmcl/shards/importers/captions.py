"""Sets of media with captions."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from mmcl.shards.importers.read import Item, Wanted, csv_of, entry, json_of, lines_of, malformed, number, texts
from mmcl.types import ConfigError


def msrvtt_1k_a(path: Path, wanted: Wanted) -> Iterator[Item]:
    """``MSRVTT_JSFUSION_test.csv``: ``key,vid_key,video_id,sentence``."""
    for line, row in csv_of(path, ("video_id", "sentence"), "MSRVTT_JSFUSION_test.csv"):
        if not row["video_id"] or not row["sentence"].strip():
            raise malformed(path, line, "no video_id or no sentence")
        yield Item(row["video_id"], (row["video_id"],), (row["sentence"].strip(),))


def msrvtt_full(path: Path, wanted: Wanted) -> Iterator[Item]:
    """``MSRVTT_data.json`` or ``*videodatainfo*.json``: ``videos`` with their ``split``, ``sentences`` about them."""
    tree = json_of(path, dict, "MSRVTT_data.json or test_videodatainfo.json")
    videos, sentences = entry(path, "the whole", tree, videos=list, sentences=list)
    captions: dict[str, list[str]] = {}
    asked = {"val": "validate"}.get(wanted.split, wanted.split)
    for place, video in enumerate(videos):
        name, split = entry(path, f"videos[{place}]", video, video_id=str, split=str)
        if split == asked:
            captions[name] = []
    for place, sentence in enumerate(sentences):
        name, text = entry(path, f"sentences[{place}]", sentence, video_id=str, caption=str)
        if name in captions:
            captions[name].append(text)
    for name, found in captions.items():
        yield Item(name, (name,), texts(path, name, found))


def msvd(path: Path, wanted: Wanted) -> Iterator[Item]:
    """``AllVideoDescriptions.txt``: ``NAME_START_END A sentence`` a line, after lines of comment."""
    captions: dict[str, list[str]] = {}
    for line, text in lines_of(path, "AllVideoDescriptions.txt, the text form of the captions"):
        if text.startswith("#"):
            continue
        name, _, sentence = text.partition(" ")
        if not sentence.strip() or len(name.rsplit("_", 2)) != 3:
            raise malformed(path, line, "not NAME_START_END and a sentence")
        captions.setdefault(name, []).append(sentence.strip())
    for name, found in captions.items():
        yield Item(name, (name,), tuple(found), group=name.rsplit("_", 2)[0])


def didemo(path: Path, wanted: Wanted) -> Iterator[Item]:
    """``test_data.json``: a list of descriptions with their ``video``; those of a video become one paragraph."""
    captions: dict[str, list[str]] = {}
    for place, each in enumerate(json_of(path, list, "train_data.json, val_data.json or test_data.json")):
        video, text = entry(path, f"[{place}]", each, video=str, description=str)
        captions.setdefault(video, []).append(text)
    for video, found in captions.items():
        # the media are handed on as VIDEO.mp4, or with the extension after the old one
        yield Item(video, (video, Path(video).stem), _paragraph(texts(path, video, found)))


def activitynet(path: Path, wanted: Wanted) -> Iterator[Item]:
    """``val_1.json``: by video its ``duration``, ``timestamps`` and ``sentences``, which become one paragraph."""
    for name, each in json_of(path, dict, "train.json, val_1.json or val_2.json").items():
        times, sentences = entry(path, name, each, timestamps=list, sentences=list)
        if len(times) != len(sentences):
            raise ConfigError(f"{path}: {name} has {len(times)} timestamps and {len(sentences)} sentences")
        yield Item(name, (name, name.removeprefix("v_")), _paragraph(texts(path, name, sentences)))


def lsmdc(path: Path, wanted: Wanted) -> Iterator[Item]:
    """``LSMDC16_challenge_1000_publictect.csv``: tabs between clip, four times and the sentence; no header."""
    for line, text in lines_of(path, "LSMDC16_challenge_1000_publictect.csv"):
        cells = text.split("\t")
        if len(cells) != 6 or not cells[0] or not cells[5].strip():
            raise malformed(path, line, f"{len(cells)} fields between tabs, not a clip, four times and a sentence")
        yield Item(cells[0], (cells[0],), (cells[5].strip(),), group=cells[0].rpartition("_")[0])


def vatex(path: Path, wanted: Wanted) -> Iterator[Item]:
    """``vatex_validation_v1.0.json``: a list of ``videoID`` (``NAME_START_END``) and ``enCap``."""
    for place, each in enumerate(json_of(path, list, "vatex_validation_v1.0.json")):
        name, captions = entry(path, f"[{place}]", each, videoID=str, enCap=list)
        yield Item(name, (name, name[:11]), texts(path, f"[{place}]", captions), group=name[:11])


def audiocaps(path: Path, wanted: Wanted) -> Iterator[Item]:
    """``test.csv``: ``audiocap_id,youtube_id,start_time,caption``, a row per caption."""
    found: dict[tuple[str, int], list[str]] = {}
    for line, row in csv_of(path, ("youtube_id", "start_time", "caption"), "train.csv, val.csv or test.csv"):
        if not row["youtube_id"] or not row["caption"].strip():
            raise malformed(path, line, "no youtube_id or no caption")
        place = row["youtube_id"], int(number(path, line, row, "start_time"))
        found.setdefault(place, []).append(row["caption"].strip())
    for (name, start), captions in found.items():
        yield Item(f"{name}_{start}", cut_names(name, start), tuple(captions), group=name)


def clotho(path: Path, wanted: Wanted) -> Iterator[Item]:
    """``clotho_captions_evaluation.csv``: ``file_name,caption_1,…,caption_5``."""
    columns = [f"caption_{place}" for place in range(1, 6)]
    for line, row in csv_of(path, ("file_name", *columns), "clotho_captions_evaluation.csv"):
        if not row["file_name"]:
            raise malformed(path, line, "no file_name")
        yield Item(row["file_name"], (row["file_name"],), texts(path, f"line {line}", [row[name] for name in columns]))


def cut_names(name: str, start: int, seconds: int = 10) -> tuple[str, ...]:
    """What the tools that cut clips out of videos call them, most exact first."""
    end = start + seconds
    return (
        f"{name}_{start:06d}_{end:06d}",
        f"{name}_{start * 1000}_{end * 1000}",
        f"{name}_{start:06d}",
        f"{name}_{start}_{end}",
        f"{name}_{start}",
        f"Y{name}",
        name,
    )


def _paragraph(sentences: tuple[str, ...]) -> tuple[str, ...]:
    return (" ".join(sentences),) if sentences else ()
