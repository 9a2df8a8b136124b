"""The model: present rows only, dummy rows, unit rows, folders that round-trip, encoding of files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from support.recipes import tiny_config

import mmcl
from mmcl.data.collate import holes
from mmcl.model import MultimodalModel, TrainStep
from mmcl.recipe import build_model
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
    whole = model.encode_view("video", rows, ["joint", "pooled", "tokens"])
    kept = ViewBatch(rows.data[rows.present], rows.present[rows.present])
    deleted = model.encode_view("video", kept, ["joint", "pooled", "tokens"])
    for level, value in whole.items():
        assert torch.equal(value[rows.present], deleted[level])
        assert not value[~rows.present].any()
    assert torch.allclose(whole["joint"][rows.present].norm(dim=1), torch.ones(2))


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
    with pytest.raises(TypeError, match="list"):
        model.encode_text("one text")
