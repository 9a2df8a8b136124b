"""The folder of one run: its lock, its configuration, its logs and checkpoints."""

from __future__ import annotations

import fcntl
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from mmcl.recipe import BestOptions
from mmcl.training.checkpoint import find_checkpoint, go_back, read_state, rejected_checkpoints, write_checkpoint
from mmcl.training.signals import started_at
from mmcl.training.tracking import append_lines, keep_lines
from mmcl.types import ConfigError, RunError


class RunFolder:
    """A run folder, opened by its only writer (rank 0), or by another rank that only reads (``writer=False``)."""

    def __init__(self, path: Path, *, writer: bool = True) -> None:
        self.path, self.writer = path, writer
        self.metrics, self.skipped = path / "metrics.jsonl", path / "skipped.jsonl"
        self.quarantine = path / "quarantine.jsonl"
        self.stop_file = path / "stop"
        self._lock: Any = None
        self._lost: set[Path] = set()

    def __enter__(self) -> RunFolder:
        if self.writer:
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                self._lock = (self.path / ".lock").open("w")
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RunError(f"run folder {self.path}: another run is writing to it") from None
            except OSError as error:
                raise RunError(f"run folder {self.path}: cannot be written: {error.strerror}") from None
            self._drop_stop_file()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._lock is not None:
            if kind is None:  # obeyed, or too late
                self.stop_file.unlink(missing_ok=True)
            self._lock.close()

    def _drop_stop_file(self) -> None:
        """One that was meant for an earlier run; whoever touches it while this one starts means this one."""
        with suppress(FileNotFoundError):
            if self.stop_file.stat().st_mtime < started_at() - 1:  # the time of a start is known to a second
                self.stop_file.unlink()

    def resume_from(self, resume: str | None) -> Path | None:
        """The checkpoint to go on from: ``auto`` is the newest complete one here, or none; else a given path.

        Raises:
            ConfigError: the folder already holds a run and no ``--resume`` was given, or the path is no checkpoint.
            RunError: there are checkpoints, and none is whole; or the given one is not.
        """
        rejected = rejected_checkpoints(self.path)
        latest = find_checkpoint(self.path)
        if resume is None:
            if latest is not None or rejected or self.metrics.exists():
                raise ConfigError(
                    f"train.out: {self.path} already holds a run; go on with --resume auto, or choose another folder"
                )
            return None
        if resume == "auto":
            if rejected and latest is None:
                raise RunError(f"--resume auto: no checkpoint is whole; {'; '.join(rejected)}")
            self._tell_rejected(rejected)
            return latest
        path = Path(resume)
        if (path / "state.json").exists():
            found: Path | None = path
        else:
            found = find_checkpoint(path)
            self._tell_rejected(rejected_checkpoints(path))
        if found is None:
            raise ConfigError(f"--resume: {resume} is neither a checkpoint nor a run folder with one")
        read_state(found)  # before anything else of it is looked at
        return found

    def _tell_rejected(self, rejected: list[str]) -> None:
        if self.writer:
            for line in rejected:
                print(f"not taken: {line}", flush=True)

    def write_config(self, text: str) -> None:
        temporary = self.path / "config.yaml.partial"
        try:
            temporary.write_text(text, encoding="utf-8")
            temporary.replace(self.path / "config.yaml")
        except OSError as error:
            with suppress(OSError):
                temporary.unlink()
            raise RunError(f"run folder {self.path}: cannot be written: {error.strerror or error}") from None

    def write_metrics(self, record: Mapping[str, Any]) -> None:
        self._append(self.metrics, [record])

    def write_skipped(self, records: Sequence[Mapping[str, Any]]) -> None:
        self._append(self.skipped, records)

    def _append(self, path: Path, records: Sequence[Mapping[str, Any]]) -> None:
        """Lines that a full disk does not take are lost, which is said, once; the run goes on."""
        try:
            append_lines(path, records)
            self._lost.discard(path)
        except OSError as error:
            if path not in self._lost:
                print(f"{path} cannot be written: {error.strerror or error}; the run goes on without", flush=True)
            self._lost.add(path)

    def rewind(self, *, step: int, samples: int) -> None:
        """Forgets what was logged after the checkpoint: those steps will be taken, and logged, again."""
        if self.writer:
            keep_lines(self.metrics, lambda record: int(record["step"]) <= step)
            keep_lines(self.skipped, lambda record: int(record["draw"]) < samples)
            go_back(self.path / "checkpoints", step)

    def checkpoint(
        self, step: int, write: Callable[[Path], None], *, keep: int, best: BestOptions | None = None
    ) -> bool:
        """Writes a checkpoint; returns whether it is there. On a full or unwritable disk the last good one is kept."""
        try:
            write_checkpoint(self.path / "checkpoints", step, write, keep=keep, best=best)
        except OSError as error:
            print(f"checkpoint of step {step} not written: {error}; the last good one is kept", flush=True)
            return False
        return True
