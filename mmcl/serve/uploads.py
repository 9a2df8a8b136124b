"""What a stranger sends: kept in a file of its own while it is needed, and decoded in a process that may be ended."""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy.typing as npt

from mmcl.media.inputs import decode_windows, is_picture
from mmcl.media.probe import probe, read_head
from mmcl.shards.pool import Lost, run_jobs
from mmcl.types import AudioSpec, Modality, SampleError, VideoSpec


@dataclass(frozen=True, slots=True)
class Limits:
    """What one request may cost."""

    upload_bytes: int = 64 << 20
    text_letters: int = 2000
    top: int = 100
    """items found"""
    decode_seconds: float = 20.0
    request_seconds: float = 40.0
    """from its first byte to its answer"""
    at_once: int = 8
    """searches that run or wait; further ones are sent away"""


class TooLargeError(Exception):
    """An upload of more bytes than are allowed."""


@contextmanager
def upload_folder() -> Iterator[Path]:
    """A folder for uploads that is gone when the app ends."""
    with tempfile.TemporaryDirectory(prefix="mmcl-serve-") as folder:
        yield Path(folder)


async def receive(parts: AsyncIterator[bytes], path: Path, limit_bytes: int) -> None:
    """Writes a request's body to ``path``.

    Raises:
        TooLargeError: as soon as it is longer than ``limit_bytes``.
    """
    received = 0
    with path.open("wb") as file:
        async for part in parts:
            received += len(part)
            if received > limit_bytes:
                raise TooLargeError
            file.write(part)


def decoded(path: Path, specs: Mapping[Modality, VideoSpec | AudioSpec], seconds: float) -> tuple[Modality, list[Any]]:
    """Windows of an uploaded file as its tower eats them: of its picture if it has one, else of its sound.

    Raises:
        SampleError: no such media, or not decoded within ``seconds``, in a process of its own.
    """
    jobs = run_jobs(_decode, [(path, dict(specs))], workers=1, timeout_seconds=seconds, preload="mmcl.media.inputs")
    with closing(jobs):
        found = next(jobs)
    if isinstance(found, Lost):
        raise SampleError(found.reason, found.detail)
    modality, windows = found
    return modality, list(windows)


def _decode(job: tuple[Path, dict[Modality, VideoSpec | AudioSpec]]) -> tuple[Modality, npt.NDArray[Any]]:
    path, specs = job
    if is_picture(read_head(path, 16)):
        modality = "video"
        if modality in specs:
            return modality, decode_windows(path.read_bytes(), specs[modality], 1)
    else:
        streams = probe(path)
        there = {"video": streams.video, "audio": streams.audio}
        for modality in ("video", "audio"):
            if there[modality] is not None and modality in specs:
                return modality, decode_windows(path, specs[modality], None)
        modality = " and ".join(name for name in there if there[name] is not None) or "neither picture nor sound"
    raise SampleError("no_tower", f"the file holds {modality}, the model takes {', '.join(specs) or 'text alone'}")
