"""Search in 1,000,000 embedded rows beside a plain product of rows held in memory, as JSON.

    python tools/bench/search.py --quick                     # 100,000 rows
    python tools/bench/search.py                             # 1,000,000 rows of 64 numbers, 100 files: a few minutes

Each way opens the folder and answers queries in a process of its own. ``open_seconds``: up to where a query can be
asked; ``first_seconds``: the first query, which opens the files and reads what is not in the page cache;
``query_seconds``: the median of the following ones; ``anonymous_megabytes``: memory of its own above what the process
had before (pages of mapped files, which the system may drop, are not of it); ``peak_megabytes``: all that was resident.
``exact`` is ours; ``memory`` loads all rows and multiplies; ``faiss`` is ours with the index that it built before.
``recall``: how many of the exact ten best faiss finds. Rows lie around 2,000 centres; one thread.
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
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from mmcl.search import Index
from mmcl.shards.embedding_files import EmbeddingFile, EmbeddingIndex

WIDTH, TOP, FILE_ROWS, CENTRES, QUERIES, TURNS = 64, 10, 10_000, 2_000, 32, 5
RESULTS = Path(__file__).parent / "results" / "search.json"


def centres() -> torch.Tensor:
    return F.normalize(torch.randn(CENTRES, WIDTH, generator=torch.Generator().manual_seed(0)), dim=-1)


def rows_around(count: int, seed: int) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    chosen = centres()[torch.randint(CENTRES, (count,), generator=random)]
    return F.normalize(chosen + 0.1 * torch.randn(count, WIDTH, generator=random), dim=-1)


def make(folder: Path, total: int) -> None:
    """An index as `mmcl embed` writes it."""
    files = []
    for number in range(total // FILE_ROWS):
        name = f"{number:05d}"
        rows = rows_around(FILE_ROWS, number + 1)
        save_file({"video.rows": rows, "video.items": torch.arange(FILE_ROWS)}, folder / f"{name}.safetensors")
        line = '{"key": "%s_%05d", "index": %d, "captions": ["clip %d"], "label": -1, "metadata": {}}\n'
        text = "".join(line % (name, item, item, item) for item in range(FILE_ROWS))
        (folder / f"{name}.jsonl").write_text(text)
        files.append(EmbeddingFile(f"{name}.tar", name, "0", FILE_ROWS, FILE_ROWS))
    EmbeddingIndex(folder, "0" * 32, {"level": "joint"}, {"video": WIDTH}, tuple(files)).write()


def memory_bytes(kind: str) -> int:
    """``RssAnon``, ``VmRSS`` or ``VmHWM`` (its peak) of this process."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(kind))
    return 1024 * int(line.split()[1])


def opened(folder: Path, way: str) -> Callable[[torch.Tensor], Any]:
    if way == "memory":
        rows = torch.cat([load_file(path)["video.rows"] for path in sorted(folder.glob("*.safetensors"))])
        return lambda queries: (queries @ rows.T).topk(TOP, dim=1)
    index = Index.open(folder)
    return lambda queries: index.query(queries, TOP, method=way)


def one_way(folder: Path, way: str) -> dict[str, Any]:
    """In a process of its own."""
    torch.set_num_threads(1)
    queries = rows_around(QUERIES, 10**6)
    torch.ones(64, 64) @ torch.ones(64, 64)  # what the first product of a process loads
    before, resident = memory_bytes("RssAnon"), memory_bytes("VmRSS")
    wall, cpu = time.perf_counter(), time.process_time()
    ask = opened(folder, way)
    wall_open, cpu_open = time.perf_counter() - wall, time.process_time() - cpu
    wall = time.perf_counter()
    ask(queries[:1])
    first = time.perf_counter() - wall
    held, walls, cpus = memory_bytes("RssAnon"), [], []
    for turn in range(TURNS):
        wall, cpu = time.perf_counter(), time.process_time()
        ask(queries[turn : turn + 1])
        walls.append(time.perf_counter() - wall)
        cpus.append(time.process_time() - cpu)
    return {
        "open_seconds": round(wall_open, 4),
        "open_cpu_seconds": round(cpu_open, 4),
        "first_seconds": round(first, 4),
        "query_seconds": round(statistics.median(walls), 4),
        "query_cpu_seconds": round(statistics.median(cpus), 4),
        "anonymous_megabytes": round((held - before) / 1e6, 1),
        "peak_megabytes": round((memory_bytes("VmHWM") - resident) / 1e6, 1),
    }


def in_a_process(folder: Path, way: str) -> dict[str, Any]:
    command = [sys.executable, __file__, "--way", way, "--folder", str(folder)]
    found: dict[str, Any] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return found


def measure(total: int, out: Path) -> dict[str, Any]:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=out) as name:
        folder = Path(name)
        make(folder, total)
        index, queries = Index.open(folder), rows_around(QUERIES, 10**6)
        started = time.perf_counter()
        near = index.query(queries, TOP, method="faiss")
        built = time.perf_counter() - started
        exact = index.query(queries, TOP)
        bare = opened(folder, "memory")(queries).indices
        places = [[int(hit.key[:5]) * FILE_ROWS + hit.index for hit in hits] for hits in exact]
        shared = [len({hit.key for hit in a} & {hit.key for hit in b}) for a, b in zip(exact, near, strict=True)]
        return {
            "rows": total,
            "width": WIDTH,
            "files": total // FILE_ROWS,
            "row_megabytes": round(total * WIDTH * 4 / 1e6),
            "exact_equals_memory": [sorted(each) for each in places] == [sorted(each) for each in bare.tolist()],
            "faiss_build_seconds": round(built, 1),
            "faiss_recall": sum(shared) / (TOP * len(shared)),
            **{way: in_a_process(folder, way) for way in ("exact", "memory", "faiss")},
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="100,000 rows; results are only printed")
    parser.add_argument("--out", type=Path, default=Path(tempfile.gettempdir()), help="where the rows are written")
    parser.add_argument("--way", choices=("exact", "memory", "faiss"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        print(json.dumps(one_way(options.folder, options.way)))
        return
    found = measure(100_000 if options.quick else 1_000_000, options.out)
    text = json.dumps(found, indent=1)
    print(text)
    if not options.quick:
        RESULTS.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
