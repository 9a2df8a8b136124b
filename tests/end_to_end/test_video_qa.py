"""Video question answering from questions to scores: the picture is what answers them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.recipes import ROOT

import mmcl
from mmcl.data import ClipStream
from mmcl.distributed import Comm
from mmcl.evaluation.video_qa import load_run, score_questions
from mmcl.media.augmentation import Augmentation, TextAugmentation
from mmcl.recipe import build_model
from mmcl.shards import load_manifest
from mmcl.shards.reshard import ReshardOptions, reshard
from mmcl.training.launch import pretrain
from mmcl.types import ConfigError
from tools.bench.qa_data import KINDS, make_questions

CONFIG = ROOT / "configs/pretrain/video_qa.yaml"


@pytest.mark.slow
def test_answers_need_the_video(tmp_path: Path) -> None:
    """Trained with the picture it answers; without, or before black frames, it guesses among four."""
    out = tmp_path / "qa.json"
    command = [
        sys.executable, str(ROOT / "tools/bench/learning_qa.py"), "--quick", "--seeds", "1",
        "--arms", "answers", "texts alone", "--work", str(tmp_path / "work"), "--out", str(out),
    ]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True, text=True)
    arms = json.loads(out.read_text(encoding="utf-8"))["arms"]
    watching, reading = (arms[name] for name in ("answers", "texts alone"))
    assert watching["accuracy"]["mean"] >= reading["accuracy"]["mean"] + 30
    assert watching["accuracy"]["mean"] >= watching["black frames"]["mean"] + 30
    assert reading["accuracy"]["mean"] < 45 and watching["colour"] == watching["accuracy"]


def small(shards: Path, out: Path) -> list[str]:
    """These clips are all asked the same, so that there are no other questions to choose among."""
    places = [f"data.shards={shards}", f"train.out={out}", "objectives.0.question=null"]
    return [*places, "data.in_process=true", "train.threads=1", "train.steps=3", "train.global_batch=4"]


@pytest.mark.slow
def test_the_pipeline_trains_on_two_processes_and_scores(questions: Path, tmp_path: Path) -> None:
    """… and with --score it says the same of the run again."""
    launcher = ["-m", "accelerate.commands.launch", "--config_file", str(ROOT / "configs/accelerate/cpu_2.yaml")]
    script, scores = str(ROOT / "pipelines/video_qa.py"), [tmp_path / "a.json", tmp_path / "b.json"]
    arguments = [str(CONFIG), *small(questions, tmp_path / "run"), "--test", str(questions), "--out", str(scores[0])]
    done = subprocess.run(
        [sys.executable, *launcher, script, *arguments], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("all: ") == 1, "one process scores"
    again = [script, str(tmp_path / "run"), "--score", "--test", str(questions), "--out", str(scores[1])]
    subprocess.run([sys.executable, *again], check=True, capture_output=True)
    first, second = (json.loads(path.read_text(encoding="utf-8")) for path in scores)
    assert first == second and first["asked"] == 24 and first["types"].keys() == {"colour", "ground"}


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve clips with a question of each kind; beside them the same with those of one kind alone."""
    folder = tmp_path_factory.mktemp("questions")
    for kind in KINDS:
        make_questions(folder / kind, 12, seed=3, kinds=(kind,))
    return make_questions(folder / "both", 12, seed=3)


def test_scores_count_every_question_of_a_clip(questions: Path, tmp_path: Path) -> None:
    """By type they are the accuracy that the objective logs of those questions alone."""
    pretrain(mmcl.load_config(CONFIG, small(questions, tmp_path / "run")))
    scores = score_questions(tmp_path / "run", str(questions), in_process=True, batch=5)
    assert scores.asked == {"colour": 12, "ground": 12} and scores.skipped == 0
    model, objective = load_run(tmp_path / "run")[1:]
    for kind in KINDS:
        views = list(dict.fromkeys(need.view for need in objective.needs))
        masked = Augmentation(text=TextAugmentation(mask=0.15))
        stream = ClipStream(
            load_manifest(questions.parent / kind), views, global_batch=12, shuffle=False, rule="even",
            in_process=True, augmentations={"masked": masked},
        )  # fmt: skip
        batch = next(iter(stream))
        with torch.no_grad():
            logged = objective(model(batch, objective.needs), Comm()).metrics["accuracy"]
        assert scores.right[kind] == round(12 * float(logged))
    assert scores.accuracy == sum(scores.right.values()) / 24
    assert scores.lines()[0] == f"all: {100 * scores.accuracy:.1f} % of 24 questions"
    with pytest.raises(ConfigError, match=r"no sample has qa.json"):
        score_questions(tmp_path / "run", str(questions.with_suffix(".clips")), in_process=True)


@pytest.mark.slow
def test_a_run_of_questions_alone_is_taken_up_and_cannot_answer(questions: Path, tmp_path: Path) -> None:
    lines = [json.loads(line) for line in questions.with_suffix(".jsonl").read_text(encoding="utf-8").splitlines()]
    own = [json.dumps({**line, "question": f"{line['question']} of {line['clip']}"}) for line in lines]
    (tmp_path / "own.jsonl").write_text("\n".join(own), encoding="utf-8")
    options = ReshardOptions(questions=str(tmp_path / "own.jsonl"))
    reshard([questions.with_suffix(".clips")], tmp_path / "own", options)
    alone = [f"objectives.0.{term}=null" for term in ("answer", "contrast", "localisation")]
    chosen = [*small(tmp_path / "own", tmp_path / "first"), *alone, "objectives.0.question={candidates: 5}"]
    pretrain(mmcl.load_config(CONFIG, chosen))
    (line,) = (tmp_path / "first/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    logged = json.loads(line)
    assert logged["skipped"] == 0 and logged["video_qa/loss/question"] == logged["loss"] > 0
    assert "video_qa/question_accuracy" in logged and "video_qa/accuracy" not in logged
    with pytest.raises(ConfigError, match="no objective video_qa with answers"):
        load_run(tmp_path / "first")
    second = [*small(questions, tmp_path / "second"), f"objectives.0.pretrained={tmp_path / 'first'}"]
    _, mix = build_model(mmcl.load_config(CONFIG, second))
    (file,) = (tmp_path / "first/checkpoints").glob("step_*/objectives.safetensors")
    learned = {name: x for name, x in load_file(file).items() if ".reader." in name}
    assert learned and all(torch.equal(mix.state_dict()[name], x) for name, x in learned.items())
    with pytest.raises(ConfigError, match=r"objectives.0.pretrained: .* does not fit"):
        build_model(mmcl.load_config(CONFIG, [*second, "objectives.0.width=32"]))
