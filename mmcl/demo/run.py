"""The whole main job in one call: record, make shards, train, evaluate, report. Each goes on from what is there."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from mmcl.demo.record import record_games
from mmcl.evaluation.run import evaluate_checkpoint
from mmcl.evaluation.show import print_evaluation
from mmcl.hashing import text_hash, uniform
from mmcl.progress import show_progress
from mmcl.recipe import RunConfig, load_config
from mmcl.shards.make import MakeOptions, make_shards
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
    _settle(out, {"steps": steps, "seed": seed, "clips": None if clips is None else str(clips.resolve())})
    if clips is None:
        print(NOTE)
        table = _record(out, seed)
    else:
        table = _split_table(clips, out)
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
            before = json.loads(path.read_text(encoding="utf-8"))
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


def _split_table(clips: Path, out: Path) -> Path:
    """The user's table; where it has no ``split`` column, a copy in which a fifth of the clips are for the test."""
    try:
        with clips.open(encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file))
    except FileNotFoundError:
        raise ConfigError(f"--clips {clips}: no such file") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"--clips {clips}: cannot be read: {error}") from None
    if not rows or "path" not in rows[0]:
        found = ", ".join(rows[0]) if rows else "no rows"
        raise ConfigError(f"--clips {clips}: needs the columns path,caption[,split], found {found}")
    if "split" in rows[0]:
        values = sorted({row["split"] for row in rows})
        if not {"train", "test"} <= set(values):
            raise ConfigError(f"--clips {clips}: split must hold both train and test, found {', '.join(values)}")
        return clips
    table = out / "clips.csv"
    with table.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], "split"])
        writer.writeheader()
        for row in rows:
            chosen = float(uniform(text_hash(row["path"]))) < TEST_SHARE
            path = str((clips.parent / row["path"]).resolve())
            writer.writerow({**row, "path": path, "split": "test" if chosen else "train"})
    return table


def _make(table: Path, out: Path) -> Path:
    with show_progress("making shards", "clips") as progress:
        report = make_shards(table, out / "shards", MakeOptions(), progress=progress)
    for line in report.lines(out / "shards"):
        print(line)
    return out / "shards"


def _config(out: Path, shards: Path, steps: int | None, seed: int) -> RunConfig:
    overrides = [f"train.out={out / 'run'}", f"data.shards={shards / 'train'}", f"train.seed={seed}"]
    overrides += [] if steps is None else [f"train.steps={steps}"]
    return load_config(shipped("configs/pretrain/demo.yaml"), overrides)


def _train(out: Path, config: RunConfig) -> None:
    """``accelerate launch pipelines/pretrain.py``, unless the last step was already reached.

    The launcher runs in a session of its own, so that Ctrl-C reaches this process alone; it then asks the run to save
    and end, by the file that works on any number of machines.
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
        f"train.out={run}", f"data.shards={config.data.shards}",
        f"train.seed={config.train.seed}", f"train.steps={config.train.steps}", "--resume", "auto",
    ]  # fmt: skip
    print(f"training: {config.train.steps} steps of {config.train.global_batch} clips", flush=True)
    launcher = subprocess.Popen(command, start_new_session=True, env=os.environ)
    try:
        code = launcher.wait()
    except KeyboardInterrupt:
        (run / "stop").touch()
        print("saving …", flush=True)
        launcher.wait()
        raise RunError(f"stopped; the same command goes on from what is in {out}") from None
    if code != 0:
        raise RunError(f"training failed (exit code {code}); what it said is above")
