"""Where models lie and results go; looked at before anything heavy is imported."""

from __future__ import annotations

import os
from pathlib import Path

from mmcl.types import ConfigError, RunError

CONFIG = "config.json"
"""the file that makes a folder a model"""


def model_folder(path: Path) -> Path:
    """The folder with ``config.json`` that ``path`` means: itself, or the newest checkpoint of a run folder.

    Raises:
        ConfigError: there is none.
    """
    if not path.exists():
        raise ConfigError(f"{path}: no such folder")
    if (path / CONFIG).exists():
        return path
    latest = path / "checkpoints" / "latest"
    if latest.exists():
        newest = latest.parent / latest.read_text(encoding="utf-8", errors="replace").strip()
        if (newest / CONFIG).exists():
            return newest
    raise ConfigError(f"{path}: neither a model, a checkpoint, nor a run folder with one")


def check_writable(folder: Path) -> None:
    """Says at once if a folder cannot be made or written: embedding may take hours. Makes nothing.

    Raises:
        RunError: names the folder and the reason.
    """
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise RunError(f"cannot write to {folder}: {there} is not a folder")
    if not os.access(there, os.W_OK):
        raise RunError(f"cannot write to {folder}: permission denied")
