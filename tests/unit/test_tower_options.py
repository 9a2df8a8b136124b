"""Options that all towers share, on real towers: locks, rates and decay of the optimizer's groups, LoRA, drop-path."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.objectives import tower_batch
from support.recipes import tiny_config
from torch import Tensor, nn

from mmcl.encoders.audio import TinyAudioOptions
from mmcl.encoders.base import Encoder
from mmcl.encoders.build import build_encoder
from mmcl.encoders.options import TowerCommon
from mmcl.encoders.parts import depths, undecayed
from mmcl.encoders.prepare import DropPath, prepare
from mmcl.encoders.text import TinyTextOptions
from mmcl.encoders.video import TinyVideoOptions
from mmcl.model import MultimodalModel
from mmcl.recipe import RunConfig, build_model
from mmcl.training.launch import pretrain
from mmcl.training.optim import build_optimizer
from mmcl.training.processes import build_accelerator
from mmcl.training.step import TrainStep
from mmcl.training.trainer import Trainer
from mmcl.types import ConfigError, Features

RESNET = {
    "name": "open_clip:RN50",
    "frames": 2,
    "norm": "rank",
    "config": {"layers": [1, 1, 1, 1], "width": 8, "image_size": 32},
}
PICTURES = torch.randint(0, 256, (4, 2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
TEXTS = ["a dog barks", "rain", "a red car", ""]


class Norms(Encoder):
    """Live batch norms, dropout and a norm without weights, as somebody's tower may have them."""

    def __init__(self) -> None:
        super().__init__()
        self.front = nn.Linear(6, 6)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.BatchNorm1d(6, affine=False), nn.Dropout(0.5))
            for _ in range(3)
        )
        self.norm, self.dropout = nn.BatchNorm1d(6), nn.Dropout(0.5)

    def blocks(self) -> list[nn.Module]:
        return list(self.layers)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Features:
        x = self.front(x)
        for layer in self.layers:
            x = layer(x)
        return Features(self.dropout(self.norm(x)))


