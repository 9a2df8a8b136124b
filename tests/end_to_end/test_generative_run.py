"""Decoders in whole runs on generated clips and captions: bits per dim fall, and what cMIM learned can be probed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from support.recipes import ROOT
from typer.testing import CliRunner

import mmcl
from mmcl.cli import app
from mmcl.evaluation.informative import embed_informative, load_cmim
from mmcl.evaluation.probes import neighbour_accuracy, neighbour_votes
from mmcl.training.launch import pretrain
from mmcl.types import ConfigError

QUICK = [
    "train.global_batch=8",
    "train.log_every=1",
    "train.checkpoint_every=1000",
    "train.threads=1",
    "train.optimizer.warmup_steps=10",
    "train.optimizer.learning_rate=0.003",
    "data.decoder=pyav",
    "data.in_process=true",
]


def trained(name: str, shards: Path, out: Path, *more: str) -> list[dict[str, float]]:
    """The lines of the metrics of a shipped configuration, on small pictures."""
    config = mmcl.load_config(
        ROOT / f"configs/pretrain/{name}.yaml", [*QUICK, *more, f"data.shards={shards}", f"train.out={out}"]
    )
    pretrain(config)
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def fall(lines: list[dict[str, float]], name: str) -> tuple[float, float]:
    """Means of the first and of the last five steps."""
    first, last = (sum(line[name] for line in part) / 5 for part in (lines[:5], lines[-5:]))
    return first, last


@pytest.mark.slow
def test_bits_per_dim_fall_on_captions_and_clips(shards_folder: Path, tmp_path: Path) -> None:
    lines = trained("generative_contrastive_cross", shards_folder / "train", tmp_path / "cross", "train.steps=40")
    for name, start in (("generative_contrastive", 4.0), ("generative_contrastive_2", 8.006)):
        first, last = fall(lines, f"{name}/bits_per_dim")
        assert abs(lines[0][f"{name}/bits_per_dim"] - start) < 0.02, "all tokens are equally likely at first"
        assert last < 0.75 * first
    assert "generative_contrastive_2/bits_per_dim_augmented" in lines[0]


@pytest.mark.slow
def test_a_trained_cmim_gives_informative_embeddings_to_probes(shards_folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "cmim"
    lines = trained("cmim", shards_folder / "train", run, "train.steps=40", "model.towers.video.size=32")
    first, last = fall(lines, "cmim/bits_per_dim")
    assert last < 0.75 * first
    found = embed_informative(run, str(shards_folder / "train"), in_process=True, batch=4)
    rows = found.rows["text"]
    assert rows.shape[1] == 64 and len(rows) == len(found.owners["text"]) > 8
    again = embed_informative(run, str(shards_folder / "train"), in_process=True, batch=64)
    torch.testing.assert_close(again.rows["text"], rows, rtol=1e-4, atol=1e-5)
    captions = [found.items[int(i)].captions[0] for i in found.owners["text"]]
    names = sorted(set(captions))
    labels = torch.tensor([names.index(caption) for caption in captions])
    votes = neighbour_votes(rows, rows, labels, classes=len(names), neighbours=1)
    assert torch.equal(votes.argmax(1), labels), "a caption's nearest embedding is its own"
    video = embed_informative(run, str(shards_folder / "train"), objective="cmim_1", in_process=True)
    assert video.rows["video"].shape[1] == 64 and video.rows["video"].std() > 0
    windows = embed_informative(run, str(shards_folder / "test"), modality="video", clips=2, each_view=True, workers=1)
    assert windows.rows["video"].shape[1:] == (2, 64)
    asked = ["--features", "informative", "--column", "group", "--clips", "2", "--neighbours", "3", "--workers", "1"]
    places = [str(run), str(shards_folder / "test"), "--train", str(shards_folder / "train")]
    done = CliRunner().invoke(app, ["evaluate", "knn", *places, *asked, "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / "out/report.json").read_text())
    (task,) = report["tasks"].values()
    colours = [[str(item.metadata["group"]) for item in each.items] for each in (windows, video)]
    bank, tests = (torch.tensor([sorted(set(colours[1])).index(x) for x in each]) for each in (colours[1], colours[0]))
    mean = windows.rows["video"].mean(1)
    accuracy = neighbour_accuracy(
        mean, tests[windows.owners["video"]], video.rows["video"], bank[video.owners["video"]], neighbours=3
    )
    assert task["top-1"] == pytest.approx(accuracy) and task["settings"]["features"] == "informative"
    with pytest.raises(ConfigError, match="no cmim of audio was trained, but of text, video"):
        load_cmim(run, modality="audio")
    model, objective = load_cmim(run)
    assert not objective.training and objective.tower.name == "text" and "video" in model.towers
    with pytest.raises(ConfigError, match="cmim_2"):
        load_cmim(run, "cmim_2")
    with pytest.raises(ConfigError, match="a model without its objectives"):
        load_cmim(model.export(tmp_path / "exported"))
