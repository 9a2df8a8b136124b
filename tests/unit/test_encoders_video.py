"""Towers for video and pictures: each name builds from a configuration, forward and backward, with what it eats known;
frozen statistics stay, rows do not see each other, and frame order matters where it should.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmcl.config import Options, build
from mmcl.encoders.base import Encoder
from mmcl.encoders.build import TowerOptions, build_encoder
from mmcl.encoders.hf_video import VIDEO_KINDS
from mmcl.encoders.norms import FrozenBatchNorm, replace_batch_norm
from mmcl.encoders.slow import SlowOptions, SlowR50
from mmcl.encoders.torchvision_video import NETWORKS, TorchvisionOptions, build_torchvision
from mmcl.layers import RankBatchNorm
from mmcl.types import ConfigError, VideoSpec

HF = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48, "image_size": 32}
VJEPA = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "crop_size": 32, "frames_per_clip": 4}
VIT = {"layers": 1, "width": 64, "patch_size": 16, "image_size": 32}
TINY_VIT = {"name": "timm:vit_tiny_patch16_224", "size": 32, "config": {"depth": 1}, "frames": 4}

SMALL: dict[str, dict[str, Any]] = {
    "torchvision:s3d": {"size": 64, "frames": 8},
    "torchvision:swin3d_t": {"size": 32, "frames": 4, "depth": [1, 1, 1, 1]},
    "slow_r50": {"size": 32, "frames": 4, "depth": [1, 1, 1, 1], "channels": 8, "norm": "frozen"},
    "open_clip:ViT-B-32": {"frames": 4, "config": VIT},
    "timm:resnet18": {"size": 32, "frames": 4, "config": {"layers": [1, 1, 1, 1]}},
    "timm:vit_tiny_patch16_224": TINY_VIT,
    "hf:videomae": {"config": {**HF, "num_frames": 4}},
    "hf:vivit": {"config": {**HF, "num_frames": 4}},
    "hf:timesformer": {"config": {**HF, "num_frames": 4}},
    "hf:vjepa2": {"config": VJEPA},
}
SLOW: dict[str, dict[str, Any]] = {
    "torchvision:r3d_18": {"size": 32, "frames": 4},
    "torchvision:mc3_18": {"size": 32, "frames": 4},
    "torchvision:r2plus1d_18": {"size": 32, "frames": 4},
    "torchvision:mvit_v2_s": {"size": 64, "frames": 4, "depth": [1, 1, 2, 1]},
    "open_clip:RN50": {"frames": 4, "config": {"layers": [1, 1, 1, 1], "width": 8, "image_size": 64}},
    "timm:tf_efficientnet_lite0": {"size": 64, "frames": 4},
    "timm:convnext_atto": {"size": 64, "frames": 4},
    "timm:mobilenetv4_conv_small": {"size": 64, "frames": 4},
}
EACH = pytest.mark.parametrize("name", [*SMALL, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])


class _Holder(Options):
    tower: TowerOptions


def tower(name: str, **options: Any) -> Encoder:
    torch.manual_seed(0)
    return build_encoder(build(_Holder, {"tower": {**{**SMALL, **SLOW}.get(name, {}), "name": name, **options}}).tower)


def clips(encoder: Encoder, rows: int = 2, frames: int | None = None) -> Tensor:
    spec = encoder.spec
    assert isinstance(spec, VideoSpec)
    draw = torch.Generator().manual_seed(1)
    shape = (rows, frames or spec.frames, 3, spec.size, spec.size)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=draw)


def statistics(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items() if "running_" in name}


@EACH
def test_each_name_runs_forward_and_backward(name: str) -> None:
    encoder = tower(name).train()
    before, x = statistics(encoder), clips(encoder)
    features = encoder(x)
    assert features.pooled.shape == (2, encoder.width) and features.tokens is not None and features.grid is not None
    assert features.tokens.shape == (2, torch.tensor(features.grid).prod(), encoder.width)
    ((features.pooled + features.tokens.mean(1)) @ torch.linspace(-1, 1, encoder.width)).pow(2).sum().backward()
    assert [key for key, p in encoder.named_parameters() if p.requires_grad and p.grad is None] == []
    assert any(p.grad is not None and p.grad.any() for p in encoder.blocks()[0].parameters()), "reaches the input"
    after = statistics(encoder)
    assert all(after[key].equal(value) for key, value in before.items())
    assert not any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in encoder.modules())
    alone = encoder(x[1:])
    torch.testing.assert_close(alone.pooled[0], features.pooled[1], rtol=1e-3, atol=1e-4)


@EACH
def test_a_picture_goes_through_and_blocks_hold_the_weights(name: str) -> None:
    encoder = tower(name).eval()
    picture = encoder(clips(encoder, frames=1))
    assert picture.pooled.shape == (2, encoder.width) and picture.pooled.isfinite().all()
    owned = [id(p) for block in encoder.blocks() for p in block.parameters()]
    assert len(owned) == len(set(owned)), "no weight is in two blocks"
    left = {key: p.numel() for key, p in encoder.named_parameters() if id(p) not in set(owned)}
    front = re.compile(r"norm|ln_|embedding|token|pos|query|downsample|head|proj|conv1x1")
    assert all(front.search(key) for key in left), left


@pytest.mark.parametrize("name", NETWORKS)
def test_torchvisions_towers_eat_what_its_weights_say(name: str) -> None:
    from torchvision.models import get_model_weights

    told = get_model_weights(name).DEFAULT
    transform, prose = told.transforms(), told.meta["_docs"]
    with torch.device("meta"):
        spec = build_torchvision(TorchvisionOptions(name=f"torchvision:{name}")).spec
    assert (spec.size, spec.mean, spec.std) == (transform.crop_size[0], tuple(transform.mean), tuple(transform.std))
    assert f"frame_rate={spec.fps:g}`" in prose and f"clip_len={spec.frames}`" in prose


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_torchvisions_towers_compute_what_the_library_computes(name: str) -> None:
    from torchvision.models import get_model

    torch.manual_seed(0)
    library = get_model(name).eval()
    encoder = build_torchvision(TorchvisionOptions(name=f"torchvision:{name}")).eval()
    encoder.load_state_dict(encoder.foreign(library.state_dict()))
    size = {"mvit_v2_s": 224, "s3d": 224}.get(name, 32)  # the library's own take no other sizes
    x = torch.randint(0, 256, (1, 16, 3, size, size), dtype=torch.uint8)
    pixels = (x / 255 - torch.tensor(encoder.spec.mean).view(3, 1, 1)) / torch.tensor(encoder.spec.std).view(3, 1, 1)
    head = next(getattr(library, key) for key in ("fc", "head", "classifier") if hasattr(library, key))
    with torch.no_grad():
        expected = library(pixels.transpose(1, 2))
        pooled = encoder(x).pooled
        ours = head(pooled[:, :, None, None, None]).flatten(1) if name == "s3d" else head(pooled)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def test_slow_r50_has_the_known_size_and_kernels() -> None:
    with torch.device("meta"):
        encoder = SlowR50(SlowOptions(norm="frozen"))
        features = encoder(torch.zeros(1, 8, 3, 224, 224, dtype=torch.uint8))
    # with the 400 classes of Kinetics it is the 32.45 M of its authors' model zoo
    assert sum(p.numel() for p in encoder.parameters()) + 2048 * 400 + 400 == 32_454_096
    assert encoder.width == 2048 and features.grid == (8, 7, 7)
    assert {name: stage.shape[1:] for name, stage in features.stages.items()} == {
        "res2": (8, 56, 56, 256),
        "res3": (8, 28, 28, 512),
        "res4": (8, 14, 14, 1024),
        "res5": (8, 7, 7, 2048),
    }
    assert (encoder.spec.frames, encoder.spec.stride, encoder.spec.size) == (8, 8, 224)
    assert encoder.stages == tuple((name, stage.shape[-1]) for name, stage in features.stages.items())


def test_slow_r50_takes_names_of_both_publishers() -> None:
    encoder = tower("slow_r50")
    assert isinstance(encoder, SlowR50)
    own = encoder.state_dict()

    def slowfast(name: str) -> str:
        if name.startswith("stem"):
            return name.replace("stem.first.norm", "s1.pathway0_stem.bn").replace("stem.first", "s1.pathway0_stem")
        _, stage, block, part, kind, tensor = name.split(".")
        branch = "branch1" if part == "shortcut" else f"branch2.{part}"
        return f"s{int(stage) + 2}.pathway0_res{block}.{branch}{'_bn' if kind == 'norm' else ''}.{tensor}"

    def pytorchvideo(name: str) -> str:
        if name.startswith("stem"):
            return name.replace("stem.first", "blocks.0")
        _, stage, block, part, kind, tensor = name.split(".")
        branch = f"branch1_{kind}" if part == "shortcut" else f"branch2.{kind}_{part}"
        return f"blocks.{int(stage) + 1}.res_blocks.{block}.{branch}.{tensor}"

    for named in (slowfast, pytorchvideo):
        published = {named(name): value for name, value in own.items()}
        published |= {
            "head.projection.weight": torch.ones(1),
            named("stem.first.norm.weight")[:-6] + "num_batches_tracked": torch.ones(1),
        }
        found = encoder.foreign(published)
        assert found.keys() == own.keys() and all(found[name] is own[name] for name in own)
    assert encoder.foreign(own).keys() == own.keys()


def test_statistics_of_all_rows_where_they_are_asked_for() -> None:
    encoder = tower("slow_r50", norm="rank").train()
    x, before = clips(encoder, rows=3), statistics(encoder)
    together = encoder(x).pooled
    assert all(not before[key].equal(value) for key, value in statistics(encoder).items())
    assert not torch.allclose(encoder(x[:1]).pooled[0], together[0], rtol=1e-2)
    still = statistics(encoder.eval())
    encoder(x)
    assert all(still[key].equal(value) for key, value in statistics(encoder).items())


@pytest.mark.parametrize("norm", ["frozen", "rank"])
def test_replaced_norms_keep_weights_and_what_timm_puts_behind(norm: Any) -> None:
    from timm.layers import BatchNormAct2d

    old = nn.Sequential(nn.Conv2d(3, 8, 3), BatchNormAct2d(8), nn.BatchNorm2d(8)).eval()
    nn.init.uniform_(old[1].running_mean)
    nn.init.uniform_(old[1].weight)
    x = torch.randn(2, 3, 8, 8)
    expected = old(x)
    names = {key for key in old.state_dict() if not key.endswith("tracked")}
    new = replace_batch_norm(old, norm).eval()
    assert set(new.state_dict()) == names and isinstance(new[2], FrozenBatchNorm if norm == "frozen" else RankBatchNorm)
    torch.testing.assert_close(new(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pool", ["mean", "attention", "transformer", "lstm"])
def test_frame_order_matters_to_temporal_heads_and_not_to_the_mean(pool: str) -> None:
    encoder = tower(**TINY_VIT, temporal={"pool": pool, "layers": 2}).train()
    x = clips(encoder, frames=4)
    features = encoder(x)
    turned = encoder(x.flip(1)).pooled
    change = (features.pooled - turned).norm() / features.pooled.norm()
    assert change < 1e-5 if pool == "mean" else change > 1e-4
    features.pooled.pow(2).sum().backward()
    assert [key for key, p in encoder.named_parameters() if p.grad is None] == []
    assert encoder(clips(encoder, frames=6)).grid == (6,), "other lengths than it was built for"
    assert (encoder.blocks()[-1] is encoder.temporal) == (pool != "mean")


def test_an_image_tower_sees_one_frame() -> None:
    encoder = tower(**{**TINY_VIT, "frames": 1})
    assert encoder.spec.frames == 1
    features = encoder.eval()(clips(encoder))
    torch.testing.assert_close(features.pooled, features.tokens[:, 0])
    video = encoder(clips(encoder, frames=8))  # the same weights on clips
    assert video.grid == (8,) and video.pooled.shape == features.pooled.shape


def test_open_clip_normalises_as_its_weights_want() -> None:
    tiny = {"timm_model_name": "vit_tiny_patch16_224", "image_size": 224}
    assert tower("open_clip:ViT-B-32").spec.mean == (0.48145466, 0.4578275, 0.40821073)
    assert tower("open_clip:ViT-B-16-SigLIP", config=tiny).spec.mean == (0.5, 0.5, 0.5)


def test_pixels_are_normalised_on_the_device_of_the_weights() -> None:
    encoder = tower(**TINY_VIT)
    x = clips(encoder)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (encoder.spec.mean, encoder.spec.std))
    torch.testing.assert_close(encoder.normalised(x), (x / 255 - mean) / std, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", VIDEO_KINDS)
def test_a_folder_of_transformers_says_what_its_tower_eats(kind: str, tmp_path: Path) -> None:
    from transformers import AutoModelForVideoClassification

    published = AutoModelForVideoClassification.from_config(tower(f"hf:{kind}").config)
    published.save_pretrained(tmp_path)
    pixels = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(pixels))
    encoder = tower(f"hf:{tmp_path}").eval()
    spec = encoder.spec
    assert (spec.frames, spec.size, spec.mean, spec.std) == (4, 32, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    from safetensors.torch import load_file

    found = encoder.foreign(load_file(tmp_path / "model.safetensors"))
    assert encoder.load_state_dict(found, strict=False).missing_keys == []
    x = clips(encoder)
    base = published.base_model.eval()
    with torch.no_grad():
        expected = (base.encoder if kind == "vjepa2" else base)(encoder.normalised(x)).last_hidden_state
        features = encoder(x)
    if kind == "vivit" or kind == "timesformer":
        torch.testing.assert_close(features.pooled, expected[:, 0])
        expected = expected[:, 1:]
    if kind == "timesformer":
        expected = expected.reshape(2, 4, 4, 32).transpose(1, 2).flatten(1, 2)
    torch.testing.assert_close(features.tokens, expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "torchvision:r3d_19"}, r"tower\.name.*did you mean 'torchvision:r3d_18'"),
        ({"name": "timm:resnet19"}, r"tower\.name.*did you mean 'timm:resnet"),
        ({"name": "timm:hf-hub:someone/model"}, r"tower\.name: unknown name"),
        ({"name": "timm:resnet18", "config": {"depht": 1}}, r"tower\.config: timm:resnet18.*depht"),
        ({"name": "torchvision:r3d_18", "depth": [1, 1]}, r"tower\.depth: torchvision:r3d_18 has 4 stages"),
        ({**TINY_VIT, "temporal": {"pool": "attention", "heads": 7}}, r"tower\.temporal\.heads: 192 .* 7 heads"),
        ({"name": "open_clip:ViT-B-32", "modality": "text", "frames": 4}, "a text tower has no frames"),
        ({"name": "hf:videomae", "config": {**HF, "image_size": [32, 64]}}, "must be square"),
        ({"name": "hf:bert", "modality": "video"}, r"tower\.name.*'hf:bert'"),
    ],
)
def test_what_cannot_be_built_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tower(**options)


def test_a_rank_without_rows_leaves_the_statistics() -> None:
    from mmcl.model import ModelOptions, MultimodalModel
    from mmcl.types import ViewBatch

    small = {**SMALL["slow_r50"], "name": "slow_r50", "norm": "rank"}
    model = MultimodalModel(build(ModelOptions, {"towers": {"video": small}})).train()
    before = statistics(model)
    x = clips(model.tower("video"))
    found = model.encode_view("video", ViewBatch(x, torch.zeros(2, dtype=torch.bool)), ["joint"])["joint"]
    found.sum().backward()
    assert all(before[key].equal(value) for key, value in statistics(model).items()) and not found.any()
    model.encode_view("video", ViewBatch(x, torch.ones(2, dtype=torch.bool)), ["joint"])
    assert not any(before[key].equal(value) for key, value in statistics(model).items())


@pytest.mark.slow
@EACH
def test_what_all_towers_can_be_told_acts_on_this_one(name: str) -> None:
    deeper = {"depth": [2, 1, 1, 1]} if name == "slow_r50" else {}
    if name in ("timm:resnet18", "open_clip:RN50"):
        deeper = {"config": {**({**SMALL, **SLOW}[name]["config"]), "layers": [2, 1, 1, 1]}}
    plain = tower(name, **deeper).train()
    again = tower(name, **deeper, checkpoint_activations=True).train()
    x = clips(plain)
    for encoder in (plain, again):
        encoder(x).pooled.pow(2).sum().backward()
    for (key, p), q in zip(plain.named_parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-5, msg=key)
    locked = tower(name, **deeper, lock=1)
    last = {id(p) for p in locked.blocks()[-1].parameters()}
    trained = {key: id(p) for key, p in locked.named_parameters() if p.requires_grad}
    assert last <= set(trained.values()) and len(trained) < len(list(plain.parameters()))
    dropped = tower(name, **deeper, drop_path=0.9).train()
    for encoder in (plain, dropped):
        for key, p in encoder.named_parameters():
            if key.endswith("c.norm.weight"):  # zero at first: a block that does nothing can be skipped unseen
                nn.init.ones_(p)
    assert len({float(dropped(x).pooled.detach().sum()) for _ in range(8)}) > 1, "a draw each time"
    assert torch.equal(dropped.eval()(x).pooled, plain.eval()(x).pooled)


@pytest.mark.parametrize("name", ["timm:resnet18", "open_clip:ViT-B-32"])
def test_frame_towers_take_the_names_of_their_libraries(name: str) -> None:
    encoder = tower(name, temporal={"pool": "transformer", "layers": 1})
    own = encoder.state_dict()
    prefix = "visual." if name.startswith("open_clip") else ""
    published = {prefix + key[6:]: value for key, value in own.items() if key.startswith("tower.")}
    beside = {"fc.weight": torch.ones(1), "bn1.num_batches_tracked": torch.ones(1)} if not prefix else {}
    beside = beside or {"transformer.resblocks.0.ln_1.weight": torch.ones(1), "logit_scale": torch.ones(())}
    found = encoder.foreign({**published, **beside})
    assert found.keys() == {key for key in own if key.startswith("tower.")}
    assert all(found[key] is own[key] for key in found)
    assert encoder.foreign(own).keys() == own.keys(), "those of a tower of ours stay"
