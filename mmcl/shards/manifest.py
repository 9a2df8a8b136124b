"""What a folder of shards holds: ``index.json``, and for very many shards the memory-mapped ``index.bin`` it names.

``index.json`` is a superset of the wids form (``shardlist`` of ``url``, ``nsamples``, ``filesize``, ``sha256``). Above
``MAX_JSON_SHARDS`` shards its ``shardlist`` is empty and ``table`` names a binary file that opens at once, whatever its
size. URLs in a manifest are a stranger's: they are relative to it, or of its own scheme and host.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import re
import struct
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import numpy as np
import numpy.typing as npt

from mmcl.shards.files import is_remote, join_url, read_bytes, write_file
from mmcl.shards.member_index import ShardIndex
from mmcl.shards.remote import RemoteOptions, fetch
from mmcl.types import ConfigError, RunError, redact

KIND = "wids-shard-index-v1"
MAX_JSON_SHARDS = 10_000
MAX_JSON_BYTES = 64 << 20
WORK_FOLDER = ".make"
"""what `mmcl shards make` keeps in its output folder until it is done"""

_MAGIC = b"MMCLTAB\0"
_VERSION = 1
_HEADER = struct.Struct("<8sIIQQ28xI")
assert _HEADER.size == 64
_MAX_SAMPLES = 1 << 40

Int64s = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class ShardEntry:
    """One shard of a manifest."""

    url: str
    """relative to the manifest"""
    num_samples: int
    num_bytes: int = -1
    """of the tar; −1: not known"""
    sha256: str = ""
    """of the tar, hexadecimal; "": not known"""


@dataclass(frozen=True, eq=False)
class Manifest:
    """The shards of one folder, in order. Cheap to pickle: it is opened again where it arrives, and checked."""

    url: str
    """the folder, or its URL"""
    sizes: Int64s
    """int64 ``(num_shards,)``: samples of each shard"""
    shard_bytes: Int64s
    """int64 ``(num_shards,)``: bytes of each tar, −1: not known"""
    checksums: npt.NDArray[np.uint8]
    """uint8 ``(num_shards, 32)``: sha256 of each tar, zeros: not known"""
    name_start: Int64s
    """int64 ``(num_shards + 1,)``: where each relative URL starts in ``names``"""
    names: bytes
    """UTF-8; each relative URL ends with a line feed"""

    @property
    def num_shards(self) -> int:
        return len(self.sizes)

    @cached_property
    def num_samples(self) -> int:
        return int(self.sizes.sum())

    @cached_property
    def fingerprint(self) -> str:
        """32 hexadecimal digits of the names, sizes and checksums in order; equal in whatever folder they lie."""
        digest = hashlib.sha256(self.names)
        for column in (self.sizes, self.checksums):
            digest.update(np.ascontiguousarray(column).data)
        return digest.hexdigest()[:32]

    def shard_name(self, shard: int) -> str:
        """The URL as the manifest has it."""
        if not 0 <= shard < self.num_shards:
            raise IndexError(f"shard {shard} of {self.num_shards}")
        return self.names[self.name_start[shard] : self.name_start[shard + 1] - 1].decode("utf-8")

    def shard_url(self, shard: int) -> str:
        """A local path, or the full URL."""
        return join_url(self.url, self.shard_name(shard))

    def shard_index(self, shard: int, *, remote: RemoteOptions | None = None) -> ShardIndex:
        """Where the samples of one shard lie.

        Raises ``ConfigError`` where the shard was never indexed, ``SampleError`` where a remote index cannot be read.
        """
        url = index_url(self.shard_url(shard))
        try:
            index = ShardIndex(fetch(url, options=remote).content if is_remote(url) else _map(url), url)
        except FileNotFoundError:
            raise ConfigError(f"{url} is missing: `mmcl shards index {self.url}` writes it") from None
        if index.num_samples != self.sizes[shard]:
            raise RunError(
                f"{url} holds {index.num_samples} samples, the manifest says {self.sizes[shard]}: "
                f"`mmcl shards index {self.url}` makes them agree"
            )
        return index

    def __len__(self) -> int:
        return self.num_shards

    def __repr__(self) -> str:
        return f"Manifest({redact(self.url)!r}, {self.num_shards} shards, {self.num_samples} samples)"

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (self.url, self.fingerprint)


def index_url(shard_url: str) -> str:
    """The side file of a shard."""
    return re.sub(r"\.tar$", "", shard_url) + ".members"


def load_manifest(folder_or_url: str | Path) -> Manifest:
    """Opens the manifest of a folder of shards (or names its ``index.json`` directly).

    Raises ``ConfigError`` where there is none, with the command that makes one, or where it names what it must not.
    """
    url = str(folder_or_url).rstrip("/") or "/"
    if url.endswith("/index.json") or url == "index.json":
        url = url[: -len("index.json")].rstrip("/") or "."
    if not is_remote(url):
        url = str(Path(url).expanduser().absolute())
        _explain_missing(Path(url))
    path = join_url(url, "index.json")
    try:
        content = read_bytes(path, limit=MAX_JSON_BYTES)
    except FileNotFoundError:
        raise ConfigError(f"{path} is missing: run `mmcl shards index` on the folder first") from None
    try:
        document = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not JSON: {error}") from None
    if not isinstance(document, dict) or document.get("__kind__") != KIND:
        raise ConfigError(f"{path}: __kind__ must be {KIND!r}")
    table = document.get("table")
    if table is None:
        manifest = _from_entries(url, _read_shardlist(path, document.get("shardlist")))
    else:
        _check_name(url, table)
        manifest = _from_table(url, join_url(url, table))
    _check_names(manifest)
    _check_sizes(manifest, path)
    return manifest


def _reopen(url: str, fingerprint: str) -> Manifest:
    manifest = load_manifest(url)
    if manifest.fingerprint != fingerprint:
        raise RunError(f"{url}: the manifest changed while it was in use ({fingerprint} → {manifest.fingerprint})")
    return manifest


def _explain_missing(folder: Path) -> None:
    if not folder.is_dir():
        raise ConfigError(
            f"{folder} is not a folder of shards: it " + ("is a file" if folder.exists() else "is not there")
        )
    if (folder / "index.json").is_file():
        return
    if (folder / WORK_FOLDER).exists() or (folder.parent / WORK_FOLDER).exists():
        raise ConfigError(
            f"{folder} is unfinished: run the same `mmcl shards make` again, it goes on from what is there"
        )
    splits = sorted(path.parent.name for path in folder.glob("*/index.json"))
    if splits:
        raise ConfigError(f"{folder} holds the folders of shards {', '.join(splits)}: name one of them")
    if any(folder.rglob("*.tar")):
        raise ConfigError(f"{folder} has no index.json: run `mmcl shards index {folder}` once")
    raise ConfigError(f"{folder} holds no shards: neither index.json nor *.tar")


def _read_shardlist(path: str, shardlist: Any) -> list[ShardEntry]:
    if not isinstance(shardlist, list):
        raise ConfigError(f"{path}: shardlist must be a list")
    entries = []
    for number, item in enumerate(shardlist):
        url, size = (item.get("url"), item.get("nsamples")) if isinstance(item, dict) else (None, None)
        if not isinstance(url, str) or type(size) is not int:
            raise ConfigError(f"{path}: shardlist.{number} needs a url (text) and nsamples (an integer)")
        num_bytes, checksum = item.get("filesize", -1), item.get("sha256", "")
        if type(num_bytes) is not int or abs(num_bytes) > 1 << 60:
            raise ConfigError(f"{path}: shardlist.{number}.filesize must be an integer")
        if not isinstance(checksum, str) or not re.fullmatch("([0-9a-f]{64})?", checksum):
            raise ConfigError(f"{path}: shardlist.{number}.sha256 must be 64 hexadecimal digits")
        if not 0 <= size < _MAX_SAMPLES:
            raise ConfigError(f"{path}: shardlist.{number}.nsamples is {size}")
        entries.append(ShardEntry(url, size, num_bytes, checksum))
    return entries


def _from_entries(url: str, entries: Sequence[ShardEntry]) -> Manifest:
    for entry in entries:
        _check_name(url, entry.url)
    names = [entry.url.encode("utf-8") + b"\n" for entry in entries]
    checksums = b"".join(bytes.fromhex(entry.sha256) or bytes(32) for entry in entries)
    return Manifest(
        url,
        np.array([entry.num_samples for entry in entries], dtype=np.int64),
        np.array([entry.num_bytes for entry in entries], dtype=np.int64),
        np.frombuffer(checksums, dtype=np.uint8).reshape(-1, 32),
        np.cumsum([0, *map(len, names)], dtype=np.int64),
        b"".join(names),
    )


def _from_table(url: str, path: str) -> Manifest:
    try:
        view = memoryview(read_bytes(path)) if is_remote(path) else _map(path)
    except FileNotFoundError:
        raise ConfigError(f"{path} is missing; {join_url(url, 'index.json')} names it") from None
    if len(view) < _HEADER.size or bytes(view[:8]) != _MAGIC:
        raise ConfigError(f"{path}: not a table of shards")
    _, version, _, shards, name_bytes, crc = _HEADER.unpack_from(view)
    if version != _VERSION:
        raise ConfigError(f"{path}: table of version {version}; this program reads version {_VERSION}")
    lengths = (8 * shards, 8 * shards, 32 * shards, 8 * (shards + 1), name_bytes)
    if _HEADER.size + sum(lengths) != len(view) or zlib.crc32(view[_HEADER.size :]) != crc:
        raise ConfigError(f"{path}: damaged table of shards; `mmcl shards index` writes it again")
    parts, start = [], _HEADER.size
    for length in lengths:
        parts.append(view[start : start + length])
        start += length
    sizes, shard_bytes, name_start = (np.frombuffer(parts[i], dtype="<i8") for i in (0, 1, 3))
    checksums = np.frombuffer(parts[2], dtype=np.uint8).reshape(-1, 32)
    return Manifest(url, sizes, shard_bytes, checksums, name_start, bytes(parts[4]))


def _map(path: str) -> memoryview:
    with Path(path).open("rb") as file:
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def _check_sizes(manifest: Manifest, path: str) -> None:
    sizes, start = manifest.sizes, manifest.name_start
    ends = np.frombuffer(manifest.names, dtype=np.uint8)
    if len(sizes) and (
        int(sizes.min()) < 0 or int(sizes.max()) >= _MAX_SAMPLES or float(sizes.sum(dtype=float)) > 2**62
    ):
        raise ConfigError(f"{path}: impossible numbers of samples")
    if start[0] != 0 or start[-1] != len(ends) or (np.diff(start) < 2).any() or (ends[start[1:] - 1] != 10).any():
        raise ConfigError(f"{path}: damaged names of shards")


def _check_names(manifest: Manifest) -> None:
    """All names at once; one by one only where the whole holds anything unusual."""
    names = manifest.names
    unusual = (
        any(sign in names for sign in (b"..", b":", b"\\", b"%", b"\0", b"\r", b"\n/", b"\n\n")) or names[:1] == b"/"
    )
    if unusual:
        for name in names.decode("utf-8", "replace").split("\n")[:-1]:
            _check_name(manifest.url, name)


def _check_name(base: str, name: Any) -> None:
    """Refuses what does not lie below the manifest, or on its own host."""
    problem = ""
    if not isinstance(name, str) or not name or any(ord(sign) < 32 or 0xD800 <= ord(sign) < 0xE000 for sign in name):
        problem = "is not a name"
    elif "::" in name:
        problem = "is a chained URL"
    elif re.match(r"[A-Za-z][A-Za-z0-9+.-]*:", name):
        ours, theirs = urlsplit(base), urlsplit(name)
        if not is_remote(base) or (ours.scheme, ours.netloc) != (theirs.scheme, theirs.netloc):
            problem = "is not on the manifest's own host"
    elif name.startswith(("/", "\\", "~")) or "\\" in name:
        problem = "is an absolute path"
    if not problem and ".." in re.split(r"[/\\]", unquote(name)):
        problem = "leaves the manifest's folder"
    if problem:
        shown = name if isinstance(name, str) and len(name) < 200 else repr(name)[:200]
        raise ConfigError(f"{base}: shard {shown!r} {problem}; URLs in a manifest are relative to it")


def write_manifest(folder: str | Path, entries: Iterable[ShardEntry]) -> Manifest:
    """Writes ``index.json`` (and ``index.bin``), and ``sizes.json`` for open_clip; returns the manifest.

    Raises ``ConfigError`` on a URL that a reader would refuse, ``RunError`` where the folder cannot be written.
    """
    entries, target = list(entries), str(folder).rstrip("/")
    target = target if is_remote(target) else str(Path(folder).absolute())
    manifest = _from_entries(target, entries)
    document: dict[str, Any] = {"__kind__": KIND, "wids_version": 1, "num_samples": manifest.num_samples}
    if len(entries) > MAX_JSON_SHARDS:
        columns = (manifest.sizes, manifest.shard_bytes, manifest.checksums, manifest.name_start)
        body = b"".join(column.tobytes() for column in columns) + manifest.names
        header = _HEADER.pack(_MAGIC, _VERSION, 0, len(entries), len(manifest.names), zlib.crc32(body))
        write_file(join_url(target, "index.bin"), header + body)
        document |= {"table": "index.bin", "num_shards": len(entries), "shardlist": []}
    else:
        document["shardlist"] = [_wids_entry(entry) for entry in entries]
    sizes = {entry.url: entry.num_samples for entry in entries}
    write_file(join_url(target, "sizes.json"), json.dumps(sizes, indent=0, ensure_ascii=False).encode())
    write_file(join_url(target, "index.json"), (json.dumps(document, indent=1, ensure_ascii=False) + "\n").encode())
    return manifest


def _wids_entry(entry: ShardEntry) -> dict[str, Any]:
    item: dict[str, Any] = {"url": entry.url, "nsamples": entry.num_samples}
    if entry.num_bytes >= 0:
        item["filesize"] = entry.num_bytes
    if entry.sha256:
        item["sha256"] = entry.sha256
    return item
