"""Runs as a user launches them: in processes of their own, watched from outside."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from support.recipes import ROOT, TINY, tiny_overrides

PRETRAIN = str(ROOT / "pipelines/pretrain.py")
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
CPU_2 = [*ACCELERATE, str(ROOT / "configs/accelerate/cpu_2.yaml")]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
MMCL = [sys.executable, "-m", "mmcl", "train"]


def arguments(shards: Path, out: Path, *more: str) -> list[str]:
    """A small run that logs each step."""
    common = ("train.steps=20", "train.global_batch=12", "train.log_every=1", "train.checkpoint_every=5")
    return [str(TINY), *tiny_overrides(*common, *more, shards=shards / "train", out=out)]


def environment(more: Mapping[str, str] | None = None) -> dict[str, str]:
    """This tree first and one thread, whatever is installed."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **(more or {})}


def finish(command: list[str], code: int | None = 0, timeout_seconds: float = 250) -> subprocess.CompletedProcess[str]:
    """Runs to its end; fails the test unless it exits with ``code``."""
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=timeout_seconds, check=False, cwd=ROOT, env=environment()
    )
    assert code is None or done.returncode == code, (done.stdout + done.stderr)[-3000:]
    return done


@contextmanager
def started(command: list[str], log: Path, more: Mapping[str, str] | None = None) -> Iterator[subprocess.Popen[bytes]]:
    """A run that is killed at the end, if there is any of it left."""
    with log.open("ab") as file:
        process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=file, env=environment(more))
    try:
        yield process
    finally:
        kill_family(process.pid)
        process.wait()


def wait_until(condition: Callable[[], bool], what: str, seconds: float = 120) -> float:
    """Seconds that it took; fails the test where it does not come about."""
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < seconds, f"{what}: not within {seconds} s"
        time.sleep(0.01)
    return time.monotonic() - start


def steps_logged(out: Path) -> int:
    file = out / "metrics.jsonl"
    return len(file.read_text().splitlines()) if file.exists() else 0


def latest(out: Path) -> str:
    return (out / "checkpoints/latest").read_text().strip()


def family(pid: int) -> list[int]:
    """A process that lives and all that it started, those of its children too: ranks have sessions of their own."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError, IndexError):
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(entry.name))
    found = [pid]
    for member in found:
        found += children.get(member, [])
    return alive(found)


def alive(pids: Iterable[int]) -> list[int]:
    """Those that run; one that ended and waits to be noticed does not."""
    found = []
    for pid in pids:
        with suppress(OSError):
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX":
                found.append(pid)
    return found


def kill_family(pid: int) -> None:
    """``kill -9`` of a process and all that it started."""
    for member in family(pid):
        with suppress(ProcessLookupError):
            os.kill(member, signal.SIGKILL)