def steps_of(encoder: Encoder, x: Tensor, count: int = 5) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The state before and after some training steps; weights that ask for no gradient are in the optimizer too."""
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=0.1)
    for _ in range(count):
        encoder.train()
        pooled = encoder(x).pooled
        if pooled.requires_grad:
            torch.autograd.backward((pooled * torch.linspace(-1, 1, pooled.shape[1])).sum())
        optimizer.step()
        optimizer.zero_grad()
    return before, encoder.state_dict()


@pytest.mark.parametrize("lock", ["all", "with_head", 1, 2, 3, "none"])
def test_locked_blocks_keep_weights_and_statistics_and_drop_nothing(lock: str | int) -> None:
    torch.manual_seed(0)
    encoder = prepare(Norms(), TowerCommon(lock=lock), "tower")
    before, after = steps_of(encoder, torch.randn(16, 6))
    same = {name for name in before if torch.equal(before[name], after[name])}
    free = {"none": 3, "all": -1, "with_head": -1}.get(lock, lock)  # type: ignore[call-overload]
    locked = {f"layers.{n}." for n in range(3) if n < 3 - free}
    locked |= set() if lock == "none" else {"front."}
    locked |= {"norm."} if free == -1 else set()
    for name in before:
        assert (name in same) == name.startswith(tuple(locked)), name
    for name, part in encoder.named_modules():
        if isinstance(part, (nn.Dropout, nn.BatchNorm1d)):
            assert part.training == (not f"{name}.".startswith(tuple(locked)) and free != -1), name


def test_a_lock_is_bitwise_in_a_real_run(shards_folder: Path, tmp_path: Path) -> None:
    """A ResNet of open_clip with batch norm, a tiny tower with its head, and half of another; five steps."""
    config = tiny_config(
        f"model.towers.video={json.dumps({**RESNET, 'lock': 'all'})}",
        "model.towers.audio.lock=with_head",
        "model.towers.text.lock=1",
        "model.towers.text.depth=2",
        "objectives.0.pairs=[[video, text], [audio, text]]",
        "train.steps=5",
        "train.global_batch=8",
        "train.optimizer.warmup_steps=0",
        shards=shards_folder / "train",
        out=tmp_path / "run",
    )
    torch.manual_seed(config.train.seed)
    before = build_model(config)[0].state_dict()
    pretrain(config)
    after = load_file(tmp_path / "run/checkpoints/step_00000005/model.safetensors")
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    assert any("running_var" in name for name in after)
    learning = ("heads.video.", "towers.text.layers.1.", "towers.text.norm.", "heads.text.", "log_scales.")
    unmoved = {name for name in after if not name.startswith(learning)}
    assert moved & unmoved == set() and unmoved >= {n for n in after if n.startswith(("towers.video", "heads.audio"))}
    assert {name for name in after if name.startswith(learning)} == moved


def test_too_many_blocks_and_idle_options_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"model\.towers\.text\.lock: 3 blocks to train, but this tower has 1"):
        build_model(tiny_config("model.towers.text.lock=3"))
    with pytest.raises(ConfigError, match=r"model\.towers\.text: lora trains nothing .* leave lock out"):
        tiny_config("model.towers.text.lora={}", "model.towers.text.lock=all")
    with pytest.raises(ConfigError, match=r"model\.towers\.text\.lock: "):
        tiny_config("model.towers.text.lock=0")


def test_batch_norm_of_torch_is_not_run_twice() -> None:
    with pytest.raises(ConfigError, match=r"tower\.checkpoint_activations: .* count rows twice"):
        prepare(Norms(), TowerCommon(checkpoint_activations=True), "tower")
    prepare(Norms(), TowerCommon(checkpoint_activations=True, lock="all"), "tower")


def trainer_of(*overrides: str, shards: Path, out: Path) -> tuple[RunConfig, Trainer]:
    config = tiny_config("train.steps=4", "train.optimizer.warmup_steps=2", *overrides, shards=shards, out=out)
    return config, Trainer(config, build_accelerator(config))


def groups_by_name(trainer: Trainer) -> dict[str, dict[str, float]]:
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    return {
        names.get(id(p), "objective"): {k: group[k] for k in ("lr", "weight_decay", "factor")}
        for group in trainer.optimizer.param_groups
        for p in group["params"]
    }


RATES = ("model.towers.text.learning_rate_factor=0.5", "model.towers.text.layer_decay=0.1", "model.towers.text.depth=2")


def test_rates_fall_from_the_last_block_to_the_front(shards_folder: Path, tmp_path: Path) -> None:
    config, trainer = trainer_of(*RATES, shards=shards_folder / "train", out=tmp_path / "run")
    groups = groups_by_name(trainer)
    wanted = {
        "towers.text.norm.weight": 0.5,
        "towers.text.layers.1.conv.weight": 0.5,
        "towers.text.layers.0.conv.bias": 0.05,
        "towers.text.embedding.weight": 0.005,
        "heads.text.linears.0.weight": 1.0,
        "towers.video.time.weight": 1.0,
        "log_scales.video-text": 1.0,
    }
    for name, factor in wanted.items():
        assert groups[name]["factor"] == pytest.approx(factor), name
    assert sum(p.requires_grad for p in trainer.model.parameters()) == len(groups)
    stream = iter(trainer.stream)
    rate = config.train.optimizer.learning_rate
    for share in (0.5, 1.0):  # of the warm-up
        trainer.optimizer_step([next(stream)])
        trainer.progress.step += 1
        for name, factor in wanted.items():
            assert groups_by_name(trainer)[name]["lr"] == pytest.approx(rate * share * factor), name


def test_rates_are_there_after_a_resume(shards_folder: Path, tmp_path: Path) -> None:
    places = {"shards": shards_folder / "train", "out": tmp_path / "run"}
    pretrain(tiny_config(*RATES, "train.steps=2", "train.log_every=1", **places))
    config = tiny_config(*RATES, "train.steps=4", "train.log_every=1", **places)
    trainer = Trainer(config, build_accelerator(config), fresh=False)
    trainer.load(tmp_path / "run/checkpoints/step_00000002")
    assert groups_by_name(trainer)["towers.text.embedding.weight"]["factor"] == pytest.approx(0.005)
    pretrain(config, resume="auto", allow=["train.steps"])
    last = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1])
    base = config.train.optimizer.learning_rate * 4 / config.train.optimizer.warmup_steps
    assert last["learning_rate"] == pytest.approx(base)


def test_positions_classes_norms_biases_and_temperatures_are_not_decayed() -> None:
    vit = {"name": "open_clip:ViT-B-32", "config": {"layers": 2, "width": 64, "patch_size": 16, "image_size": 32}}
    text = {"name": "open_clip:ViT-B-32", "modality": "text"}
    text["config"] = {"layers": 1, "width": 64, "heads": 2, "vocab_size": 49408}  # type: ignore[assignment]
    overrides = [f"model.towers.video={json.dumps(vit)}", f"model.towers.text={json.dumps(text)}"]
    config = tiny_config(*overrides)
    model, mix = build_model(config)
    groups = build_optimizer(TrainStep(model, mix), config.train.optimizer).param_groups
    names = {id(p): name for name, p in model.named_parameters()}
    free = {names[id(p)] for group in groups if group["weight_decay"] == 0 for p in group["params"]}
    decayed = {names[id(p)] for group in groups if group["weight_decay"] > 0 for p in group["params"]}
    tower = "towers.video.tower"
    assert free >= {f"{tower}.class_embedding", f"{tower}.positional_embedding", f"{tower}.ln_pre.weight"}
    assert free >= {"towers.text.tower.positional_embedding", "log_scales.video-text", "heads.text.linears.0.bias"}
    assert decayed >= {f"{tower}.conv1.weight", f"{tower}.proj", "towers.text.tower.token_embedding.weight"}
    assert not decayed & free and len(free | decayed) == sum(p.requires_grad for p in model.parameters())
    named = ["bert.embeddings.position_embeddings.weight", "cls_token", "pos_embed", "a.time_embed", "b.pos_bias_table"]
    holder = nn.Module()
    for name in [*named, "embeddings.word_embeddings.weight", "composed.weight"]:
        owner = holder
        *parts, last = name.split(".")
        for part in parts:
            owner = getattr(owner, part, None) or owner.add_module(part, nn.Module()) or getattr(owner, part)
        owner.register_parameter(last, nn.Parameter(torch.zeros(2, 2)))
    assert undecayed(holder) == set(named)


def test_a_library_names_what_it_does_not_decay() -> None:
    class Theirs(nn.Linear):
        def no_weight_decay(self) -> set[str]:
            return {"weight"}

    assert undecayed(nn.Sequential(Theirs(2, 2), nn.Linear(2, 2))) == {"0.weight", "0.bias", "1.bias"}


def test_depths_of_a_tower() -> None:
    found = depths(build_encoder(TinyTextOptions(width=16, depth=2)))
    assert {name.split(".")[0]: depth for name, depth in found.items() if "layers" not in name} == {
        "embedding": 0,
        "norm": 3,
    }
    assert {depth for name, depth in found.items() if name.startswith("layers.1")} == {2}
    for options in (TinyVideoOptions(), TinyAudioOptions()):
        encoder = build_encoder(options)
        assert set(depths(encoder).values()) == {*range(1, len(encoder.blocks()) + 2)}


def test_dropped_paths_keep_the_mean_and_are_drawn_by_row() -> None:
    torch.manual_seed(0)
    block = nn.Linear(4, 4)
    x = torch.randn(3, 4).repeat(20_000, 1)
    whole = block(x)
    block.register_forward_hook(DropPath(0.3))
    out = block(x)
    kept = (out != x).any(1)
    assert float((~kept).float().mean()) == pytest.approx(0.3, abs=0.01)
    torch.testing.assert_close(out[kept], (x + (whole - x) / 0.7)[kept])
    torch.testing.assert_close(out.view(-1, 3, 4).mean(0), whole[:3], atol=0.05, rtol=0)
    assert torch.equal(block.eval()(x), whole)


def test_paths_drop_in_training_alone_by_torchs_random_state_and_more_with_depth() -> None:
    torch.manual_seed(0)
    plain = build_encoder(TinyTextOptions(width=16, depth=3))
    encoder = build_encoder(TinyTextOptions(width=16, depth=3, drop_path=0.6))
    encoder.load_state_dict(plain.state_dict())
    ids, mask = encoder.spec.tokenizer(TEXTS)  # type: ignore[union-attr]
    assert torch.equal(encoder.eval()(ids, mask).pooled, plain.eval()(ids, mask).pooled)
    encoder.train()
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        runs.append(encoder(ids, mask).pooled)
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])
    chances = [hook.chance for block in encoder.blocks() for hook in block._forward_hooks.values()]
    assert chances == pytest.approx([0.2, 0.4, 0.6])


def test_paths_that_cannot_be_dropped_are_named() -> None:
    class Widening(Norms):
        def blocks(self) -> list[nn.Module]:
            return [self.widen]

        def __init__(self) -> None:
            super().__init__()
            self.widen = nn.Linear(6, 7)

        def forward(self, x: Tensor, mask: Tensor | None = None) -> Features:
            return Features(self.widen(x))

    encoder = prepare(Widening(), TowerCommon(drop_path=0.5), "model.towers.x")
    with pytest.raises(ConfigError, match=r"model\.towers\.x\.drop_path: no block"):
        encoder(torch.randn(2, 6))


def test_a_tower_has_its_own_precision() -> None:
    torch.manual_seed(0)
    model, mix = build_model(tiny_config("model.towers.video.precision=bf16", "model.towers.text.precision=fp32"))
    seen: dict[str, torch.dtype] = {}
    for name in ("video", "text"):
        block = model.tower(name).blocks()[-1]
        part = getattr(block, "conv", block)
        part.register_forward_hook(lambda _m, _a, out, name=name: seen.update({name: out.dtype}))
    batch = tower_batch(model)
    whole = model(batch, mix.needs)
    assert seen == {"video": torch.bfloat16, "text": torch.float32}
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(batch, mix.needs)
    assert seen == {"video": torch.bfloat16, "text": torch.float32}
    for need in mix.needs:
        assert whole.get(need).dtype == torch.float32
        if need.tower == "text":
            torch.testing.assert_close(whole.get(need), mixed.get(need))
    plain = MultimodalModel(tiny_config().model)
    plain.load_state_dict(model.state_dict(), strict=False)
    difference = (plain.train()(batch, mix.needs).get(mix.needs[0]) - whole.get(mix.needs[0])).abs().max()
    assert 0 < float(difference) < 0.05
