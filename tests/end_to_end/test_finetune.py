"""Fine-tuning: what is locked keeps its bits, what learns tells generated clips apart; the test is that of papers."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.launched import CPU_2, finish
from support.recipes import ROOT, tiny_config
from support.shards import read_shards, write_shards

import mmcl
from mmcl.evaluation.classification import classify
from mmcl.evaluation.embed import embed_shards
from mmcl.evaluation.fine_tuned import evaluate_fine_tuned, read_heads
from mmcl.model import MultimodalModel
from mmcl.recipe import build_model
from mmcl.training.launch import pretrain
from mmcl.types import ConfigError

TOWER = "name: tiny_video, width: 32, channels: 16, size: 32, frames: 2, fps: 4, fit: crop"
QUICK = [
    "train.global_batch=8",
    "train.threads=1",
    "train.log_every=5",
    "data.in_process=true",
    "objectives.0.classes=8",
]
CHANCE = 100 / 8


def numbered(folder: Path, out: Path) -> Path:
    """The shards with the number of its colour as the label of each clip."""
    samples = read_shards(folder)
    colours = sorted({json.loads(members["json"])["group"] for members in samples.values()})
    for members in samples.values():
        facts = json.loads(members["json"])
        facts["label_name"], facts["label"] = facts["group"], colours.index(facts["group"])
        members["json"] = json.dumps(facts).encode()
    write_shards(out, samples, max_count=5)
    return out


@pytest.fixture(scope="module")
def places(shards_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("labelled")
    torch.manual_seed(0)
    model = build_model(tiny_config(f"model.towers.video={{{TOWER}}}"))[0].save_pretrained(folder / "model")
    parts = {part: numbered(shards_folder / part, folder / part) for part in ("train", "test")}
    return {"model": model, **parts}


def arguments(places: dict[str, Path], out: Path, *more: str, lock: str = "none") -> list[str]:
    tower = f"model.towers.video={{{TOWER}, pretrained: {places['model']}, layer_decay: 0.75, lock: {lock}}}"
    return [tower, f"data.shards={places['train']}", f"train.out={out}", *QUICK, *more]


def test_a_head_alone_learns_and_its_tower_keeps_its_bits(places: dict[str, Path], tmp_path: Path) -> None:
    overrides = arguments(places, tmp_path / "run", "train.steps=6", "evaluate.clips=2", lock="with_head")
    pretrain(mmcl.load_config(ROOT / "configs/finetune/classify.yaml", overrides))
    before, after = (
        MultimodalModel.from_pretrained(where).tower("video") for where in (places["model"], tmp_path / "run")
    )
    alike = [torch.equal(p, q) for p, q in zip(before.state_dict().values(), after.state_dict().values(), strict=True)]
    assert alike and all(alike)
    (head,) = read_heads(tmp_path / "run")
    assert (head.name, head.tower, head.level, *head.weight.shape) == ("classification", "video", "pooled", 8, 32)
    assert head.bias.abs().max() > 0, "it did not learn"

    report = evaluate_fine_tuned(tmp_path / "run", str(places["test"]), tmp_path / "out", crops=3, workers=1)
    found = json.loads((tmp_path / "out/report.json").read_text())["tasks"]["head:video"]
    assert report.results[0].metrics["top-1"] == pytest.approx(found["top-1"])
    assert found["settings"]["windows"] == 2 and found["settings"]["crops"] == 3
    assert found["classes"][0] == "blue" and found["samples"] == 8
    # by hand: the softmax of each of 2 × 3 views
    model = MultimodalModel.from_pretrained(tmp_path / "run")
    views = embed_shards(model, str(places["test"]), clips=2, crops=3, level="pooled", each_view=True, in_process=True)
    rows = views.rows["video"]
    assert rows.shape[1] == 6
    scores = (rows @ head.weight.T + head.bias).softmax(-1).mean(1)
    labels = torch.tensor([views.items[owner].label for owner in views.owners["video"].tolist()])
    assert classify(scores, labels).metrics()["top-1"] == pytest.approx(found["top-1"])

    (tmp_path / "fewer").mkdir()
    wrong = read_shards(places["test"])
    for members in wrong.values():
        members["json"] = json.dumps({**json.loads(members["json"]), "label": 8}).encode()
    write_shards(tmp_path / "fewer", wrong)
    with pytest.raises(ConfigError, match=r"has label 8: the head tells 0 … 7 apart"):
        evaluate_fine_tuned(tmp_path / "run", str(tmp_path / "fewer"), tmp_path / "out", workers=1)


@pytest.mark.slow
def test_all_layers_beat_chance_clearly_from_one_command(places: dict[str, Path], tmp_path: Path) -> None:
    program = [*CPU_2, str(ROOT / "pipelines/finetune.py"), str(ROOT / "configs/finetune/classify.yaml")]
    options = ["train.steps=60", "train.optimizer.warmup_steps=5", "train.optimizer.learning_rate=0.003"]
    overrides = arguments(
        places, tmp_path / "run", "evaluate.clips=2", "data.augmentations.mild.video.flip=0.5", *options
    )
    done = finish([*program, *overrides, "--test", str(places["test"]), "--crops", "3"])
    found = json.loads((tmp_path / "run/test/report.json").read_text())["tasks"]["head:video"]
    assert found["top-1"] >= 5 * CHANCE, found
    assert "head of video" in done.stdout and "report: " in done.stdout
    started, ended = (load_file(path) for path in (places["model"] / "model.safetensors", *_newest(tmp_path / "run")))
    moved = [
        name for name in started if name.startswith("towers.video.") and not torch.equal(started[name], ended[name])
    ]
    assert moved, "no layer of the tower learned"


def _newest(run: Path) -> list[Path]:
    return [run / "checkpoints" / (run / "checkpoints/latest").read_text().strip() / "model.safetensors"]


@pytest.mark.slow
def test_retrieval_is_tuned_and_measured(places: dict[str, Path], shards_folder: Path, tmp_path: Path) -> None:
    program = [sys.executable, str(ROOT / "pipelines/finetune.py"), str(ROOT / "configs/finetune/retrieval.yaml")]
    video = f"video: {{{TOWER}, pretrained: {places['model']}}}"
    towers = f"model.towers={{{video}, text: {{name: tiny_text, width: 32, depth: 1}}}}"
    options = [towers, f"data.shards={shards_folder / 'train'}", f"train.out={tmp_path / 'run'}", "train.steps=4"]
    options += ["train.global_batch=8", "train.threads=1", "data.in_process=true"]
    done = finish([*program, *options, "--test", str(shards_folder / "test"), "--report", str(tmp_path / "report")])
    assert {"text->video", "video->text"} <= json.loads((tmp_path / "report/report.json").read_text())[
        "directions"
    ].keys()
    assert str(tmp_path / "report/report.html") in done.stdout.replace("\n", "")
