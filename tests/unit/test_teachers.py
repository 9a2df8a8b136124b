"""Momentum copies and frozen teachers: once per step, statistics of what they follow, a precision of their own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.recipes import tiny_config
from torch import nn

from mmcl.layers import RankBatchNorm
from mmcl.model import MultimodalModel
from mmcl.recipe import build_model
from mmcl.training import trainer as trainer_module
from mmcl.training.launch import pretrain
from mmcl.training.momentum import advance
from mmcl.training.processes import build_accelerator
from mmcl.training.trainer import Trainer
from mmcl.types import Need, VideoSpec, View, ViewBatch

MOCO = "objectives=[{name: intra_modal, tower: video, method: {name: moco, queue: 16, hidden: 16, out: 8}}]"
GUIDE = (
    "model.towers.guide={name: tiny_video, width: 48, channels: 16, size: 48, frames: 3, fps: 2, dropout: 0.5, "
    "precision: bf16, lock: with_head}"
)
TAUGHT = "objectives=[{name: distillation, method: relational, student: video, teacher: guide}]"


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, RankBatchNorm])
def test_a_copy_takes_over_statistics_and_moves_weights(norm: type[nn.Module]) -> None:
    """Statistics of a copy's own forwards are not kept: it stands for the online tower of earlier steps."""
    torch.manual_seed(0)
    online, copied = norm(4), norm(4)
    for module, scale in ((online, 2.0), (copied, 5.0)):
        module(scale * torch.randn(8, 4))
        nn.init.constant_(module.weight, scale)
    advance([(online, copied)], 0.75)
    for name, buffer in online.named_buffers():
        assert torch.equal(copied.get_buffer(name), buffer), name
    assert torch.equal(copied.weight, torch.full((4,), 4.25))


def test_copies_advance_once_in_a_step_of_many_forwards(
    shards_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    monkeypatch.setattr(trainer_module, "advance", lambda pairs, momentum: calls.append((len(pairs), momentum)))
    more = ("train.steps=4", "train.accumulate=2", "train.micro_batch=2", "train.global_batch=4")
    pretrain(tiny_config(MOCO, *more, "train.momentum.start=0.9", shards=shards_folder / "train", out=tmp_path / "run"))
    assert [pairs for pairs, _ in calls] == [3] * 4, "tower, its head and the projector, in each of four steps"
    assert [share for _, share in calls] == pytest.approx([0.9, 0.91464, 0.95, 0.98536], abs=1e-4)


def test_a_copy_of_a_locked_part_stays_what_it_is() -> None:
    model = MultimodalModel(tiny_config("model.towers.video.lock=2", "model.towers.video.dropout=0.5").model)
    spec = View(model.tower("video").spec)
    model.serve([Need("video", spec, ("pooled",)), Need("video", spec, ("pooled",), "momentum")])
    model.train()
    online, copied = model.towers["video"], model.momentum_towers["video"]
    assert [part.training for part in online.modules()] == [part.training for part in copied.modules()]
    assert not copied.get_submodule("frame.0").training and copied.get_submodule("time").training
    with torch.no_grad():
        online.get_submodule("time").weight.add_(1.0)  # type: ignore[operator]
    before = {name: value.clone() for name, value in copied.state_dict().items()}
    advance(model.ema_pairs(), 0.5)
    moved = {name for name, value in copied.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {"time.weight"}


def test_a_teacher_sees_pictures_of_its_own_in_its_own_precision(shards_folder: Path, tmp_path: Path) -> None:
    config = tiny_config(
        GUIDE, TAUGHT, "train.steps=2", "train.global_batch=8", shards=shards_folder / "train", out=tmp_path / "run"
    )
    trainer = Trainer(config, build_accelerator(config))
    teacher, student = trainer.model.tower("guide"), trainer.model.tower("video")
    assert isinstance(teacher.spec, VideoSpec) and isinstance(student.spec, VideoSpec)
    seen: dict[str, tuple[object, ...]] = {}

    def watch(name: str) -> None:
        def hook(module: nn.Module, args: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
            seen[name] = (module.training, tuple(args[0].shape[2:]), out.dtype, out.requires_grad)

        trainer.model.tower(name).get_submodule("frame.0").register_forward_hook(hook)

    watch("guide")
    watch("video")
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    batch = next(iter(trainer.stream))
    sizes = {tuple(rows.data.shape[1:]) for rows in batch.views.values()}
    assert sizes == {(3, 3, 48, 48), (2, 3, 32, 32)}
    trainer.optimizer_step([batch])
    assert seen == {
        "guide": (False, (48, 48), torch.bfloat16, False),
        "video": (True, (32, 32), torch.float32, True),
    }
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    held = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert not held & {id(p) for p in (*teacher.parameters(), *trainer.model.heads["guide"].parameters())}


def test_a_teacher_keeps_no_graph_and_gives_float32() -> None:
    model, _ = build_model(tiny_config(GUIDE, TAUGHT))
    rows = torch.randint(0, 256, (2, 3, 3, 48, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    view = ViewBatch(rows, torch.ones(2, dtype=torch.bool))
    first, second = (model.train().encode_view("guide", view, ["pooled", "stage:early"]) for _ in range(2))
    for level, value in first.items():
        assert torch.equal(value, second[level]) and value.dtype == torch.float32 and not value.requires_grad, level
