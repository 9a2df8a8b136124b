"""The recipes of papers, too large to train in a test: each builds its model, made smaller, and reads a batch."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from support.recipes import PAPERS, ROOT
from support.shards import read_shards, write_shards

import mmcl
from mmcl.shards.vectors import write_vector
from mmcl.training.launch import describe

IN_THE_DEFAULT_SUITE = "rho_byol_slow_r50"


@pytest.fixture(scope="module")
def places(shards_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Films; films with labels and an embedding of 512 numbers; pictures with a text, as open_clip reads them."""
    folder, random = tmp_path_factory.mktemp("recipes"), np.random.default_rng(0)
    samples = read_shards(shards_folder / "train")
    for number, members in enumerate(samples.values()):
        members["sound.npy"], members["cls"] = write_vector(random.normal(size=512)), str(number % 3).encode()
    write_shards(folder / "taught", samples, max_count=5)
    pictures = {}
    for number in range(8):
        file = io.BytesIO()
        Image.fromarray(random.integers(0, 255, (40, 60, 3), np.uint8)).save(file, "jpeg")
        pictures[f"{number:09d}"] = {"jpg": file.getvalue(), "txt": f"picture {number}".encode()}
    write_shards(folder / "pictures", pictures)
    return {"films": shards_folder / "train", "taught": folder / "taught", "pictures": folder / "pictures"}


@pytest.mark.parametrize(
    "name", [name if name == IN_THE_DEFAULT_SUITE else pytest.param(name, marks=pytest.mark.slow) for name in PAPERS]
)
def test_it_dry_runs(name: str, places: dict[str, Path]) -> None:
    path = ROOT / f"configs/pretrain/{name}.yaml"
    smaller, shards, first = PAPERS[name]
    places_and_size = [f"data.shards={places[shards]}", "data.in_process=true", "train.global_batch=2"]
    said = describe(mmcl.load_config(path, [*smaller, *places_and_size]))
    assert yaml.safe_load(said)["objectives"]
    assert first in said and "2 present" in said, said[-1500:]


@pytest.mark.parametrize("name", PAPERS)
def test_it_says_where_it_comes_from(name: str) -> None:
    text = (ROOT / f"configs/pretrain/{name}.yaml").read_text(encoding="utf-8")
    head = " ".join(line.removeprefix("# ") for line in text.splitlines() if line.startswith("# "))
    assert "arXiv" in head and "Data: " in head and "reproduced" in head
