"""In a real run: weights that change are logged and taken up again, and objectives that cannot teach say so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file
from support.recipes import tiny_config

from mmcl.recipe import RunConfig
from mmcl.training.launch import pretrain
from mmcl.training.trainer import Trainer
from mmcl.types import RunError

MIX = (
    "objectives=[{name: cross_modal, pairs: [[video, text]], weight: {start: 1, end: 0, to_step: 3}}, "
    "{name: cross_modal, pairs: [[video, audio]], weight: {start: 0, end: 2, shape: cosine}}]"
)
STEPS = ("train.steps=5", "train.log_every=1", "train.checkpoint_every=2", "train.global_batch=4")


def config(shards: Path, out: Path, *overrides: str) -> RunConfig:
    return tiny_config(*STEPS, MIX, *overrides, shards=shards / "train", out=out)


def lines(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_weights_in_force_are_logged_and_resumed_exactly(
    shards_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pretrain(config(shards_folder, tmp_path / "whole"))
    whole = lines(tmp_path / "whole")
    first, second = ([line[f"{name}/weight"] for line in whole] for name in ("cross_modal", "cross_modal_1"))
    assert first == pytest.approx([1, 2 / 3, 1 / 3, 0, 0])
    assert second == pytest.approx([0, 0.292893, 1, 1.707107, 2], abs=1e-5)
    for line, a, b in zip(whole, first, second, strict=True):
        assert line["loss"] == pytest.approx(a * line["cross_modal"] + b * line["cross_modal_1"], rel=1e-5)
        assert 0 < line["negatives"] <= 3
    pretrain(config(shards_folder, tmp_path / "again"), resume=str(tmp_path / "whole/checkpoints/step_00000004"))
    assert lines(tmp_path / "again")[-1]["loss"] == whole[-1]["loss"]
    final = [load_file(tmp_path / run / "checkpoints/step_00000005/model.safetensors") for run in ("whole", "again")]
    assert all(bool((value == final[1][name]).all()) for name, value in final[0].items())
    assert "teaches nothing" not in capfd.readouterr().err
    cached = config(shards_folder, tmp_path / "cached", "train.micro_batch=2")
    pretrain(cached)
    assert [line["loss"] for line in lines(tmp_path / "cached")] == pytest.approx(
        [line["loss"] for line in whole], rel=1e-4
    )


def test_a_run_in_which_no_row_has_a_negative_says_so_once(
    shards_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    views = "{name: intra_modal, tower: video, windows: different, method: {name: simclr}}"
    mix = f"objectives=[{{name: cross_modal}}, {views}]"
    pretrain(config(shards_folder, tmp_path / "run", mix, "train.global_batch=1"))
    said = [line for line in capfd.readouterr().err.splitlines() if "teaches nothing" in line]
    assert [line.split()[1] for line in said] == ["cross_modal", "intra_modal"]
    assert all("no row had a negative" in line for line in said)
    for line in lines(tmp_path / "run"):
        assert line["negatives"] == line["intra_modal/negatives"] == 0
        assert line["loss"] < 1e-5


def test_a_run_that_is_not_finite_names_the_term(
    shards_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer_init = Trainer.__init__

    def broken(self: Trainer, *given: object, **named: object) -> None:
        trainer_init(self, *given, **named)  # type: ignore[arg-type]
        self.model.log_scales["video-audio"].data.fill_(float("nan"))

    monkeypatch.setattr(Trainer, "__init__", broken)
    with pytest.raises(RunError, match=r"step 1: not finite: objective cross_modal_1 \(.*\), loss.*keys of its"):
        pretrain(config(shards_folder, tmp_path / "run"))
