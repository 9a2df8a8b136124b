"""A run with learned fusion, from its configuration to a report of what the model fuses; resumed, averaged, cached."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.gloo import GlooPool
from support.launched import finish
from support.recipes import ROOT, tiny_overrides

import mmcl
from mmcl.evaluation.embed import embed_shards
from mmcl.evaluation.protocols import retrieval_protocol
from mmcl.evaluation.run import caption_labels, evaluate_checkpoint
from mmcl.model import MultimodalModel
from mmcl.training.launch import pretrain

pytestmark = pytest.mark.slow

SET, DIRECTIONS = "video+audio", ("text->video+audio", "video+audio->text")
WEIGHTS = "fusions.video+audio.mlp.linears.1.weight"


def train(shards: Path, out: Path, *more: str, resume: str | None = None) -> Path:
    """The shipped configuration, small, on twelve rows a step."""
    places = tiny_overrides(shards=shards / "train", out=out)
    own = [each for each in places if not each.startswith("objectives")]
    often = ["train.steps=8", "train.global_batch=12", "train.log_every=1", "train.checkpoint_every=4"]
    more = ("train.optimizer={learning_rate: 1.0e-2, warmup_steps: 1}", "train.ema={decay: 0.5}", *more)
    pretrain(mmcl.load_config(ROOT / "configs/pretrain/fusion.yaml", [*own, *often, *more]), resume=resume)
    return out


@pytest.fixture(scope="module")
def run(shards_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(shards_folder, tmp_path_factory.mktemp("run"))


def weights(run: Path, step: int, part: str = "") -> dict[str, torch.Tensor]:
    return load_file(run / f"checkpoints/step_{step:08d}" / part / "model.safetensors")


def test_fusions_learn_resume_and_are_averaged(run: Path, shards_folder: Path, tmp_path: Path) -> None:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert {"cross_modal/loss/text-video+audio", "temperature/text-video+audio"} <= lines[0].keys()
    early, late = weights(run, 4), weights(run, 8)
    assert early[WEIGHTS].abs().max() > 0 and not torch.equal(early[WEIGHTS], late[WEIGHTS])
    averages = [weights(run, step, "ema")[WEIGHTS] for step in (4, 8)]
    assert not torch.equal(averages[1], late[WEIGHTS]) and not torch.equal(*averages)
    train(shards_folder, tmp_path / "again", "train.checkpoint_every=4", resume=str(run / "checkpoints/step_00000004"))
    assert all(torch.equal(value, late[name]) for name, value in weights(tmp_path / "again", 8).items())
    cached = weights(train(shards_folder, tmp_path / "cached", "train.micro_batch=4"), 8)
    assert (cached[WEIGHTS] - late[WEIGHTS]).abs().max() < 0.02 * late[WEIGHTS].abs().max()


def test_the_report_is_of_what_the_model_fuses(run: Path, shards_folder: Path, tmp_path: Path) -> None:
    shards, out = str(shards_folder / "train"), tmp_path / "learned"
    words = [str(run), shards, "--directions", ",".join(DIRECTIONS), "--join", "learned", "--workers", "0"]
    finish([sys.executable, "-m", "mmcl", "evaluate", "retrieval", *words, "--out", str(out)])
    plainly = retrieval_protocol(directions=DIRECTIONS)
    evaluate_checkpoint(run, shards, tmp_path / "mean", protocol=plainly, workers=0, cache=out / "embeddings")
    learned, mean = (json.loads((tmp_path / join / "report.json").read_text()) for join in ("learned", "mean"))
    assert learned["facts"]["sets of modalities"] == "an item's rows joined by the model's fusion of them"
    assert mean["facts"]["sets of modalities"] == "an item's rows joined by their mean"
    assert "joined by the model's fusion of them" in (tmp_path / "learned/report.md").read_text()
    assert learned["fingerprint"] != mean["fingerprint"] and learned["asked"]["fusion"] == "learned"

    model = MultimodalModel.from_pretrained(run)
    found = embed_shards(model, shards, in_process=True)
    heard = found.owners["audio"]
    assert len(heard) == 14 < len(found.items) == 16
    video = found.rows["video"][heard]
    fused = model.fuse({"audio": found.rows["audio"], "video": video})
    plain = torch.nn.functional.normalize(found.rows["audio"] + video, dim=1)
    assert (fused * plain).sum(1).mean() < 0.99, "the run has left the mean"
    labels = caption_labels(found.items)
    texts = found.owners["text"].numpy()
    for rows, report in ((fused, learned), (plain, mean)):
        scores = (found.rows["text"] @ rows.T).numpy()
        right = labels[texts][:, None] == labels[heard.numpy()]
        for direction, s, r in zip(DIRECTIONS, (scores, scores.T), (right, right.T), strict=True):
            ranks = _expected_ranks(s, r)
            figures = report["directions"][direction]
            assert figures["queries"] == len(ranks)
            assert figures["MnR"] == pytest.approx(ranks.mean()), direction
            assert figures["MedR"] == pytest.approx(np.median(ranks)), direction
    assert any(learned["directions"][d]["mAP@10"] != mean["directions"][d]["mAP@10"] for d in DIRECTIONS)


def _expected_ranks(scores: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Of the first right one of each query; g right and w wrong ones of the best right score lie in random order."""
    best = np.where(right, scores, -2).max(1, keepdims=True)
    above = ((scores > best) & ~right).sum(1)
    wrong, good = ((scores == best) & ~right).sum(1), ((scores == best) & right).sum(1)
    return 1 + above + wrong / (good + 1)


def evaluated(rank: int, world: int, run: str, shards: str, out: str) -> None:
    protocol = retrieval_protocol(directions=DIRECTIONS, fusion="learned")
    evaluate_checkpoint(run, shards, Path(out) / str(world), protocol=protocol, cache=Path(out) / "cache")


def test_two_and_three_processes_report_the_same(
    run: Path, shards_folder: Path, tmp_path: Path, gloo: GlooPool
) -> None:
    places = (str(run), str(shards_folder / "train"), str(tmp_path))
    evaluated(0, 1, *places)
    for world in (2, 3):
        gloo(world, evaluated, *places)
        assert (tmp_path / f"{world}/report.json").read_text() == (tmp_path / "1/report.json").read_text()
