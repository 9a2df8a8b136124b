"""Stages: killed between two they go on to the same labels and weights; together they are one model to evaluate."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from support.recipes import ROOT

import mmcl
from mmcl.concatenated import ConcatenatedModel, open_model
from mmcl.data.clusters import digits_of, read_clusters
from mmcl.evaluation.embed import embed_shards, embed_to_folder
from mmcl.evaluation.embedding_store import model_checksum
from mmcl.evaluation.run import evaluate_checkpoint
from mmcl.multistage import run_stages
from mmcl.multistage.run import labels_file
from mmcl.recipe import RunConfig
from mmcl.training.checkpoint import find_checkpoint, load_tensors
from mmcl.training.launch import pretrain
from mmcl.types import ConfigError

CONFIG = ROOT / "configs/pretrain/multistage.yaml"
PIPELINE = str(ROOT / "pipelines/multistage.py")


def settings(shards: Path, out: Path, *more: str) -> list[str]:
    quick = ("train.steps=6", "train.global_batch=4", "multistage.clusters=3", "train.threads=1")
    decoding = ("data.decoder=pyav", "data.in_process=true")
    return [*quick, *decoding, f"data.shards={shards / 'train'}", f"train.out={out}", *more]


def config(shards: Path, out: Path, *more: str) -> RunConfig:
    return mmcl.load_config(CONFIG, settings(shards, out, *more))


def weights(out: Path, stage: int) -> dict[str, torch.Tensor]:
    checkpoint = find_checkpoint(out / f"stage_{stage}/run")
    assert checkpoint is not None
    return load_tensors(checkpoint / "model.safetensors")


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert torch.equal(value, right[name]), name


@pytest.fixture(scope="module")
def whole(shards_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three stages, never interrupted."""
    out = tmp_path_factory.mktemp("stages") / "out"
    assert run_stages(config(shards_folder, out, "multistage.stages=3"))
    return out


@pytest.mark.slow
def test_killed_between_stages_it_goes_on_to_the_same(shards_folder: Path, whole: Path, tmp_path: Path) -> None:
    """The first time by SIGKILL as soon as the labels of stage 0 are there, then by a stop file."""
    out = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, PIPELINE, str(CONFIG), *settings(shards_folder, out)],
        cwd=ROOT,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 120
        while not labels_file(out, 0).exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        assert process.poll() is None, "the stages ended before they could be killed"
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert read_clusters(labels_file(out, 0)).checksum == read_clusters(labels_file(whole, 0)).checksum
    before = labels_file(out, 0).stat().st_mtime_ns
    assert not (out / "config.json").exists(), "nothing says that it is done"
    assert run_stages(config(shards_folder, out))
    assert labels_file(out, 0).stat().st_mtime_ns == before, "a finished stage is kept"
    assert_same(weights(out, 0), weights(whole, 0))
    assert_same(weights(out, 1), weights(whole, 1))
    assert len(open_model(out).stages()) == 2  # type: ignore[union-attr]
    # a third stage may come later
    assert run_stages(config(shards_folder, out, "multistage.stages=3"))
    assert read_clusters(labels_file(out, 1)).checksum == read_clusters(labels_file(whole, 1)).checksum
    assert_same(weights(out, 2), weights(whole, 2))


@pytest.mark.slow
def test_what_the_stages_are(shards_folder: Path, whole: Path) -> None:
    first, second = (read_clusters(labels_file(whole, stage)) for stage in range(2))
    assert (first.radix, second.radix) == ((3,), (3, 3))
    assert len(first.counts) > 1 and set(first.labels.tolist()) <= {0, 1, 2}
    for before, after in zip(first.labels.tolist(), second.labels.tolist(), strict=True):
        assert digits_of(after, second.radix)[0] == before
    ends = [weights(whole, stage) for stage in (0, 1)]
    assert any(not torch.equal(value, ends[1][name]) for name, value in ends[0].items())
    found = mmcl.load_config(find_checkpoint(whole / "stage_2/run") / "config.yaml")  # type: ignore[operator]
    assert found.data.clusters == str(labels_file(whole, 1))


