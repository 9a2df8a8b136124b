"""A program that joins its processes after a group that it had before, as fine-tuning does for its test."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.launched import TORCHRUN, finish

PROGRAM = """
import os, time
import torch, torch.distributed as dist
from mmcl.distributed import Comm
from mmcl.distributed.launched import launched

dist.init_process_group("gloo")
dist.destroy_process_group()
for _ in range(2):
    time.sleep(float(os.environ["RANK"]))  # the first looks for the second, whose old address is still known
    with launched():
        assert Comm.current().sum(torch.ones(1)).item() == 2
"""


@pytest.mark.slow
def test_a_group_after_another_finds_its_own_processes(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    finish([*TORCHRUN, "--nproc_per_node", "2", str(program)], timeout_seconds=120)
