"""Local paths and URLs alike: joining, reading, range reading; and writing that is whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from mmcl.shards.remote import fetch
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


def join_url(base: str, name: str) -> str:
    if "://" in name:
        return name
    return f"{base.rstrip('/')}/{name}" if is_remote(base) else str(Path(base) / name)


def read_bytes(url: str, limit: int | None = None) -> bytes:
    """All bytes of a file. Raises ``FileNotFoundError``; ``RunError`` where it cannot be read or exceeds ``limit``."""
    try:
        if is_remote(url):
            content = fetch(url, max_bytes=limit).content
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
