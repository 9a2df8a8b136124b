"""Local paths and URLs alike: joining, reading, range reading; and writing that is whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path

from mmcl.shards.remote import fetch, open_filesystem, transport_errors
from mmcl.types import ConfigError, RunError, SampleError

REMOTE_SCHEMES = ("http", "https", "s3", "gs", "hf")


def is_remote(url: str) -> bool:
    """True for a URL of a scheme that is read through fsspec. Raises ``ConfigError`` on other schemes."""
    if "://" not in url and not url.startswith(("pipe:", "file:")):
        return False
    scheme = url.split(":", 1)[0]
    if scheme not in REMOTE_SCHEMES or "::" in url:
        raise ConfigError(
            f"{url}: shards are read from a local folder or {', '.join(f'{s}://' for s in REMOTE_SCHEMES)}"
        )
    return True


def check_local(path: str | Path, what: str) -> None:
    """Refuses a URL, also one that became a path and lost a slash. Raises ``ConfigError``."""
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", str(path)) or str(path).startswith("pipe:"):
        raise ConfigError(f"{path}: {what}")


def join_url(base: str, name: str) -> str:
    if "://" in name:
        return name
    return f"{base.rstrip('/')}/{name}" if is_remote(base) else str(Path(base) / name)


def read_bytes(url: str, limit: int | None = None) -> bytes:
    """All bytes of a file. Raises ``FileNotFoundError``; ``RunError`` where it cannot be read or exceeds ``limit``."""
    try:
        if is_remote(url):
            content = bytes(fetch(url, max_bytes=limit).content)
        else:
            with Path(url).open("rb") as file:
                content = file.read(-1 if limit is None else limit + 1)
    except FileNotFoundError:
        raise
    except SampleError as error:
        raise RunError(f"cannot read {error.detail}") from None
    except OSError as error:
        raise RunError(f"cannot read {url}: {error.strerror or error}") from None
    if limit is not None and len(content) > limit:
        raise RunError(f"{url} is larger than {limit} bytes")
    return content


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns the errors of a full disk or a closed folder into one clear line."""
    try:
        yield
    except OSError as error:
        hint = ": the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else f": {error.strerror or error}"
        raise RunError(f"cannot write {error.filename or path}{hint}") from None


def new_folder(path: str | Path) -> Path:
    """A folder that was not there before, or is empty. Raises ``ConfigError`` on any other, ``RunError``."""
    check_local(path, "shards are written into a local folder; copy them to the store afterwards")
    folder = Path(path).expanduser().absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{path} is there already; shards are rewritten into a new folder only")
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def write_atomically(path: Path, content: bytes) -> None:
    """The whole file under its name, on disk, or nothing. Raises ``RunError`` where it cannot be written."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    with writing(path):
        try:
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except OSError:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise


def write_file(url: str, content: bytes) -> None:
    """The whole file at a path (its folder is made) or URL, or nothing. Raises ``RunError``."""
    if not is_remote(url):
        path = Path(url)
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        return write_atomically(path, content)
    try:
        open_filesystem(url).pipe_file(url, content)
    except transport_errors() as error:
        raise RunError(f"cannot write {url}: {error}") from None


def check_writable(url: str) -> None:
    """Refuses a place that files cannot be written to. Raises ``ConfigError``."""
    if is_remote(url) and url.startswith(("http://", "https://")):
        raise ConfigError(
            f"{url}: nothing can be written there; --out FOLDER takes the files of the index, put them beside the tars"
        )


def list_files(url: str) -> list[str]:
    """Names of the files below a URL, relative to it. Raises ``ConfigError`` where the server does not list them."""
    filesystem = open_filesystem(url)
    try:
        if url.startswith(("http://", "https://")):  # one page of links; not the whole site
            found = [name for name in filesystem.ls(url + "/", detail=False) if name.startswith(url + "/")]
            return sorted({name[len(url) + 1 :].partition("?")[0] for name in found})
        root = filesystem._strip_protocol(url).rstrip("/") + "/"
        return sorted(name[len(root) :] for name in filesystem.find(url) if name.startswith(root))
    except transport_errors() as error:
        raise ConfigError(
            f"{url} cannot be listed ({error}); name its tars instead, such as '{url}/{{000..099}}.tar'"
        ) from None
