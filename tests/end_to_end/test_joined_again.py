"""A program that joins its processes after a group that it had before, as fine-tuning does for its test."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.launched import TORCHRUN, finish

PROGRAM = """
import os, time
import torch
from mmcl.distributed import Comm
from mmcl.distributed.launched import launched

for number in range(12):  # now this one is late and now that: the old address of a late one is still known
    time.sleep(0.3 * ((number // 2 + int(os.environ["RANK"])) % 2))
    with launched():
        assert Comm.current().sum(torch.ones(1)).item() == 2
"""


@pytest.mark.slow
def test_a_group_after_another_finds_its_own_processes(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    finish([*TORCHRUN, "--nproc_per_node", "2", str(program)], timeout_seconds=100)
