"""The rows of shards that others made: tars in the layouts of webdataset, video2dataset, img2dataset and open_clip.

A sample is what lies under one key: a video, a picture, sound (beside a video or a picture, or alone), a caption in
``txt`` or several in the JSON. Its JSON is kept as metadata, its ``group`` (or the ``url`` that it was cut from) as the
group, ``label`` or ``cls`` as the label. A sample is a whole clip: stretches and crops that its JSON may name say how
it was made, and cut nothing. Members are a stranger's: nothing is unpickled, what our table of extensions does not name
is left out and counted, names that lead out of a folder are refused.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from mmcl.shards.index import TarContents, read_tar
from mmcl.shards.inputs import Row, check_text, plain, with_keys
from mmcl.shards.member_index import Member
from mmcl.shards.members import ROLES, Bytes, Role, parse_sample, role_of
from mmcl.shards.reader import MAX_SAMPLE_BYTES, RawSample
from mmcl.types import ConfigError, SampleError, Source

_ORDER: tuple[Role, ...] = ("video", "image", "audio")
"""the first of these that a sample has decides its length"""
_WRITTEN = ("captions", "caption", "group", "label", "label_name", "duration_seconds", "video", "audio", "content_hash")
"""facts that ``make`` states itself"""
_HARMLESS = ("folder", "WebDataset metadata")
_MEDIA = {extension for extension, role in ROLES.items() if role in _ORDER}


def find_tars(source: str | Path, *, without: Path | None = None) -> list[Path]:
    """The tars that ``source`` names, sorted: a folder of them, one file, a pattern with ``*`` or ``{000..127}``.

    ``without``: a folder, perhaps inside of it, that is not looked into: where the output goes.

    Empty where it names something else. Raises ``ConfigError`` where it names tars that are not there, and for a folder
    that holds both tars and media files.
    """
    path = Path(source).expanduser().absolute()
    if path.is_dir():
        tars = sorted(
            tar
            for tar in path.rglob("*.tar")
            if not tar.name.startswith(".") and (without is None or without not in tar.parents)
        )
        loose = (file for file in path.rglob("*") if tars and file.suffix[1:].lower() in _MEDIA)
        medium = next(loose, None)
        if medium is not None:
            raise ConfigError(
                f"{source} holds both shards ({tars[0].name}) and media files ({medium.name}); "
                f"name the shards by a pattern such as {path / '*.tar'}, or the files by a table"
            )
        return tars
    if path.exists():
        return [path] if path.suffix.lower() == ".tar" else []
    text = str(path)
    if not text.endswith(".tar") or not any(sign in text for sign in "{*?["):
        return []
    found: list[Path] = []
    for name in _without_braces(text):
        root = Path(name).anchor
        matches = (
            sorted(Path(root).glob(name.removeprefix(root))) if any(sign in name for sign in "*?[") else [Path(name)]
        )
        found += matches
        if not matches or not matches[0].exists():
            raise ConfigError(f"{source}: {name} is not there")
    return found


def _without_braces(text: str) -> list[str]:
    if "{" not in text:
        return [text]
    from webdataset.shardlists import expand_urls

    return [str(name) for name in expand_urls(text)]


def read_tar_rows(tars: Sequence[Path]) -> list[Row]:
    """One row per sample, in the order of the tars; what is wrong with a tar itself is a row with that problem.

    Raises ``ConfigError`` where there is no sample, ``RunError`` where a tar cannot be read.
    """
    root = os.path.commonpath([tar.parent for tar in tars])
    rows = [row for tar in tars for row in _rows_of(tar, tar.relative_to(root).as_posix())]
    if not any(row.files for row in rows):
        problems = "".join(f"; {row.name}: {row.problem[1]}" for row in rows[:3] if row.problem)
        raise ConfigError(f"no sample in {len(tars)} tars, the first is {tars[0]}{problems}")
    return with_keys(rows)


def _rows_of(tar: Path, shard: str) -> Iterator[Row]:
    if not tar.is_file():
        yield Row("", shard, str(tar), group=shard, problem=("not_a_file", f"{tar} is a folder, a pipe or a device"))
        return
    contents = read_tar(tar)
    for problem in _problems(contents):
        yield Row("", shard, str(tar), group=shard, problem=("bad_shard", problem))
    with tar.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if contents.keys else b""
        view = memoryview(mapped)
        for key, members in zip(contents.keys, contents.members, strict=True):
            yield _row(tar, shard, key, members, view)


def _problems(contents: TarContents) -> list[str]:
    odd = [f"{count} × {why}" for why, count in sorted(contents.ignored.items()) if why not in _HARMLESS]
    return contents.problems + (["members that belong to no sample: " + ", ".join(odd)] if odd else [])


def _row(tar: Path, shard: str, key: str, members: list[Member], view: memoryview) -> Row:
    name = f"{shard}/{key}"
    row = Row("", name, str(tar), group=name, member_key=key)
    try:
        check_text([key])
        if sum(member.num_bytes for member in members) > MAX_SAMPLE_BYTES:
            raise SampleError("too_large", f"{key} holds over {MAX_SAMPLE_BYTES} bytes")
        parts: dict[str, Bytes] = {m.extension: view[m.offset : m.offset + m.num_bytes] for m in members}
        sample = parse_sample(RawSample(key, parts, Source(0, 0)))
        media: dict[Role | None, Member] = {}
        for member in members:
            media.setdefault(role_of(member.extension), member)
        files = tuple(media[role] for role in _ORDER if role in media)
        if not files:
            raise SampleError("no_media", f"{key}: {', '.join(sorted(parts))}")
        name_of_label = sample.metadata.get("label_name", sample.metadata.get("label"))
        metadata = {name: plain(value) for name, value in sample.metadata.items() if name not in _WRITTEN}
        row = Row(
            "",
            name,
            str(tar),
            sample.captions,
            label=name_of_label if isinstance(name_of_label, str) and name_of_label else sample.label,
            group=sample.group or name,
            metadata=metadata,
            files=files,
            member_key=key,
            ignored=sample.ignored,
        )
        check_text([row.name, row.label, row.group, row.metadata])
    except SampleError as error:
        reason = (error.reason, error.detail)
        return Row("", name, str(tar), group=name, member_key=key, problem=reason)
    return row
