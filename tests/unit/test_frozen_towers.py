"""Frozen towers: no gradient, eval mode for good, not in the optimizer, in checkpoints all the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.objectives import tower_batch
from support.recipes import tiny_config

from mmcl.model import MultimodalModel
from mmcl.recipe import build_model
from mmcl.training.optim import build_optimizer
from mmcl.training.step import TrainStep
from mmcl.types import ConfigError

FROZEN = ("model.towers.audio.lock=with_head", "model.towers.audio.dropout=0.5", "model.towers.video.dropout=0.5")


def test_a_frozen_tower_is_not_trained() -> None:
    torch.manual_seed(0)
    config = tiny_config(*FROZEN)
    model, mix = build_model(config)
    assert {name: info.trainable for name, info in model.tower_infos().items()} == {
        "video": True,
        "audio": False,
        "text": True,
    }
    step = TrainStep(model, mix)
    optimizer = build_optimizer(step, config.train.optimizer)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    frozen = [*model.towers["audio"].parameters(), *model.heads["audio"].parameters()]
    before = [p.clone() for p in frozen]
    assert frozen
    assert not held & {id(p) for p in frozen}
    step.train()
    torch.autograd.backward(step(tower_batch(model)).loss)
    optimizer.step()
    assert all(torch.equal(p, q) and p.grad is None for p, q in zip(frozen, before, strict=True))
    assert all(p.grad is not None for p in model.towers["video"].parameters())


def test_a_frozen_tower_stays_in_eval_mode_and_keeps_no_graph() -> None:
    torch.manual_seed(0)
    model, _ = build_model(tiny_config(*FROZEN))
    model.eval()
    model.train()
    assert model.training and model.towers["video"].training
    assert not any(module.training for module in model.towers["audio"].modules())
    batch = tower_batch(model)
    views = {view.modality: rows for view, rows in batch.views.items()}
    first, second = (model.encode_view("audio", views["audio"], ["joint", "pooled"]) for _ in range(2))
    assert all(torch.equal(first[level], second[level]) and not first[level].requires_grad for level in first)
    assert not torch.equal(*(model.encode_view("video", views["video"], ["pooled"])["pooled"] for _ in range(2)))


def test_a_frozen_tower_is_saved_and_read_back(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, _ = build_model(tiny_config(*FROZEN))
    again = MultimodalModel.from_pretrained(model.save_pretrained(tmp_path / "model"))
    assert again.head_locked("audio") and not again.head_locked("video")
    for left, right in zip(model.towers["audio"].parameters(), again.towers["audio"].parameters(), strict=True):
        assert torch.equal(left, right) and not right.requires_grad


def test_what_no_objective_reaches_has_no_gradient() -> None:
    """DDP waits for the gradient of every parameter that asks for one."""
    model, _ = build_model(tiny_config("objectives.0.pairs=[[video, text]]"))
    assert not any(p.requires_grad for p in model.towers["audio"].parameters())
    assert all(p.requires_grad for p in model.towers["video"].parameters())


def test_a_tower_starts_from_an_earlier_model(tmp_path: Path) -> None:
    torch.manual_seed(0)
    earlier, _ = build_model(tiny_config())
    folder = earlier.save_pretrained(tmp_path / "earlier")
    torch.manual_seed(1)
    model, _ = build_model(tiny_config(f"model.towers.audio.pretrained={folder}", "model.joint_width=16"))
    for name, same in (("audio", True), ("video", False)):
        pairs = zip(model.towers[name].parameters(), earlier.towers[name].parameters(), strict=True)
        assert all(torch.equal(p, q) for p, q in pairs) == same
    again, _ = build_model(tiny_config(f"model.towers.audio.pretrained={folder}"))
    head = zip(again.heads["audio"].parameters(), earlier.heads["audio"].parameters(), strict=True)
    assert all(torch.equal(p, q) for p, q in head), "also the head, where it is of the same shape"
    for override, message in {
        f"model.towers.audio.pretrained={tmp_path}": r"model\.towers\.audio\.pretrained: .*neither a model",
        "model.towers.audio.pretrained=gone": r"model\.towers\.audio\.pretrained: gone: no such folder",
    }.items():
        with pytest.raises(ConfigError, match=message):
            build_model(tiny_config(override))
    with pytest.raises(ConfigError, match=r"model\.towers\.audio\.pretrained: .* does not fit"):
        build_model(tiny_config(f"model.towers.audio.pretrained={folder}", "model.towers.audio.width=48"))
