"""The whole main job in one call: record, make shards, train, evaluate, report. Each goes on from what is there."""

from __future__ import annotations

import csv
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

from mmcl.demo.record import record_games
from mmcl.evaluation.run import evaluate_checkpoint
from mmcl.evaluation.show import print_evaluation
from mmcl.hashing import text_hash
from mmcl.progress import show_progress
from mmcl.recipe import RunConfig, load_config
from mmcl.shards.files import write_atomically
from mmcl.shards.inputs import read_csv
from mmcl.shards.make import make_shards
from mmcl.shards.make_options import MakeOptions
from mmcl.shards.manifest import load_manifest
from mmcl.shipped import shipped
from mmcl.training.checkpoint import find_checkpoint
from mmcl.training.tracking import write_json
from mmcl.types import ConfigError, RunError

NOTE = (
    "Recorded game footage, not filmed video: arcade games of the package ale-py, played at random, "
    "recorded with picture and sound; the caption is the name of the game."
)
TITLES = {"known": "new recordings of known games", "zero_shot": "zero-shot: games never trained on"}
TEST_SHARE = 0.2
"""of a user's own clips without a split column"""


def run_demo(out: Path, *, steps: int | None = None, seed: int = 0, clips: Path | None = None) -> None:
    """Runs or goes on with the demo in ``out``.

    Raises:
        ConfigError: ``out`` was made with other settings; a wrong table of clips.
        RunError: a step failed.
    """
    started = time.monotonic()
    cells = [] if clips is None else _read_table(clips)
    _settle(out, {"steps": steps, "seed": seed, "clips": None if clips is None else str(clips.resolve())})
    if clips is None:
        print(NOTE)
        table = _record(out, seed)
    else:
        table = _split_table(clips, cells, out)
    shards = _make(table, out)
    config = _config(out, shards, steps, seed)
    _train(out, config)
    print("evaluating")
    evaluation = evaluate_checkpoint(
        out / "run",
        str(shards / "test"),
        out / "report",
        by="subset" if clips is None else None,
        headline="known" if clips is None else None,
        clips=config.evaluate.clips,
        workers=config.data.workers,
        decoder=config.data.decoder,
        note=NOTE if clips is None else "",
        data_name="Arcade games" if clips is None else clips.name,
        titles=TITLES,
    )
    print_evaluation(evaluation, examples=True)
    print(f"done in {time.monotonic() - started:.0f} s")


def _settle(out: Path, settings: dict[str, object]) -> None:
    """Keeps the settings in the folder; refuses to go on with others."""
    path = out / "demo.json"
    try:
        out.mkdir(parents=True, exist_ok=True)
        if path.exists():
            try:
                before = dict(json.loads(path.read_text(encoding="utf-8")))
            except (ValueError, TypeError):
                raise ConfigError(
                    f"{path} is damaged: choose another --out, or delete it and go on with what {out} was started with"
                ) from None
            for name, value in settings.items():
                if before.get(name) != value:
                    raise ConfigError(
                        f"--{name}: {out} was started with {before.get(name)!r}, not {value!r}; "
                        f"go on with the same, or choose another --out"
                    )
        else:
            write_json(path, settings)
    except OSError as error:
        raise RunError(f"--out {out}: cannot be written: {error.strerror or error}") from None


def _record(out: Path, seed: int) -> Path:
    with show_progress("recording", "games") as progress:
        recordings = record_games(out / "clips", seed=seed, progress=progress)
    failed = sorted({recording.game for recording in recordings if recording.failed})
    silent = sorted({recording.game for recording in recordings if recording.silent})
    print(f"recorded {len({r.game for r in recordings}) - len(failed)} games")
    if failed:
        print(f"  {len(failed)} end their process and are left out: {', '.join(failed)}")
    if silent:
        print(f"  {len(silent)} make no sound (kept, without audio): {', '.join(silent)}")
    return out / "clips" / "clips.csv"


def _read_table(clips: Path) -> list[list[str]]:
    """The cells of the user's table, the header first."""
    try:
        header, *rows = [cells for _, cells in read_csv(clips)] or [[]]
    except FileNotFoundError:
        raise ConfigError(f"--clips {clips}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--clips {clips}: cannot be read: {error}") from None
    if not rows or "path" not in header:
        found = ", ".join(header) if rows else "no rows"
        raise ConfigError(f"--clips {clips}: needs the columns path,caption[,split], found {found}")
    if "split" in header:
        # a row that names no split is for training
        values = {_cell(header, row, "split") or "train" for row in rows}
        if not {"train", "test"} <= values:
            shown = ", ".join(sorted(values))
            raise ConfigError(f"--clips {clips}: split must hold both train and test, found {shown}")
    elif len({_cell(header, row, "path") for row in rows}) < 2:
        raise ConfigError(f"--clips {clips}: one file alone cannot be split into train and test")
    return [header, *rows]


