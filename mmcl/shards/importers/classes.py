"""Sets of media with classes, which become words: they are names for people, and fill prompts."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from mmcl.shards.importers.captions import cut_names
from mmcl.shards.importers.read import Item, Wanted, csv_of, lines_of, malformed, need_folder, number
from mmcl.types import ConfigError


def words(name: str) -> str:
    """A class name as words.

    >>> words("ApplyEyeMakeup"), words("brush_hair"), words("playing flute")
    ('apply eye makeup', 'brush hair', 'playing flute')
    """
    return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name.replace("_", " ")).lower().strip()


def vggsound(path: Path, wanted: Wanted) -> Iterator[Item]:
    """``vggsound.csv``: video, start, class, split; no header."""
    columns = ("video", "start", "class", "split")
    for line, row in csv_of(path, columns, "vggsound.csv", header=False):
        start = int(number(path, line, row, "start"))
        if row["split"] not in ("train", "test") or not row["class"] or not row["video"]:
            raise malformed(path, line, "not a video, a start, a class, and train or test")
        yield _labelled(
            f"{row['video']}_{start}", cut_names(row["video"], start), row["class"], row["video"], row["split"]
        )


def ucf101(path: Path, wanted: Wanted) -> Iterator[Item]:
    """The folder with ``classInd.txt``, ``trainlist01.txt`` and ``testlist01.txt``."""
    folder = need_folder(path, "ucfTrainTestlist")
    known = set(ucf101_classes(path))
    source = folder / f"{wanted.split}list{wanted.fold:02d}.txt"
    for line, text in lines_of(source, "a list of ucfTrainTestlist"):
        found = re.fullmatch(r"(\w+)/(v_\w+_g\d+)_(c\d+)\.avi(?: \d+)?", text.strip())
        if found is None or words(found[1]) not in known:
            raise malformed(source, line, "not CLASS/v_CLASS_gNN_cNN.avi of a class of classInd.txt")
        name = f"{found[2]}_{found[3]}"
        yield Item(name, (name,), label=words(found[1]), group=found[2])


def ucf101_classes(path: Path) -> list[str]:
    """The classes of ``classInd.txt``."""
    source, names = path / "classInd.txt", []
    for line, text in lines_of(source, "classInd.txt"):
        place, _, name = text.strip().partition(" ")
        if not place.isdigit() or not name.strip():
            raise malformed(source, line, "not a number and a class")
        names.append(words(name.strip()))
    return names


def hmdb51(path: Path, wanted: Wanted) -> Iterator[Item]:
    """The folder with ``CLASS_test_split1.txt`` of every class: a video, and 0 (unused), 1 (train) or 2 (test)."""
    code = {"train": "1", "test": "2"}[wanted.split]
    for source in _hmdb51_lists(path, wanted.fold):
        for line, text in lines_of(source, "a list of testTrainMulti_7030_splits"):
            name, _, use = text.strip().rpartition(" ")
            if use not in ("0", "1", "2") or not name.endswith(".avi"):
                raise malformed(source, line, "not a video and 0, 1 or 2")
            if use == code:
                yield Item(name, (name,), label=_hmdb51_class(source))


def hmdb51_classes(path: Path) -> list[str]:
    """One class per list."""
    return sorted({_hmdb51_class(source) for source in _hmdb51_lists(path, 1)})


def _hmdb51_lists(path: Path, fold: int) -> list[Path]:
    found = sorted(need_folder(path, "testTrainMulti_7030_splits").glob(f"*_test_split{fold}.txt"))
    if not found:
        raise ConfigError(f"{path}: no CLASS_test_split{fold}.txt; testTrainMulti_7030_splits is needed")
    return found


def _hmdb51_class(source: Path) -> str:
    return words(re.sub(r"_test_split\d\.txt$", "", source.name))


def k400(path: Path, wanted: Wanted) -> Iterator[Item]:
    """``validate.csv``: ``label,youtube_id,time_start,time_end,split``."""
    columns = ("label", "youtube_id", "time_start", "time_end", "split")
    for line, row in csv_of(path, columns, "train.csv, validate.csv or test.csv"):
        start, end = (int(number(path, line, row, column)) for column in ("time_start", "time_end"))
        name = row["youtube_id"]
        if not name or not row["label"] or end <= start:
            raise malformed(path, line, "no youtube_id, no label, or a time_end that is not after time_start")
        split = {"validate": "val"}.get(row["split"], row["split"])
        yield _labelled(f"{name}_{start}", cut_names(name, start, end - start), row["label"], name, split)


def esc50(path: Path, wanted: Wanted) -> Iterator[Item]:
    """``esc50.csv``: ``filename,fold,target,category,esc10,src_file,take``."""
    for line, row in csv_of(path, ("filename", "fold", "category", "src_file"), "esc50.csv"):
        yield _folded(path, line, row, row["filename"], row["category"], row["src_file"])


def urbansound8k(path: Path, wanted: Wanted) -> Iterator[Item]:
    """``UrbanSound8K.csv``: ``slice_file_name,fsID,start,end,salience,fold,classID,class``."""
    for line, row in csv_of(path, ("slice_file_name", "fsID", "fold", "class"), "UrbanSound8K.csv"):
        yield _folded(path, line, row, row["slice_file_name"], row["class"], row["fsID"])


def _folded(path: Path, line: int, row: dict[str, str], name: str, label: str, group: str) -> Item:
    if not name or not label or not row["fold"].isdigit():
        raise malformed(path, line, "no file name, no class, or a fold that is no number")
    return Item(name, (name,), label=words(label), group=group, facts={"fold": int(row["fold"])})


def _labelled(name: str, files: tuple[str, ...], label: str, group: str, split: str) -> Item:
    return Item(name, files, label=words(label), group=group, split=split)
