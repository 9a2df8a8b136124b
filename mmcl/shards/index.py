"""Indexing shards that other tools wrote: where every sample lies, and everything about them that is not in order."""

from __future__ import annotations

import hashlib
import itertools
import re
import tarfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from mmcl.hashing import text_hash
from mmcl.progress import Progress, failures
from mmcl.shards.files import check_local, check_writable, is_remote, join_url, list_files, write_file
from mmcl.shards.manifest import Manifest, ShardEntry, index_url, write_manifest
from mmcl.shards.member_index import Member, pack_index
from mmcl.shards.remote_file import RemoteFile
from mmcl.types import ConfigError, RunError, SampleError

_MAX_NAMED = 5


@dataclass(slots=True)
class TarContents:
    """The samples of one tar, and what was left out."""

    keys: list[str] = field(default_factory=list)
    members: list[list[Member]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    """one line each, without the shard's name"""
    ignored: Counter[str] = field(default_factory=Counter)
    """members that belong to no sample, by why"""


@dataclass(frozen=True, slots=True)
class IndexReport:
    """What ``index_shards`` found."""

    manifest: Manifest
    num_bytes: int
    problems: list[str]
    """one line each, with the shard's name"""
    ignored: dict[str, int]


def index_shards(
    folder: str | Path, *, out: str | Path | None = None, workers: int = 4, progress: Progress | None = None
) -> IndexReport:
    """Writes a side file per ``*.tar`` below ``folder`` (sorted by name) and the manifest; the tars stay as they are.

    ``folder`` may be a URL, or a pattern of tars (``https://host/{000..099}.tar``) where a server does not list its
    files. The files go beside the tars, or into the local folder ``out``, from where they are to be put beside them.
    What is not in order is left out and named, never fatal. Raises ``ConfigError`` where there are no shards,
    ``RunError`` where one cannot be read, the folder cannot be written or no shard holds a sample.
    """
    root, names = find_tars(str(folder))
    if out is not None:
        check_local(out, "the files of the index are written into a local folder")
    target = root if out is None else str(Path(out).expanduser().absolute())
    check_writable(target)
    entries: list[ShardEntry] = []
    problems: list[str] = []
    ignored: Counter[str] = Counter()
    hashes: list[np.ndarray[Any, Any]] = []
    with ThreadPoolExecutor(workers) as pool:
        indexed = pool.map(lambda name: _index_one(root, target, name), names)
        for name, (entry, contents) in zip(names, indexed, strict=True):
            entries.append(entry)
            ignored.update(contents.ignored)
            problems += [f"{name}: {problem}" for problem in contents.problems]
            hashes.append(np.array([text_hash(key) for key in contents.keys], dtype=np.uint64))
            if progress is not None:
                progress(len(entries), len(names), failures(len(problems)))
    if not any(entry.num_samples for entry in entries):
        raise RunError(f"{folder}: no sample in any of {len(names)} shards" + "".join(f"; {p}" for p in problems[:3]))
    repeated = sum(map(len, hashes)) - len(np.unique(np.concatenate(hashes)))
    if repeated:
        problems.append(f"{repeated} keys occur in more than one shard; equal keys are never each other's negatives")
    return IndexReport(write_manifest(target, entries), sum(e.num_bytes for e in entries), problems, dict(ignored))


def find_tars(folder: str) -> tuple[str, list[str]]:
    """A folder or its URL, and the names of the tars below it. Raises ``ConfigError`` where there are none."""
    if folder.endswith(".tar"):
        return _named_tars(folder)
    if is_remote(folder):
        url = folder.rstrip("/")
        names = list_files(url)
    else:
        root = Path(folder).expanduser().absolute()
        if not root.is_dir():
            raise ConfigError(f"{folder} is " + ("not a folder" if root.exists() else "not there"))
        url = str(root)
        names = [path.relative_to(root).as_posix() for path in root.rglob("*.tar*")]
    tars = sorted(name for name in names if name.endswith(".tar") and not name.rpartition("/")[2].startswith("."))
    if not tars:
        packed = next((name for name in names if re.search(r"\.tar\.(gz|bz2|xz|zst)$", name)), None)
        hint = (
            f"; {packed.rpartition('/')[2]} is compressed: unpack it to .tar first (media do not shrink)"
            if packed
            else ""
        )
        raise ConfigError(f"{folder} holds no *.tar files{hint}")
    return url, tars


def _named_tars(pattern: str) -> tuple[str, list[str]]:
    """The folder that all tars of a pattern lie in, and their names in it."""
    import webdataset

    is_remote(pattern)  # refuses chained URLs and unknown schemes
    urls = webdataset.shardlists.expand_urls(pattern)
    if not is_remote(pattern):
        urls = [str(Path(url).expanduser().absolute()) for url in urls]
    levels = zip(*(url.split("/")[:-1] for url in urls), strict=False)
    root = "/".join(level[0] for level in itertools.takewhile(lambda level: len(set(level)) == 1, levels))
    return root, [url[len(root) + 1 :] for url in urls]


def _index_one(root: str, target: str, name: str) -> tuple[ShardEntry, TarContents]:
    path = join_url(root, name)
    try:
        contents, num_bytes, digest = read_whole(path)
    except FileNotFoundError:
        raise RunError(f"{path} is missing") from None
    except SampleError as error:
        raise RunError(f"cannot read {error.detail}") from None
    except OSError as error:
        raise RunError(f"cannot read {path}: {error.strerror or error}") from None
    write_file(index_url(join_url(target, name)), pack_index(contents.keys, contents.members, num_bytes))
    return ShardEntry(name, len(contents.keys), num_bytes, digest.hex()), contents


def read_whole(path: str) -> tuple[TarContents, int, bytes]:
    """The samples of a tar, local or not, its bytes and its sha256.

    Raises ``RunError``, ``FileNotFoundError``, ``SampleError``, ``OSError`` where it cannot be read.
    """
    digest = hashlib.sha256()
    if is_remote(path):
        with RemoteFile(path, watch=digest.update) as remote:
            contents = read_tar(path, remote)
            remote.drain()
            return contents, remote.num_bytes, digest.digest()
    contents, num_bytes = read_tar(path), 0
    with Path(path).open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
            num_bytes += len(block)
    return contents, num_bytes, digest.digest()


def read_tar(path: str | Path, file: RemoteFile | None = None) -> TarContents:
    """The samples of one tar, by WebDataset's rule: the key ends at the first dot of the file's name.

    Members of one sample that do not lie together are joined, and named: plain readers see two half samples there. A
    second member of the same name is left out. Where a tar breaks off, the samples before the break stay, without the
    last one, which may be half. A tar that is not local is read from ``file``.
    """
    contents = TarContents()
    number: dict[str, int] = {}
    scattered: Counter[str] = Counter()
    repeated: Counter[str] = Counter()
    last = ""
    try:
        with tarfile.open(path, "r:", fileobj=file) as archive:
            for info in archive:
                key, extension, why = split_name(info)
                if why:
                    contents.ignored[why] += 1
                    continue
                member = Member(extension, info.offset_data, info.size)
                if key not in number:
                    number[key] = len(contents.keys)
                    contents.keys.append(key)
                    contents.members.append([member])
                elif any(extension == other.extension for other in contents.members[number[key]]):
                    repeated[key] += 1
                else:
                    contents.members[number[key]].append(member)
                    scattered[key] += key != last
                last = key
            if file is not None:
                _check_end(archive, file)
            else:
                with Path(path).open("rb") as local:
                    _check_end(archive, local)
    except (tarfile.TarError, EOFError, OverflowError, ValueError) as error:
        if last:
            position = number[last]
            del contents.keys[position], contents.members[position]
        contents.problems.append(f"damaged ({error}); {len(contents.keys)} samples before the damage are kept")
    except OSError as error:
        raise RunError(f"cannot read {path}: {error.strerror or error}") from None
    scattered = +scattered
    if scattered:
        contents.problems.append(
            f"{len(scattered)} samples have members that do not lie together (plain WebDataset readers see halves): "
            f"{_name_some(scattered)}"
        )
    if repeated:
        contents.problems.append(f"{len(repeated)} keys come twice, the first is kept: {_name_some(repeated)}")
    return contents


def _name_some(keys: Counter[str]) -> str:
    shown = ", ".join(repr(key)[1:-1] for key in list(keys)[:_MAX_NAMED])
    return shown + (", …" if len(keys) > _MAX_NAMED else "")


def split_name(info: tarfile.TarInfo) -> tuple[str, str, str]:
    """(key, extension, "") of a member, or why it belongs to no sample."""
    name = info.name.removeprefix("./")
    folder, _, base = name.rpartition("/")
    stem, dot, extension = base.partition(".")
    if info.isdir():
        return "", "", "folder"
    if not info.isreg() or info.issparse():
        return "", "", "not a plain file"
    if name.startswith(("/", "\\")) or ".." in name.replace("\\", "/").split("/") or ":" in name[:2]:
        return "", "", "path outside of its folder"
    if not stem or not dot or not extension or any(ord(sign) < 32 for sign in name):
        return "", "", "no key or no extension"
    if stem.startswith("__") and stem.endswith("__"):
        return "", "", "WebDataset metadata"
    return (f"{folder}/{stem}" if folder else stem), extension.lower(), ""


def _check_end(archive: tarfile.TarFile, file: BinaryIO | RemoteFile) -> None:
    """``tarfile`` takes any block it cannot read for the end of the archive."""
    size = file.seek(0, 2)
    file.seek(archive.offset)
    block = file.read(512)
    if archive.offset > size:
        raise tarfile.ReadError("unexpected end of data")
    if not block:
        raise tarfile.ReadError("ends without an end mark")
    if block.strip(b"\0"):
        raise tarfile.ReadError(f"no member header at byte {archive.offset}")
