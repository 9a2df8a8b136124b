"""The model: present rows only, dummy rows, unit rows, folders that round-trip, encoding of files."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from support.recipes import tiny_config

import mmcl
from mmcl.data.collate import holes
from mmcl.model import MultimodalModel
from mmcl.objectives.base import check_needs
from mmcl.recipe import MomentumOptions, build_model
from mmcl.training.momentum import advance, momentum_at
from mmcl.training.step import TrainStep
from mmcl.types import Clip, ConfigError, Need, SampleError, View, ViewBatch


@pytest.fixture(scope="module")
def model() -> MultimodalModel:
    torch.manual_seed(0)
    return build_model(tiny_config())[0].eval()


def video_rows(model: MultimodalModel, present: list[bool]) -> ViewBatch:
    mask = torch.tensor(present)
    data = torch.randint(
        0, 256, (len(present), 2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )
    return ViewBatch(data * mask[:, None, None, None, None], mask)


def test_absent_rows_equal_deleted_rows(model: MultimodalModel) -> None:
    rows = video_rows(model, [True, False, True, False])
    whole = model.encode_view("video", rows, ["joint", "pooled", "tokens", "joint_tokens"])
    kept = ViewBatch(rows.data[rows.present], rows.present[rows.present])
    deleted = model.encode_view("video", kept, ["joint", "pooled", "tokens", "joint_tokens"])
    for level, value in whole.items():
        assert torch.equal(value[rows.present], deleted[level])
        assert not value[~rows.present].any()
    assert torch.allclose(whole["joint"][rows.present].norm(dim=1), torch.ones(2))
    first = model.heads["video"](whole["tokens"][0, 3])  # a token goes the way of the whole
    torch.testing.assert_close(whole["joint_tokens"][0, 3], first / first.norm())


def test_a_rank_without_rows_still_uses_every_parameter() -> None:
    torch.manual_seed(0)
    model, mix = build_model(tiny_config())
    views = tuple(dict.fromkeys(need.view for need in mix.needs))
    term = TrainStep(model, mix)(holes(4, views))
    torch.autograd.backward(term.loss)
    assert float(term.loss) == 0.0
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


def test_each_tower_runs_once_per_view(model: MultimodalModel) -> None:
    calls = []
    hook = model.tower("video").register_forward_hook(lambda *_: calls.append(1))
    view = View(model.tower("video").spec)
    batch = holes(3, [view])
    needs = [Need("video", view), Need("video", view, ("pooled", "tokens")), Need("video", view, ("pooled",))]
    embeddings = model(batch, needs)
    hook.remove()
    assert len(calls) == 1
    assert {level for _, _, level, _ in embeddings} == {"joint", "pooled", "tokens"}


def test_scales_are_clamped_at_100(model: MultimodalModel) -> None:
    with torch.no_grad():
        before = model.log_scales["video-text"].clone()
        model.log_scales["video-text"].fill_(9.0)
        assert float(model.scales()["video-text"]) == pytest.approx(100.0, rel=1e-6)
        model.log_scales["video-text"].copy_(before)
    assert float(model.scales()["video-text"].detach()) == pytest.approx(1 / 0.07, rel=1e-5)


def test_a_model_folder_round_trips_bit_for_bit(model: MultimodalModel, tmp_path: Path) -> None:
    model.export(tmp_path / "model")
    again = mmcl.MultimodalModel.from_pretrained(tmp_path / "model")
    assert not again.training
    for (name, left), (other, right) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        assert name == other
        assert torch.equal(left, right)
    assert torch.equal(model.encode_text(["a red clip"]), again.encode_text(["a red clip"]))
    assert (tmp_path / "model/README.md").read_text().startswith("---")


@pytest.mark.parametrize("damage", ["truncated", "missing", "other", "unknown_key", "not_ours"])
def test_a_damaged_model_folder_is_one_clear_line(model: MultimodalModel, tmp_path: Path, damage: str) -> None:
    folder = model.save_pretrained(tmp_path / "model")
    weights, config = folder / "model.safetensors", folder / "config.json"
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "missing":
        weights.unlink()
    elif damage == "not_ours":
        config.write_text('{"format": "other"}')
    else:
        tree = json.loads(config.read_text())
        if damage == "other":
            tree["model"]["joint_width"] = 64
        else:
            tree["model"]["colour"] = "red"
        config.write_text(json.dumps(tree))
    with pytest.raises(ConfigError) as caught:
        MultimodalModel.from_pretrained(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


def test_a_folder_without_a_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="neither a model"):
        MultimodalModel.from_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="no such folder"):
        MultimodalModel.from_pretrained(tmp_path / "none")


def test_encode_takes_paths_bytes_and_clips(model: MultimodalModel, media_folder: Path) -> None:
    paths = sorted(media_folder.glob("*.mp4"))[:3]
    rows = model.encode_video(paths)
    assert rows.shape == (3, 32)
    assert torch.allclose(rows.norm(dim=1), torch.ones(3))
    assert torch.equal(rows, model.encode_video([path.read_bytes() for path in paths]))
    assert torch.allclose(model.encode_video(paths, windows=2).norm(dim=1), torch.ones(3))
    frames = np.zeros((5, 3, 48, 64), np.uint8)
    clip = Clip(
        "made",
        video=frames,
        frame_times_seconds=np.arange(5.0),
        audio=np.zeros(8000, np.float32),
        sample_rate_hz=16_000,
    )
    assert model.encode_video([clip]).shape == (1, 32)
    assert model.encode_audio([clip]).shape == (1, 32)
    assert model.encode_text([]).shape == (0, 32)


def test_encode_names_what_is_wrong(model: MultimodalModel, media_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(SampleError, match="missing_file"):
        model.encode_video([tmp_path / "none.mp4"])
    with pytest.raises(SampleError, match="no_audio_stream"):
        model.encode_audio([media_folder / "green_0.mp4"])
    with pytest.raises(TypeError, match="texts, got int"):
        model.encode_text([1])
    with pytest.raises(ConfigError, match=r"frames must be uint8.*permute the channels"):
        model.encode_video(np.zeros((4, 32, 32, 3), np.uint8))
    with pytest.raises(ConfigError, match="sample_rate_hz"):
        model.encode_audio(np.zeros(8000, np.float32))


def momentum_needs(model: MultimodalModel) -> list[Need]:
    video, text = View(model.tower("video").spec), View(model.tower("text").spec)
    return [
        Need("video", video, ("pooled", "joint")),
        Need("video", video, ("pooled", "joint"), "momentum"),
        Need("text", text, ("pooled",)),
    ]


def test_momentum_copies_follow_without_a_gradient() -> None:
    model = MultimodalModel(tiny_config().model)
    needs = momentum_needs(model)
    model.serve(needs)
    assert list(model.momentum_towers) == ["video"]
    view = needs[0].view
    rows = video_rows(model, [True, False, True])
    batch = dataclasses.replace(holes(3, [need.view for need in needs]), views={view: rows})
    embeddings = model(batch, needs[:2])
    for level in ("pooled", "joint"):
        online, copied = (embeddings.get(need, level) for need in needs[:2])
        assert torch.equal(online, copied)
        assert online.requires_grad and not copied.requires_grad
    (online, copied), *_ = model.ema_pairs()
    before = [p.clone() for p in copied.parameters()]
    with torch.no_grad():
        for parameter in online.parameters():
            parameter.add_(1.0)
    advance(model.ema_pairs(), 0.75)
    for old, new in zip(before, copied.parameters(), strict=True):
        torch.testing.assert_close(new, old + 0.25)
        assert not new.requires_grad
    assert len(model.ema_pairs()) == 2


def test_what_no_need_uses_gets_no_gradient() -> None:
    model = MultimodalModel(tiny_config().model)
    model.serve(momentum_needs(model))
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {".".join(name.split(".")[:2]) for name in learning} == {"towers.video", "towers.text", "heads.video"}


def test_a_folder_keeps_momentum_copies_and_an_export_leaves_them_out(tmp_path: Path) -> None:
    model = MultimodalModel(tiny_config().model)
    model.serve(momentum_needs(model))
    advance(model.ema_pairs(), 0.5)
    again = MultimodalModel.from_pretrained(model.save_pretrained(tmp_path / "model"))
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
    exported = MultimodalModel.from_pretrained(model.export(tmp_path / "export"))
    assert not exported.momentum_towers
    assert torch.equal(exported.encode_text(["a"]), again.encode_text(["a"]))


@pytest.mark.parametrize(
    ("need", "message"),
    [
        (("vidoe", ("pooled",), "online"), r"objectives\.3: unknown name 'vidoe' \(did you mean 'video'\?\)"),
        (("video", ("poold",), "online"), r"objectives\.3: tower 'video': unknown name 'poold'.*pooled"),
        (("video", ("pooled",), "momentum"), r"objectives\.3: a momentum copy of tower 'video'.*frozen; .*text"),
    ],
)
def test_a_need_that_no_tower_serves_is_refused(need: tuple, message: str) -> None:
    towers = MultimodalModel(tiny_config().model).tower_infos()
    towers["video"] = dataclasses.replace(towers["video"], trainable=False)
    tower, levels, kind = need
    with pytest.raises(ConfigError, match=message):
        check_needs([Need(tower, View(towers["video"].spec), levels, kind)], towers, path="objectives.3")


def test_the_momentum_schedule() -> None:
    options = MomentumOptions(start=0.994)
    figures = [momentum_at(step, 200, options) for step in (0, 50, 100, 200)]
    assert figures == pytest.approx([0.994, 0.99487868, 0.997, 1.0], abs=1e-8)
    assert momentum_at(100, 200, MomentumOptions(start=0.9, schedule="constant")) == 0.9
