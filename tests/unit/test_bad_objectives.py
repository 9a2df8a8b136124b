"""What no tower and no shard can serve is refused when the run is built, with its place in the configuration."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.recipes import tiny_config
from support.shards import read_shards, write_shards

from mmcl.data.labels import look_for_labels
from mmcl.model import MultimodalModel, parameter_counts
from mmcl.objectives.base import ObjectiveMix
from mmcl.recipe import RunConfig, build_model
from mmcl.shards import load_manifest
from mmcl.training import trainer
from mmcl.training.launch import describe
from mmcl.training.processes import build_accelerator
from mmcl.training.soundness import remarks
from mmcl.training.trainer import Trainer
from mmcl.types import ConfigError

VIEWS = "tower: depth, method: {name: simclr}"


@pytest.mark.parametrize(
    ("objective", "place"),
    [
        ("name: cross_modal, pairs: [[video, depth]]", r"pairs\.0"),
        (f"name: intra_modal, {VIEWS}", "tower"),
        (f"name: persistency, {VIEWS}", "tower"),
        ("name: compositional_distillation, teachers: [depth]", r"teachers\.0"),
        ("name: contrastive_distillation, teacher: depth", r"teachers\.0"),
        ("name: distillation, method: hint, teacher: depth", r"teachers\.0"),
        ("name: mutual, towers: [video, depth]", r"towers\.1"),
    ],
)
def test_an_unknown_modality(objective: str, place: str) -> None:
    with pytest.raises(
        ConfigError, match=rf"objectives\.1\.{place}: unknown name 'depth'.*allowed: audio, text, video"
    ):
        build_model(tiny_config(f"objectives=[{{name: cross_modal}}, {{{objective}}}]"))


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        ("name: intra_modal, tower: audio, method: {name: moco}", r"1\.tower: tower 'audio' is frozen"),
        ("name: persistency, tower: audio, method: {name: byol}", r"1\.tower: tower 'audio' is frozen"),
        ("name: mutual, towers: [video, audio]", r"1\.towers\.1: 'audio' is frozen"),
    ],
)
def test_momentum_of_a_frozen_tower(objective: str, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"objectives\.{message}"):
        build_model(
            tiny_config(f"objectives=[{{name: cross_modal}}, {{{objective}}}]", "model.towers.audio.lock=with_head")
        )


def test_texts_to_be_masked_by_an_augmentation_without_a_mask() -> None:
    def config(name: str, text: str = "{}") -> RunConfig:
        objective = f"{{name: tcl, pairs: [[video, text]], mlm: {{augmentation: {name}}}}}"
        return tiny_config(f"objectives=[{objective}]", f"data.augmentations={{noisy: {{text: {text}}}}}")

    build_model(config("noisy", "{mask: 0.2}"))
    place = r"^objectives\.0\.mlm\.augmentation: "
    with pytest.raises(
        ConfigError, match=place + r"'noisy' masks no token; give data\.augmentations\.noisy\.text a mask"
    ):
        build_model(config("noisy"))
    with pytest.raises(ConfigError, match=place + "'none' masks no token; name one that does"):
        build_model(config("none"))


@pytest.mark.parametrize(
    ("objective", "place"),
    [
        ("name: mutual, augmentation: strnog", "augmentation"),
        ("name: tcl, mlm: {augmentation: strnog}", r"mlm\.augmentation"),
        (
            "name: intra_modal, tower: video, method: {name: swav, crops: 1, crop_augmentation: strnog}",
            r"method\.crop_augmentation",
        ),
    ],
)
def test_an_unknown_augmentation_is_named_where_it_was_asked_for(objective: str, place: str) -> None:
    with pytest.raises(ConfigError, match=rf"^objectives\.1\.{place}: unknown name 'strnog' \(did you mean 'strong'"):
        build_model(tiny_config(f"objectives=[{{name: cross_modal}}, {{{objective}}}]", "data.augmentations.strong={}"))


def test_small_views_that_their_tower_cannot_read() -> None:
    def config(size: int) -> RunConfig:
        method = f"{{name: swav, hidden: 8, prototypes: 4, crops: 1, crop_size: {size}}}"
        return tiny_config(f"objectives=[{{name: intra_modal, tower: video, method: {method}}}]")

    build_model(config(16))
    with pytest.raises(ConfigError, match=r"^objectives\.0\.method\.crop_size: tower 'video' cannot read .* 1 pixels"):
        build_model(config(1))


SAME = "{name: intra_modal, tower: video, method: {name: simclr, hidden: 8}"


@pytest.mark.parametrize(
    ("objective", "said"),
    [
        (f"{SAME}}}", "objectives.0: two views of tower 'video' are equal"),
        (f"{SAME}, augmentation: loud}}", "augmentation 'loud' changes no video"),
        (f"{SAME}, augmentation: turned}}", ""),
        (f"{SAME}, windows: different}}", ""),
        ("{name: intra_modal, tower: text, method: {name: simclr, hidden: 8}}", ""),  # dropout makes the views
        ("{name: mutual, towers: [video]}", "objectives.0.towers: 'video' alone"),
        ("{name: mutual, towers: [video, text]}", ""),
    ],
)
def test_what_teaches_nothing_is_said_at_the_start(objective: str, said: str) -> None:
    chosen = "{loud: {audio: {gain_db: [-6, 6]}}, turned: {video: {flip: 0.5}}}"
    config = tiny_config(f"objectives=[{objective}]", f"data.augmentations={chosen}", "model.towers.text.dropout=0.1")
    lines = remarks(config, *build_model(config))
    assert len(lines) == bool(said) and said in "".join(lines)


def test_a_head_that_nobody_asks_for_is_not_counted_as_learning() -> None:
    model, _ = build_model(tiny_config(f"objectives=[{SAME}}}]"))
    counts = parameter_counts(model)
    assert counts["text"] == 0 < counts["video"] == counts["total"]


def test_clips_that_all_lie_at_one_time_are_said_to_be_equal() -> None:
    def lines(*overrides: str) -> list[str]:
        config = tiny_config(f"objectives=[{{name: persistency, {VIEWS.replace('depth', 'video')}}}]", *overrides)
        return remarks(config, *build_model(config))

    assert lines() == lines("data.sampling.span_seconds=5") == []
    assert "two views of tower 'video' are equal" in lines("data.sampling.span_seconds=0")[0]


def test_micro_batches_of_a_tower_with_batch_norm(
    shards_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No tower of ours holds any, but somebody's may."""

    def with_batch_norm(config: RunConfig, **_: object) -> tuple[MultimodalModel, ObjectiveMix]:
        model, mix = build_model(config)
        model.towers["video"].add_module("theirs", torch.nn.BatchNorm2d(8))
        return model, mix

    monkeypatch.setattr(trainer, "build_model", with_batch_norm)
    settings = {"shards": shards_folder / "train", "out": tmp_path / "run"}
    whole, cached = (tiny_config("train.global_batch=4", *more, **settings) for more in ([], ["train.micro_batch=2"]))
    Trainer(whole, build_accelerator(whole))
    with pytest.raises(ConfigError, match=r"train\.micro_batch: tower 'video' holds batch statistics \(BatchNorm2d\)"):
        Trainer(cached, build_accelerator(cached))


