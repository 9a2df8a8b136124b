"""The same ranks, bit for bit, and the same report on 1, 2 and 3 processes."""

from __future__ import annotations

import json
import multiprocessing
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.gloo import GlooPool
from support.recipes import ROOT, tiny_config

from mmcl.distributed import Comm
from mmcl.recipe import build_model


def by_best(rank: int, world: int) -> dict[str, np.ndarray]:
    from mmcl.evaluation import best

    block, best._BLOCK = best._BLOCK, 16
    try:
        random = torch.Generator().manual_seed(1)
        a, b = (torch.nn.functional.normalize(torch.randn(n, 33, generator=random)) for n in (107, 211))
        b[100:103] = b[7]
        right = [[row, row + 100] for row in range(107)]
        return dict(vars(best.ranks_by_best(a, b, right, np.arange(211) // 3, comm=Comm.current())))
    finally:
        best._BLOCK = block


def both_ways(rank: int, world: int) -> list[dict[str, np.ndarray]]:
    from mmcl.evaluation import streaming
    from mmcl.evaluation.ranking import ranks_both

    sizes = streaming.TILE_ROWS, streaming.TILE_COLUMNS
    streaming.TILE_ROWS, streaming.TILE_COLUMNS = 48, 64
    try:
        random = torch.Generator().manual_seed(0)
        a, b = (torch.nn.functional.normalize(torch.randn(n, 33, generator=random)) for n in (203, 301))
        a[9], b[100:103] = a[150], b[7]
        right = [[row, (row * 7) % 301] for row in range(203)]
        return [dict(vars(each)) for each in ranks_both(a, b, right, comm=Comm.current())]
    finally:
        streaming.TILE_ROWS, streaming.TILE_COLUMNS = sizes


def test_ranks_are_the_same_bit_for_bit(gloo: GlooPool) -> None:
    alone = gloo(1, both_ways)[0]
    for world in (2, 3):
        for found in gloo(world, both_ways):
            for mine, wanted in zip(found, alone, strict=True):
                for name, value in wanted.items():
                    np.testing.assert_equal(mine[name], value, err_msg=name)


def test_ranks_by_the_best_caption_are_too(gloo: GlooPool) -> None:
    alone = gloo(1, by_best)[0]
    for world in (2, 3):
        for found in gloo(world, by_best):
            for name, value in alone.items():
                np.testing.assert_equal(found[name], value, err_msg=name)


def evaluates(rank: int, world: int, model: str, shards: str, out: str) -> list[str]:
    from mmcl.evaluation.protocols import TRANSDUCTIVE, retrieval_protocol
    from mmcl.evaluation.run import evaluate_checkpoint

    # the pool's processes are daemons, which may start no decoding processes
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]
    protocol = retrieval_protocol(post=TRANSDUCTIVE)
    found = evaluate_checkpoint(model, shards, Path(out) / str(world), workers=1, protocol=protocol, per="group")
    return [item.key for item in found.embedded.items]


@pytest.mark.slow
def test_the_report_is_the_same(gloo: GlooPool, shards_folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = build_model(tiny_config())[0].export(tmp_path / "model")
    reports: list[dict[str, Any]] = []
    for world in (1, 2, 3):
        for keys in gloo(world, evaluates, str(model), str(shards_folder / "train"), str(tmp_path)):
            assert len(keys) == len(set(keys)) == 16
        reports.append(json.loads((tmp_path / str(world) / "report.json").read_text()))
    for report in reports[1:]:
        assert report["lists"]["all"]["ranks"] == reports[0]["lists"]["all"]["ranks"]
        assert report["directions"] == reports[0]["directions"]
        assert (report["fingerprint"], report["lists"]["all"]["items"]) == (reports[0]["fingerprint"], 16)


@pytest.mark.slow
def test_a_launch_on_three_processes_gives_the_report_of_one(shards_folder: Path, tmp_path: Path) -> None:
    """As a user starts it: one report, written once, with ranks bit for bit those of `mmcl evaluate`."""
    torch.manual_seed(0)
    model = build_model(tiny_config())[0].export(tmp_path / "model")
    arguments = [str(model), str(shards_folder), "--workers", "1", "--protocol", str(tmp_path / "mine.yaml")]
    (tmp_path / "mine.yaml").write_text("name: mine\nsplit: train\ntext_gallery: best\ndirections: [all]\n")
    launcher = ["-m", "accelerate.commands.launch", "--config_file", str(ROOT / "configs/accelerate/cpu_2.yaml")]
    script = str(ROOT / "pipelines/evaluate.py")
    reports = {}
    for world, command in ((1, ["-m", "mmcl", "evaluate", "retrieval"]), (3, [*launcher, "--num_processes=3", script])):
        out = tmp_path / str(world)
        done = subprocess.run(
            [sys.executable, *command, *arguments, "--out", str(out)],
            capture_output=True,
            text=True,
            timeout=250,
            check=False,
            cwd=ROOT,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count(f"report: {out / 'report.html'}") == 1, "the first process alone prints"
        reports[world] = json.loads((out / "report.json").read_text())
    assert reports[3]["fingerprint"] == reports[1]["fingerprint"]
    assert len(reports[1]["directions"]) == 12
    assert reports[3]["lists"]["all"]["ranks"] == reports[1]["lists"]["all"]["ranks"]
    assert reports[3]["directions"] == reports[1]["directions"]
