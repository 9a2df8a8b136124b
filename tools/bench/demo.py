"""The demo, whole, for several seeds: R@1 of every direction and seconds, as JSON and as a table for the README.

python tools/bench/demo.py --seeds 0 1 2 --cores 2 --out tools/bench/results/demo.json
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def run(seed: int, folder: Path, cores: int) -> dict[str, object]:
    """One demo in a fresh folder, held to so many cores."""
    available = sorted(os.sched_getaffinity(0))[:cores]
    start = time.monotonic()
    subprocess.run(
        [sys.executable, "-m", "mmcl", "demo", "--out", str(folder), "--seed", str(seed)],
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        preexec_fn=lambda: os.sched_setaffinity(0, available),
    )
    seconds = time.monotonic() - start
    report = json.loads((folder / "report" / "report.json").read_text(encoding="utf-8"))
    found = {
        name: {direction: figures["R@1"] for direction, figures in each["directions"].items()}
        for name, each in report["lists"].items()
    }
    return {"seed": seed, "seconds": round(seconds, 1), "R@1": found}


def table(runs: list[dict[str, object]]) -> str:
    """Median and lowest of the seeds, per direction."""
    directions = list(runs[0]["R@1"]["known"])  # type: ignore[index]
    lines = ["| | " + " | ".join(directions) + " |", "| --- |" + " ---: |" * len(directions)]
    for name in ("known", "zero_shot"):
        values = [[each["R@1"][name][direction] for each in runs] for direction in directions]  # type: ignore[index]
        for label, pick in (("median", statistics.median), ("lowest", min)):
            lines.append(f"| {name}, {label} | " + " | ".join(f"{pick(column):.1f}" for column in values) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    runs = []
    for seed in arguments.seeds:
        with tempfile.TemporaryDirectory() as folder:
            runs.append(run(seed, Path(folder), arguments.cores))
        print(json.dumps(runs[-1]), flush=True)
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps({"cores": arguments.cores, "runs": runs}, indent=1) + "\n")
    print(table(runs))


if __name__ == "__main__":
    main()