def labelled(folder: Path, shards: Path, labels: dict[int, int]) -> Path:
    """The same shards with labels at some places."""
    samples = read_shards(shards / "train")
    for place, key in enumerate(list(samples)):
        if place in labels:
            samples[key]["cls"] = str(labels[place]).encode()
    write_shards(folder, samples, max_count=5)
    return folder


def run_on(shards: Path, out: Path, *, classes: int = 5) -> RunConfig:
    plain = "{name: cross_modal}"
    taught = f"{{name: compositional_distillation, teachers: [audio], classes: {classes}}}"
    return tiny_config(
        f"objectives=[{plain}, {taught}]",
        "model.towers.audio.lock=with_head",
        "train.global_batch=4",
        shards=shards,
        out=out,
    )


def test_labels_that_are_not_there(shards_folder: Path, tmp_path: Path) -> None:
    message = (
        r"objectives\.1\.classes: 5: compositional_distillation learns from labels, but none of 16 samples looked at "
        r"in .*/train has one; their files: json, mp4"
    )
    config = run_on(shards_folder / "train", tmp_path / "run")
    with pytest.raises(ConfigError, match=message):
        Trainer(config, build_accelerator(config))
    with pytest.raises(ConfigError, match=message):
        describe(config)
    assert not (tmp_path / "run").exists()


def test_labels_that_are_there_and_too_high(shards_folder: Path, tmp_path: Path) -> None:
    shards = labelled(tmp_path / "some", shards_folder, {11: 4})
    Trainer(run_on(shards, tmp_path / "run"), build_accelerator(run_on(shards, tmp_path / "run")))
    found = look_for_labels([load_manifest(shards)])
    assert (found.samples, found.highest, found.extensions) == (16, 4, ("cls", "json", "mp4", "txt"))
    few = look_for_labels([load_manifest(shards)] * 2, looks=3)
    assert few.samples == 6
    config = run_on(shards, tmp_path / "run", classes=4)
    with pytest.raises(ConfigError, match=r"objectives\.1\.classes: 4, but a sample in .*some has label 4"):
        Trainer(config, build_accelerator(config))
