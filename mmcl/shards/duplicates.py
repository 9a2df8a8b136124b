"""Rows that would make the same sample: the same media bytes (SHA-256), the same stretch of them, the same crop.

All other settings are those of the whole run, so this is the identity of what is encoded. Captions, labels and names do
not count: a clip with two captions in two rows is one clip. The first row in the order of the input is the original.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mmcl.shards.engine import Crew
from mmcl.shards.inputs import Row
from mmcl.shards.sources import source_sha256
from mmcl.types import SampleError


def read_digest(row: Row) -> str | SampleError:
    """Runs in a child process: SHA-256 of a row's media files, or why there is none."""
    try:
        return source_sha256(row)
    except SampleError as error:
        return error


def find_duplicates(rows: Sequence[Row], crew: Crew) -> dict[int, int]:
    """``duplicates_of`` rows before anything is encoded; one that cannot be read is none, and fails later."""
    usable = {number: row for number, row in enumerate(rows) if row.problem is None}
    media = list({(row.path, row.files): row for row in usable.values()}.values())
    found = dict(zip([(row.path, row.files) for row in media], crew(read_digest, media), strict=True))
    digests = {number: found[row.path, row.files] for number, row in usable.items()}
    return duplicates_of(rows, {number: digest for number, digest in digests.items() if isinstance(digest, str)})


def duplicates_of(rows: Sequence[Row], digests: Mapping[int, str]) -> dict[int, int]:
    """Number of each duplicate → number of its original; ``digests``: by number, of the rows that could be read."""
    first: dict[tuple[Any, ...], int] = {}
    same: dict[int, int] = {}
    for number in sorted(digests):
        row = rows[number]
        identity = (digests[number], row.start_seconds or 0.0, row.end_seconds, row.crop)
        original = first.setdefault(identity, number)
        if original != number:
            same[number] = original
    return same


def name_duplicates(rows: Sequence[Row], same: Mapping[int, int], *, left_out: bool) -> list[dict[str, Any]]:
    """The lines of ``duplicates.jsonl``."""
    return [
        {
            "row": number,
            "key": rows[number].key,
            "path": rows[number].name,
            "same_as_row": original,
            "same_as_key": rows[original].key,
            "same_as_path": rows[original].name,
            "left_out": left_out,
        }
        for number, original in sorted(same.items())
    ]


def json_lines(facts: Iterable[Mapping[str, Any]]) -> bytes:
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in facts).encode("utf-8", "replace")
