"""Where models lie and results go; looked at before anything heavy is imported."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from mmcl.types import ConfigError, RunError

CONFIG = "config.json"
"""the file that makes a folder a model"""

HUB = "hub:"
"""what a name begins with that may be downloaded"""


AVERAGE = "ema"
"""the folder of a checkpoint with the moving average of its model"""


def model_folder(path: Path) -> Path:
    """The folder with ``config.json`` that ``path`` means: itself, or the newest checkpoint of a run folder.

    ``RUN/ema`` is the moving average in the newest checkpoint of RUN.

    Raises:
        ConfigError: there is none.
    """
    if path.name == AVERAGE and path.parent.exists() and not path.exists():
        averaged = model_folder(path.parent) / AVERAGE
        if not averaged.exists():
            raise ConfigError(f"{path}: the run keeps no moving average; train.ema={{}} asks for one")
        return averaged
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


def run_config(checkpoint: Path) -> Path:
    """``config.yaml`` of the run that wrote a model folder; may not be there."""
    folder = model_folder(checkpoint)
    return (folder.parent if folder.name == AVERAGE else folder) / "config.yaml"


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


def read_report(path: Path, *, option: str = "--against") -> dict[str, Any]:
    """``report.json`` of a folder (of ``mmcl evaluate all``: its part on retrieval), or the file itself; ``option``
    named the path.

    Raises:
        ConfigError: there is none, or not one that names its queries.
    """
    if path.is_dir():
        part = path / "retrieval" / "report.json"
        path = part if part.is_file() else path / "report.json"
    try:
        report: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not JSON"
        raise ConfigError(f"{option} {path}: cannot be read: {reason}") from None
    lists = report.get("lists") if isinstance(report, dict) else None
    if not isinstance(lists, dict) or not all(isinstance(each, dict) and "queries" in each for each in lists.values()):
        raise ConfigError(f"{option} {path}: not a report that names its queries; make it again with this version")
    return dict(report)


def check_resume(resume: str | None) -> None:
    """Says if ``--resume`` took the word after it, which was meant for something else.

    Raises:
        ConfigError: names the word.
    """
    if resume is not None and ("=" in resume or resume.startswith("-")) and not Path(resume).exists():
        raise ConfigError(f"--resume: {resume!r} is neither 'auto' nor a checkpoint; write --resume auto {resume}")
