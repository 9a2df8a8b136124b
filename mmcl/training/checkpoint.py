"""Checkpoints that a kill at any moment cannot break.

A checkpoint is written to a temporary folder, every file is synced, the folder is renamed, and only then the text file
``latest`` names it; older ones are removed after that. ``files.json`` lists every file with size and sha256, so an
incomplete one is known for what it is. The text file ``best`` names the best one by a metric, which stays. Nothing is
unpickled on load: safetensors, JSON, and ``weights_only=True``.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmcl.recipe import BestOptions
from mmcl.types import RunError

STATE, FILES, LATEST, BEST = "state.json", "files.json", "latest", "best"


def step_folder(checkpoints: Path, step: int) -> Path:
    return checkpoints / f"step_{step:08d}"


def partial_folder(checkpoints: Path, step: int) -> Path:
    """Where a checkpoint lies while it is written."""
    return checkpoints / f".{step_folder(checkpoints, step).name}.partial"


def write_checkpoint(
    checkpoints: Path, step: int, write: Callable[[Path], None], *, keep: int, best: BestOptions | None = None
) -> Path:
    """Calls ``write(folder)`` on a fresh folder and makes it the latest checkpoint; keeps the newest ``keep`` and the
    best.

    Raises:
        OSError: disk full or unwritable, in whatever words a library says so; what was there before is untouched.
    """
    checkpoints.mkdir(parents=True, exist_ok=True)
    final = step_folder(checkpoints, step)
    temporary = partial_folder(checkpoints, step)
    for left in checkpoints.glob(".*.partial"):  # of a run that was killed
        shutil.rmtree(left, ignore_errors=True)
    temporary.mkdir()
    try:
        write(temporary)
        files = [path for path in sorted(temporary.rglob("*")) if path.is_file()]
        described = {path.relative_to(temporary).as_posix(): _describe(path) for path in files}
        (temporary / FILES).write_text(json.dumps(described, indent=1))
        for path in [*temporary.rglob("*"), temporary]:
            _sync(path)
    except (OSError, RuntimeError, SafetensorError, RunError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError):
            raise
        raise OSError(" ".join(str(error).split())) from error
    if final.exists():
        shutil.rmtree(final)
    temporary.rename(final)
    _sync(checkpoints)
    _replace_text(checkpoints / LATEST, final.name)
    if best is not None and _is_best(final, best_checkpoint(checkpoints), best):
        _replace_text(checkpoints / BEST, final.name)
    kept = best_checkpoint(checkpoints)
    for old in _reached(checkpoints)[:-keep]:
        if old != kept:
            shutil.rmtree(old)
    return final


def best_checkpoint(checkpoints: Path) -> Path | None:
    """The one that ``best`` names, where it is complete."""
    try:
        named = checkpoints / (checkpoints / BEST).read_text(encoding="utf-8").strip()
    except OSError:
        return None
    return named if named.parent == checkpoints and _is_complete(named) else None


def _is_best(new: Path, old: Path | None, best: BestOptions) -> bool:
    """Whether ``new`` is better than ``old`` by what was logged last before each."""
    value, before = _metric(new, best.metric), None if old is None else _metric(old, best.metric)
    if value is None or before is None:
        return value is not None
    return value > before if best.mode == "max" else value < before


def _metric(checkpoint: Path, name: str) -> float | None:
    value = json.loads((checkpoint / STATE).read_text(encoding="utf-8")).get("metrics", {}).get(name)
    return value if isinstance(value, (int, float)) and math.isfinite(value) else None


def complete_checkpoints(checkpoints: Path) -> list[Path]:
    """Checkpoints whose files are all there with the sizes that were written, oldest first."""
    folders = sorted(path for path in checkpoints.glob("step_*") if path.is_dir())
    return [folder for folder in folders if _is_complete(folder)]


def _reached(checkpoints: Path) -> list[Path]:
    """The complete ones up to that which ``latest`` names, oldest first: a run that went back to one of them has given
    up what came after it.
    """
    complete = complete_checkpoints(checkpoints)
    try:
        latest = (checkpoints / LATEST).read_text(encoding="utf-8").strip()
    except OSError:
        return complete
    return [folder for folder in complete if folder.name <= latest] or complete


def go_back(checkpoints: Path, step: int) -> None:
    """Makes that of ``step`` the latest, where it is there: from it a run goes on."""
    folder = step_folder(checkpoints, step)
    if _is_complete(folder):
        _replace_text(checkpoints / LATEST, folder.name)


def find_checkpoint(run: Path) -> Path | None:
    """The newest complete checkpoint of a run folder whose checksums hold; None if there is none."""
    for folder in reversed(_reached(run / "checkpoints")):
        if not damaged_files(folder):
            return folder
    return None


def rejected_checkpoints(run: Path) -> list[str]:
    """A line for each checkpoint of a run folder that is not whole, newest first."""
    folders = sorted((path for path in (run / "checkpoints").glob("step_*") if path.is_dir()), reverse=True)
    damaged = {folder: damaged_files(folder) for folder in folders}
    return [f"{folder}: damaged or incomplete: {', '.join(names)}" for folder, names in damaged.items() if names]


def damaged_files(folder: Path) -> list[str]:
    """Names of files of a checkpoint that differ from what was written."""
    listed = _listed(folder)
    if listed is None:
        return [FILES]
    return [name for name, wanted in listed.items() if not _is_as(folder / name, wanted)]


def _is_as(path: Path, wanted: Mapping[str, Any]) -> bool:
    try:
        return _describe(path) == wanted
    except OSError:
        return False


def _listed(folder: Path) -> dict[str, dict[str, Any]] | None:
    """What ``files.json`` says; None where it says nothing sensible."""
    try:
        listed = json.loads((folder / FILES).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if isinstance(listed, dict) and all(isinstance(wanted, dict) for wanted in listed.values()):
        return listed
    return None


def read_state(folder: Path) -> dict[str, Any]:
    """The counters of a checkpoint that is whole.

    Raises:
        RunError: it is not; names the damaged files.
    """
    damaged = damaged_files(folder)
    if damaged:
        raise RunError(f"checkpoint {folder}: damaged or incomplete: {', '.join(damaged)}")
    state: dict[str, Any] = json.loads((folder / STATE).read_text(encoding="utf-8"))
    return state


def _is_complete(folder: Path) -> bool:
    listed = _listed(folder)
    try:
        return listed is not None and all(
            (folder / name).stat().st_size == wanted.get("bytes") for name, wanted in listed.items()
        )
    except OSError:
        return False


def _describe(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _replace_text(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".partial")
    temporary.write_text(text + "\n")
    _sync(temporary)
    temporary.replace(path)
    _sync(path.parent)


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)


def load_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except Exception as error:  # safetensors raises its own types, from Rust
        raise RunError(f"{path}: cannot be read: {error}") from None


def save_optimizer(path: Path, state: Mapping[str, Any]) -> None:
    torch.save(dict(state), path)


def load_optimizer(path: Path) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return state