def _cell(header: list[str], row: list[str], name: str) -> str:
    place = header.index(name)
    return row[place] if place < len(row) else ""


def _split_table(clips: Path, cells: list[list[str]], out: Path) -> Path:
    """The user's table; where it has no ``split`` column, a copy in which a fifth of the files are for the test."""
    header, *rows = cells
    if "split" in header:
        return clips
    width, place = len(header), header.index("path")
    files = sorted({_cell(header, row, "path") for row in rows}, key=text_hash)
    test = set(files[: max(1, round(TEST_SHARE * len(files)))])
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow([*header, "split"])
    for row in rows:
        whole = row + [""] * (width - len(row))
        split = "test" if whole[place] in test else "train"
        if whole[place]:
            whole[place] = str((clips.parent / Path(whole[place]).expanduser()).absolute())
        writer.writerow([*whole[:width], split, *whole[width:]])
    write_atomically(out / "clips.csv", text.getvalue().encode("utf-8"))
    return out / "clips.csv"


def _make(table: Path, out: Path) -> Path:
    with show_progress("making shards", "clips") as progress:
        report = make_shards(table, out / "shards", MakeOptions(), progress=progress)
    for line in report.lines(out / "shards"):
        print(line)
    for split in ("train", "test"):
        folder = out / "shards" / split
        if not (folder / "index.json").exists() or not load_manifest(folder).num_samples:
            raise RunError(f"no clip of the split {split} could be used; {out / 'shards/failures.jsonl'} names them")
    return out / "shards"


def _config(out: Path, shards: Path, steps: int | None, seed: int) -> RunConfig:
    overrides = [_set("train.out", out / "run"), _set("data.shards", shards / "train"), f"train.seed={seed}"]
    overrides += [] if steps is None else [f"train.steps={steps}"]
    return load_config(shipped("configs/pretrain/demo.yaml"), overrides)


def _set(name: str, path: str | Path) -> str:
    """An override; what stands right of ``=`` is YAML, in which a bare `` #`` or ``: `` would mean something."""
    return f"{name}={json.dumps(str(path), ensure_ascii=False)}"


def _train(out: Path, config: RunConfig) -> None:
    """``accelerate launch pipelines/pretrain.py``, unless the last step was already reached.

    The launcher runs in a session of its own, so that Ctrl-C, SIGTERM and SIGHUP reach this process alone; it then asks
    the run to save and end, by the file that works on any number of machines, and waits for it.
    """
    run = Path(config.train.out)
    latest = find_checkpoint(run)
    if latest is not None and int(latest.name.removeprefix("step_")) >= config.train.steps:
        print(f"training: {config.train.steps} steps are done")
        return
    run.mkdir(parents=True, exist_ok=True)
    command = [
        sys.executable, "-m", "accelerate.commands.launch",
        "--config_file", str(shipped("configs/accelerate/single.yaml")),
        str(shipped("pipelines/pretrain.py")), str(shipped("configs/pretrain/demo.yaml")),
        _set("train.out", run), _set("data.shards", str(config.data.shards)),
        f"train.seed={config.train.seed}", f"train.steps={config.train.steps}", "--resume", "auto",
    ]  # fmt: skip
    print(f"training: {config.train.steps} steps of {config.train.global_batch} clips", flush=True)
    with _signals_interrupt():
        launcher = subprocess.Popen(command, start_new_session=True, env=os.environ)
        try:
            code = launcher.wait()
        except KeyboardInterrupt:
            _stop(launcher, run / "stop")
            raise RunError(f"stopped; the same command goes on from what is in {out}") from None
    if code != 0:
        raise RunError(f"training failed (exit code {code}); what it said is above")


@contextmanager
def _signals_interrupt() -> Iterator[None]:
    """Within the context, the first SIGTERM or SIGHUP is a ``KeyboardInterrupt``; further ones change nothing."""
    numbers = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) != signal.SIG_IGN]

    def interrupt(number: int, frame: object) -> NoReturn:
        for one in numbers:
            signal.signal(one, signal.SIG_IGN)
        raise KeyboardInterrupt

    before = [signal.signal(number, interrupt) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def _stop(launcher: subprocess.Popen[bytes], stop_file: Path) -> None:
    """Asks again and again: a run that is only starting takes an old request away."""
    with suppress(OSError):  # the terminal may be gone
        print("saving …", flush=True)
    while launcher.poll() is None:
        stop_file.touch()
        with suppress(subprocess.TimeoutExpired):
            launcher.wait(0.5)
