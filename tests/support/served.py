"""`mmcl serve` in a process of its own, on an index of the generated shards."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from mmcl.evaluation.embed import embed_to_folder
from mmcl.recipe import build_model
from support.recipes import ROOT, tiny_config


@dataclass(frozen=True)
class Served:
    url: str
    model: Path
    index: Path
    uploads: Path
    """where its temporary folder is"""


@pytest.fixture(scope="module")
def served(shards_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("served")
    torch.manual_seed(0)
    model = build_model(tiny_config())[0].save_pretrained(folder / "model")
    embed_to_folder(model, str(shards_folder / "train"), folder / "index", in_process=True)
    uploads = folder / "tmp"
    uploads.mkdir()
    process = subprocess.Popen(
        [sys.executable, "-m", "mmcl", "serve", str(model), str(folder / "index"), "--port", "0"],
        env={**os.environ, "TMPDIR": str(uploads), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        found = re.search(r"http://127\.0\.0\.1:\d+", line)
        assert found, f"no address in {line!r}"
        yield Served(found[0], model, folder / "index", uploads)
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(timeout=20)
        assert not [path for path in uploads.iterdir() if path.name.startswith("mmcl-serve-")]
