"""``pipelines/pretrain.py`` as it is, but each rank writes down which batches it is given.

python watched_run.py '{"log": FOLDER, "fates": {KEY: SIGNAL}}' CONFIG [dotted.path=value …]
"""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # a launcher starts this file, not the tests

from mmcl.data import ClipStream
from mmcl.types import Batch
from support.deadly import make_deadly
from support.recipes import ROOT, TINY


def launch_watched(
    log: Path, *overrides: str, fates: Mapping[str, str] | None = None, timeout_seconds: float = 250
) -> list[list[dict[str, Any]]]:
    """Runs the tiny recipe on two ranks to its end; for each rank what it was given, batch by batch.

    A batch is its ``draws``, ``keys`` ("" for a hole), ``skipped`` as [draw, key, reason, detail], and the
    ``quarantine`` known when it was handed out.
    """
    log.mkdir()
    launcher = ["-m", "accelerate.commands.launch", "--config_file", str(ROOT / "configs/accelerate/cpu_2.yaml")]
    watch = json.dumps({"log": str(log), "fates": dict(fates or {})})
    done = subprocess.run(
        [sys.executable, *launcher, __file__, watch, str(TINY), *overrides, "train.processes=2"],
        capture_output=True,
        text=True,
        timeout=timeout_seconds,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    files = sorted(log.iterdir())
    assert [file.name for file in files] == ["0.jsonl", "1.jsonl"]
    return [[json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] for file in files]


def _watched(log: Path, fates: Mapping[str, str]) -> type[ClipStream]:
    class Watched(ClipStream):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            if fates:
                make_deadly(self, fates)

        def __iter__(self) -> Iterator[Batch]:
            with (log / f"{self.plan.rank}.jsonl").open("a", encoding="utf-8") as file:
                for batch in super().__iter__():
                    given = {"draws": batch.draws.tolist(), "keys": batch.keys, "skipped": batch.skipped}
                    file.write(json.dumps({**given, "quarantine": sorted(self.quarantine)}) + "\n")
                    file.flush()
                    yield batch

    return Watched


if __name__ == "__main__":
    from mmcl.training import trainer

    watch = json.loads(sys.argv.pop(1))
    trainer.ClipStream = _watched(Path(watch["log"]), watch["fates"])  # type: ignore[misc]
    runpy.run_path(str(ROOT / "pipelines/pretrain.py"), run_name="__main__")
