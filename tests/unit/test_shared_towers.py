"""Towers that share weights: one module, counted, stepped and saved once; heads of each tower's own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.recipes import tiny_config
from torch import nn

from mmcl.config import build as build_options
from mmcl.encoders.heads import HeadOptions
from mmcl.encoders.shared import Shared
from mmcl.layers import RankBatchNorm
from mmcl.model import MultimodalModel, parameter_counts
from mmcl.objectives.base import ObjectiveMix
from mmcl.recipe import RunConfig, build_model
from mmcl.training.launch import pretrain
from mmcl.training.optim import build_optimizer
from mmcl.training.step import TrainStep
from mmcl.types import ConfigError, Need, VideoSpec, View, ViewBatch

SHARED = "model.towers.image={name: shared, tower: video, frames: 1}"
PAIRS = "objectives.0.pairs=[[image, text], [audio, text]]"


def shared(*overrides: str, **places: Path) -> RunConfig:
    return tiny_config(SHARED, PAIRS, *overrides, **places)


def built(*overrides: str) -> tuple[RunConfig, MultimodalModel, ObjectiveMix]:
    torch.manual_seed(0)
    config = shared(*overrides)
    return (config, *build_model(config))


def pictures(frames: int = 1) -> ViewBatch:
    random = torch.Generator().manual_seed(0)
    data = torch.randint(0, 256, (3, frames, 3, 32, 32), dtype=torch.uint8, generator=random)
    return ViewBatch(data, torch.ones(3, dtype=torch.bool))


def test_one_module_counted_stepped_and_saved_once(tmp_path: Path) -> None:
    config, model, mix = built("model.towers.video.learning_rate_factor=0.5")
    video = model.towers["video"]
    assert isinstance(model.tower("image"), Shared) and not list(model.towers["image"].parameters())
    spec = model.tower("image").spec
    assert isinstance(spec, VideoSpec) and (spec.frames, spec.size) == (1, 32)
    rows = pictures()
    assert torch.equal(model.tower("image")(rows.data).pooled, model.tower("video")(rows.data).pooled)
    joint = [model.encode_view(name, rows, ["joint"])["joint"] for name in ("image", "video")]
    assert not torch.allclose(*joint), "each has a head of its own"
    groups = build_optimizer(TrainStep(model, mix), config.train.optimizer).param_groups
    held = [id(p) for group in groups for p in group["params"]]
    assert len(held) == len(set(held)) and {id(p) for p in video.parameters()} <= set(held)
    assert {g["factor"] for g in groups if id(next(video.parameters())) in map(id, g["params"])} == {0.5}
    assert parameter_counts(model)["total"] == sum(p.numel() for p in model.parameters() if p.requires_grad)
    tensors = load_file(model.save_pretrained(tmp_path / "model") / "model.safetensors")
    assert not [name for name in tensors if name.startswith("towers.image.")]
    again = MultimodalModel.from_pretrained(tmp_path / "model")
    assert torch.equal(again.encode_view("image", rows, ["joint"])["joint"], joint[0])
    assert MultimodalModel.from_pretrained(model.export(tmp_path / "export")).owner("image") == "video"


def test_it_learns_through_one_name_where_the_other_is_not_used() -> None:
    _, model, mix = built()
    assert all(p.requires_grad for p in model.towers["video"].parameters())
    assert not any(p.requires_grad for p in model.heads["video"].parameters())
    assert "video" not in {need.tower for need in mix.needs}
    assert model.tower_infos()["image"].trainable
    _, locked, _ = built("model.towers.video.lock=all")
    assert not locked.tower_infos()["image"].trainable and not locked.tower("video").training
    values = model.encode_view("image", pictures(), ["pooled"])["pooled"]
    assert values.requires_grad


def test_a_momentum_copy_is_of_the_shared_weights() -> None:
    _, model, _ = built()
    view = View(model.tower("image").spec)
    model.serve([Need("image", view, ("pooled",)), Need("image", view, ("pooled",), "momentum")])
    assert set(model.momentum_towers) == {"image", "video"} and set(model.momentum_heads) == {"image"}
    with torch.no_grad():
        for parameter in model.momentum_towers["video"].parameters():
            parameter.mul_(0.5)
    online, copied = (model.encode_view("image", pictures(), ["pooled"], k)["pooled"] for k in ("online", "momentum"))
    assert not torch.allclose(online, copied) and online.requires_grad and not copied.requires_grad
    moved = {id(p) for _, copy in model.ema_pairs() for p in copy.parameters()}
    assert moved == {id(p) for n in ("momentum_towers", "momentum_heads") for p in getattr(model, n).parameters()}


def test_a_run_trains_them_and_goes_on(shards_folder: Path, tmp_path: Path) -> None:
    places = {"shards": shards_folder / "train", "out": tmp_path / "run"}
    terms = ["{name: cross_modal, pairs: [[image, text], [video, text]]}"]
    terms += ["{name: intra_modal, tower: image, method: {name: moco}}"]
    objectives = f"objectives=[{', '.join(terms)}]"
    for steps, resume in ((2, None), (3, "auto")):
        pretrain(
            tiny_config(SHARED, objectives, f"train.steps={steps}", **places), resume=resume, allow=["train.steps"]
        )
    model = MultimodalModel.from_pretrained(tmp_path / "run")
    assert set(model.momentum_towers) == {"image", "video"}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.towers.image.tower=vidoe", r"model\.towers\.image\.tower: unknown name 'vidoe' \(did you mean 'video'"),
        ("model.towers.image.tower=image", r"model\.towers\.image\.tower: unknown name 'image'"),
        ("model.towers.image.tower=audio", r"model\.towers\.image\.frames: 1, but tower 'audio' does not take video"),
        ("model.towers.image.lock=all", r"model\.towers\.image\.lock: unknown key"),
        ("model.heads={imgae: {layers: 2}}", r"model\.heads: unknown name 'imgae' \(did you mean 'image'\?\)"),
    ],
)
def test_mistakes_are_named(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        built(override)


@pytest.mark.parametrize("norm", ["none", "batch", "layer"])
@pytest.mark.parametrize("activation", ["gelu", "relu", "silu"])
def test_a_head_is_what_its_options_say(norm: str, activation: str) -> None:
    options = build_options(HeadOptions, {"layers": 3, "hidden": 8, "norm": norm, "activation": activation})
    torch.manual_seed(0)
    head = options.build(6, 4)
    x = torch.randn(5, 6)
    expected = x
    function = getattr(nn.functional, activation)
    for linear, layer in zip(head.linears, [*head.norms, None], strict=True):
        expected = linear(expected)
        expected = expected if layer is None else function(layer(expected))
    torch.testing.assert_close(head(x), expected)
    kind = {"none": nn.Identity, "batch": RankBatchNorm, "layer": nn.LayerNorm}[norm]
    assert [type(layer) for layer in head.norms] == [kind, kind]


def test_each_tower_may_have_its_own_head() -> None:
    _, model, _ = built("model.head.layers=2", "model.heads={text: {layers: 4, hidden: 16, norm: layer}}")
    layers = {name: len(head.linears) for name, head in model.heads.items()}
    assert layers == {"video": 2, "audio": 2, "text": 4, "image": 2}
