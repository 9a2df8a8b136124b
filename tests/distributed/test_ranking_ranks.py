"""The same ranks, bit for bit, and the same report on 1, 2 and 3 processes."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.gloo import GlooPool
from support.recipes import tiny_config

from mmcl.distributed import Comm
from mmcl.recipe import build_model


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