@pytest.mark.slow
def test_the_stages_together_are_one_model(shards_folder: Path, whole: Path, tmp_path: Path) -> None:
    joined, test = open_model(whole), str(shards_folder / "test")
    assert isinstance(joined, ConcatenatedModel)
    assert joined.encode_text(["a red clip", "a blue clip"]).shape == (2, 96)
    together = embed_shards(joined, test, in_process=True)
    alone = [embed_shards(model, test, in_process=True) for model in joined.stages()]
    for modality in ("video", "text"):
        cosines = [each.rows[modality] @ each.rows[modality].T for each in alone]
        ours = together.rows[modality] @ together.rows[modality].T
        assert torch.allclose(ours, torch.stack(cosines).mean(0), atol=1e-5)
    same = ConcatenatedModel([joined.first] * 3)
    again = embed_shards(same, test, in_process=True).rows["video"]
    assert torch.allclose(again @ again.T, alone[0].rows["video"] @ alone[0].rows["video"].T, atol=1e-5)
    stored = embed_to_folder(whole, test, tmp_path / "embedded", in_process=True)
    assert torch.equal(stored.load().rows["video"], together.rows["video"])
    assert stored.index.widths == {"video": 96, "text": 96}
    pooled = embed_shards(joined, test, in_process=True, level="pooled")
    assert pooled.rows["video"].shape[1] == joined.width("video", "pooled") == 3 * 64
    report = evaluate_checkpoint(whole, test, tmp_path / "report", workers=0).report
    assert {"text->video", "video->text"} <= set(report.lists[0].directions)
    assert len({model_checksum(place) for place in (whole, whole / "stage_0/run", whole / "stage_1/run")}) == 3


@pytest.mark.slow
def test_mixed_batches_learn_too_and_micro_batches_change_nothing(
    shards_folder: Path, whole: Path, tmp_path: Path
) -> None:
    labels = f"data.clusters={labels_file(whole, 0)}"
    mixed = (labels, "data.cluster_batches=mixed", "train.steps=4", "train.log_every=1")
    runs = {"base": mixed[2:], "pure": (labels, *mixed[2:]), "mixed": mixed, "micro": (*mixed, "train.micro_batch=3")}
    lines = {}
    for name, more in runs.items():
        pretrain(config(shards_folder, tmp_path / name, "train.global_batch=8", *more))
        text = (tmp_path / name / "metrics.jsonl").read_text()
        lines[name] = [json.loads(line) for line in text.splitlines()]
    found = {name: [line["loss"] for line in each] for name, each in lines.items()}
    assert found["micro"] == pytest.approx(found["mixed"], rel=1e-4)
    assert all(few < many for few, many in zip(found["mixed"], found["base"], strict=True)), "fewer negatives"
    assert all(0 < line["negatives"] < 7 for line in lines["mixed"])
    with pytest.raises(ConfigError, match=r"objectives\.0 \(mutual\) does not keep"):
        objective = "objectives=[{name: mutual}]"
        pretrain(config(shards_folder, tmp_path / "deaf", objective, *mixed))
    with pytest.raises(ConfigError, match=r"mixed needs data\.clusters"):
        pretrain(config(shards_folder, tmp_path / "none", mixed[1]))


@pytest.mark.slow
def test_two_processes_make_the_same_labels(shards_folder: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "two"
    launch = ["-m", "accelerate.commands.launch", "--config_file", str(ROOT / "configs/accelerate/cpu_2.yaml")]
    done = subprocess.run(
        [sys.executable, *launch, PIPELINE, str(CONFIG), *settings(shards_folder, out, "train.processes=2")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "pseudo-labels of" in done.stdout
    assert read_clusters(labels_file(out, 0)).labels.tolist() == read_clusters(labels_file(whole, 0)).labels.tolist()
    ours, theirs = weights(out, 1), weights(whole, 1)
    for name, value in ours.items():
        assert torch.allclose(value, theirs[name], atol=2e-3), name


def test_wrong_stages_are_refused_by_name(shards_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.clusters: the stages make their own"):
        run_stages(config(shards_folder, tmp_path, "data.clusters=x"))
    with pytest.raises(ConfigError, match="63 bits"):
        run_stages(config(shards_folder, tmp_path, "multistage.stages=60", "multistage.clusters=100"))
    several = f"data.sources=[{{shards: {shards_folder / 'train'}}}]"
    with pytest.raises(ConfigError, match=r"data\.shards"):
        run_stages(config(shards_folder, tmp_path, several, "data.shards=null"))
    with pytest.raises(ConfigError, match="no stages"):
        ConcatenatedModel.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="same towers"):
        ConcatenatedModel([])
