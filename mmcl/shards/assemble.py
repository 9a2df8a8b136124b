"""Samples in order to shards, taking over what older shards of the folder hold."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mmcl.shards.files import writing
from mmcl.shards.manifest import ShardEntry, index_url
from mmcl.shards.member_index import ShardIndex
from mmcl.shards.members import parse_json
from mmcl.shards.prepare import Prepared, load_staged, staged_path
from mmcl.shards.reader import LocalShard
from mmcl.shards.writer import TarShard, is_full, sample_bytes, shard_name
from mmcl.types import RunError, SampleError


@dataclass(frozen=True, slots=True)
class _Placed:
    """A sample in a shard that was there before."""

    content_hash: str
    shard: int
    index: int
    num_bytes: int
    seconds: float


class Assembler:
    """Fills ``shard-000000.tar``, … with samples in the order they are added.

    A shard that holds exactly these samples already is left alone. One that is replaced stays mapped until its samples
    have found their new places, so nothing is encoded twice when rows are added in front.
    """

    def __init__(self, folder: Path, staging: Path, max_count: int, max_bytes: int) -> None:
        self.folder, self.staging = folder, staging
        self.samples = self.reused = 0
        self.seconds = 0.0
        self._limits = (max_count, max_bytes)
        self._entries: list[ShardEntry] = []
        self._waiting: list[tuple[str, Prepared]] = []
        self._waiting_bytes = 0
        self._writing: TarShard | None = None
        self._open: dict[int, LocalShard] = {}
        self._placed: dict[str, _Placed] = {}
        self._lists: dict[int, list[tuple[str, str]]] = {}
        self._unplaced: dict[int, int] = {}
        for path in sorted(folder.glob("shard-*.tar")):
            number = path.stem.removeprefix("shard-")
            if number.isdigit() and path.name == shard_name(int(number)):
                self._remember(int(number))

    def known_hash(self, key: str) -> str:
        """Content hash of the sample of this key in a shard, or ""."""
        placed = self._placed.get(key)
        return placed.content_hash if placed is not None else ""

    def add(self, key: str, sample: Prepared) -> None:
        """Appends a sample that is staged, or known."""
        placed = self._placed[key] if not sample.num_bytes else None
        num_bytes = sample.num_bytes if placed is None else placed.num_bytes
        if is_full(len(self._waiting), self._waiting_bytes, num_bytes, *self._limits):
            self._flush()
        self._waiting.append((key, sample))
        self._waiting_bytes += num_bytes
        self.samples += 1
        self.reused += placed is not None
        self.seconds += sample.seconds if placed is None else placed.seconds

    def finish(self) -> list[ShardEntry]:
        """Writes the last shard, takes away those beyond it, and returns the lines of the manifest."""
        if self._waiting:
            self._flush()
        for number in sorted(self._lists):
            if number >= len(self._entries):
                self._remove_index()
                path = self.folder / shard_name(number)
                with writing(path):
                    path.unlink(missing_ok=True)
                    Path(index_url(str(path))).unlink(missing_ok=True)
        return self._entries

    def close(self) -> None:
        if self._writing is not None:
            self._writing.discard()
            self._writing = None
        self._open.clear()

    def _remember(self, number: int) -> None:
        """Notes what an older shard holds; one that cannot be read holds nothing."""
        self._lists[number] = []
        path = self.folder / shard_name(number)
        try:
            shard = self._shard(number)
            for index in range(shard.index.num_samples):
                key = shard.index.key(index)
                files = shard.index.members(index)
                data = shard.read([(file.offset, file.offset + file.num_bytes) for file in files])
                members = {file.extension: part for file, part in zip(files, data, strict=True)}
                facts = parse_json(members.get("json", b""))
                name, seconds = str(facts.get("content_hash", "")), float(facts.get("duration_seconds") or 0.0)
                self._lists[number].append((key, name))
                self._placed[key] = _Placed(name, number, index, sample_bytes(key, members), seconds)
        except (RunError, SampleError, OSError):
            self._placed = {key: placed for key, placed in self._placed.items() if placed.shard != number}
            self._lists[number] = [("", f"unreadable {path.name}")]
        self._unplaced[number] = len(self._lists[number])
        self._open.pop(number, None)

    def _shard(self, number: int) -> LocalShard:
        if number not in self._open:
            path = str(self.folder / shard_name(number))
            side = Path(index_url(path))
            self._open[number] = LocalShard(path, ShardIndex(side.read_bytes(), side.name))
        return self._open[number]

    def _flush(self) -> None:
        number = len(self._entries)
        wanted = [(key, sample.content_hash) for key, sample in self._waiting]
        path = self.folder / shard_name(number)
        if self._lists.get(number) == wanted:
            self._entries.append(_describe(path, len(wanted)))
        else:
            self._write(number, path)
        for key, sample in self._waiting:
            if sample.num_bytes:
                with contextlib.suppress(OSError):
                    staged_path(self.staging, sample.content_hash).unlink(missing_ok=True)
            else:
                self._release(self._placed[key].shard)
        self._waiting, self._waiting_bytes = [], 0

    def _write(self, number: int, path: Path) -> None:
        self._remove_index()
        if self._unplaced.get(number):
            self._shard(number)  # mapped now, for those of its samples that come later
        self._writing = TarShard(path)
        for key, sample in self._waiting:
            self._writing.add(key, self._members(key, sample))
        self._entries.append(self._writing.close())
        self._writing = None

    def _members(self, key: str, sample: Prepared) -> Mapping[str, bytes | memoryview]:
        if sample.num_bytes:
            staged = load_staged(staged_path(self.staging, sample.content_hash))
            if staged is None:
                raise RunError(f"{self.staging}: a staged sample vanished; run the same command again")
            return staged.members
        placed = self._placed[key]
        shard = self._shard(placed.shard)
        files = shard.index.members(placed.index)
        data = shard.read([(file.offset, file.offset + file.num_bytes) for file in files])
        return {file.extension: part for file, part in zip(files, data, strict=True)}

    def _release(self, shard: int) -> None:
        self._unplaced[shard] -= 1
        if self._unplaced[shard] == 0:
            self._open.pop(shard, None)

    def _remove_index(self) -> None:
        """While shards change, the folder has no manifest that would not fit them."""
        with writing(self.folder):
            (self.folder / "index.json").unlink(missing_ok=True)


def _describe(path: Path, num_samples: int) -> ShardEntry:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return ShardEntry(path.name, num_samples, path.stat().st_size, digest.hexdigest())
