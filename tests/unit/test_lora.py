"""LoRA: nothing at first, alone in learning, kept in checkpoints, merged in exports."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from support.objectives import tower_batch
from support.recipes import tiny_config
from torch import nn

from mmcl.encoders.lora import adaptable, is_update
from mmcl.model import MultimodalModel
from mmcl.recipe import RunConfig, build_model
from mmcl.training.launch import pretrain
from mmcl.training.optim import build_optimizer
from mmcl.training.step import TrainStep
from mmcl.types import ConfigError

pytest.importorskip("peft", reason="needs the extra: pip install 'mmcl[lora]'")
# it takes seconds to import
pytestmark = pytest.mark.slow

VIT = {"name": "open_clip:ViT-B-32", "frames": 2}
VIT["config"] = {"layers": 2, "width": 64, "patch_size": 16, "image_size": 32}
BERT = {"name": "hf:bert"}
BERT["config"] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}  # type: ignore[assignment]


def config_of(*overrides: str, lora: dict[str, object] | None = None, **places: Path) -> RunConfig:
    towers = {
        name: json.dumps({**tower, "lora": {"rank": 2, **(lora or {})}})
        for name, tower in (("video", VIT), ("text", BERT))
    }
    return tiny_config(*(f"model.towers.{n}={tower}" for n, tower in towers.items()), *overrides, **places)


def plain_of(model: MultimodalModel) -> MultimodalModel:
    """The same model without LoRA."""
    towers = {n: o.model_copy(update={"lora": None}) for n, o in model.options.towers.items()}
    plain = MultimodalModel(model.options.model_copy(update={"towers": towers}))
    plain.add_scales(model.log_scales)
    state = model.state_dict()
    plain.load_state_dict({k.replace(".base_layer", ""): v for k, v in state.items() if not is_update(k)})
    return plain


def test_it_starts_as_the_tower_without_it() -> None:
    torch.manual_seed(0)
    model, mix = build_model(config_of())
    batch = tower_batch(model)
    plain = plain_of(model)
    for mode in (True, False):
        adapted, wanted = model.train(mode)(batch, mix.needs), plain.train(mode)(batch, mix.needs)
        for need in mix.needs:
            assert torch.equal(adapted.get(need), wanted.get(need)), need.tower


def test_updates_and_heads_learn_alone_and_all_of_them_do() -> None:
    torch.manual_seed(0)
    config = config_of(lora={"dropout": 0.5})
    model, mix = build_model(config)
    step = TrainStep(model, mix)
    optimizer = build_optimizer(step, config.train.optimizer)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for _ in range(3):
        torch.autograd.backward(step(tower_batch(model)).loss)
        assert not [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
        optimizer.step()
        optimizer.zero_grad()
    names = {name for name, p in model.named_parameters() if id(p) in held}
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == names
    learns = {name.split(".")[1] for name in names if name.startswith("towers.") and is_update(name)}
    assert learns == {"video", "text"}
    assert not {n for n in names if n.startswith(("towers.video", "towers.text")) and not is_update(n)}
    assert {"heads.text.linears.0.weight", "heads.video.linears.0.weight", "towers.audio.bands.weight"} <= names
    drops = {n: m.training for n, m in model.named_modules() if isinstance(m, nn.Dropout) and "lora_dropout" in n}
    assert drops and all(drops.values())


def test_a_run_saves_updates_and_an_export_merges_them(shards_folder: Path, tmp_path: Path) -> None:
    config = config_of(
        "train.steps=2", "train.optimizer.learning_rate=0.05", "train.optimizer.warmup_steps=0",
        shards=shards_folder / "train", out=tmp_path / "run",
    )  # fmt: skip
    pretrain(config)
    trained = MultimodalModel.from_pretrained(tmp_path / "run")
    updates = {name: value for name, value in trained.state_dict().items() if is_update(name)}
    assert updates and all(value.any() for name, value in updates.items() if "lora_B" in name)
    exported = MultimodalModel.from_pretrained(trained.export(tmp_path / "export"))
    assert not [name for name in exported.state_dict() if is_update(name) or "base_layer" in name]
    batch = tower_batch(trained)
    needs = build_model(config)[1].needs
    with torch.no_grad():
        before, merged = trained(batch, needs), exported(batch, needs)
        unmerged = plain_of(trained).eval()(batch, needs)
    for need in needs:
        torch.testing.assert_close(merged.get(need), before.get(need), rtol=1e-4, atol=1e-5)
        if need.tower != "audio":
            assert not torch.allclose(unmerged.get(need), before.get(need), atol=1e-3)
    longer = config_of("train.steps=3", shards=shards_folder / "train", out=tmp_path / "run")
    pretrain(longer, resume="auto", allow=["train.steps", "train.optimizer"])
    with pytest.raises(ConfigError, match="holds LoRA updates beside its weights: export it"):
        build_model(config_of(f"model.towers.text.pretrained={tmp_path / 'run'}"))
    build_model(config_of(f"model.towers.text.pretrained={tmp_path / 'export'}"))


def test_layers_are_chosen_by_the_ends_of_their_names() -> None:
    model, _ = build_model(config_of("model.towers.text.lora.targets=[query, output.dense]"))
    names = {name.partition(".lora_A")[0] for name in model.towers["text"].state_dict() if ".lora_A" in name}
    ends = ("attention.self.query", "attention.output.dense", "output.dense")
    assert len(names) == 6 and all(name.endswith(ends) for name in names)
    assert [n.rpartition(".")[2] for n in adaptable(plain_of(model).tower("video"))].count("attn") == 2
    with pytest.raises(
        ConfigError, match=r"model\.towers\.text\.lora\.targets\.0: no layer .* 'quer'; there are: dense"
    ):
        build_model(config_of("model.towers.text.lora.targets=[quer]"))
    with pytest.raises(ConfigError, match=r"model\.towers\.text\.lora: the blocks of this tower hold no linear"):
        build_model(tiny_config("model.towers.text.lora={}"))


def test_attention_alone_is_adapted_by_its_scaled_product() -> None:
    """What peft does not put in: all else is frozen all the same, and ``alpha / rank`` scales it as in peft's."""
    torch.manual_seed(0)
    targets = "model.towers.video.lora={rank: 2, alpha: 6, targets: [attn]}"
    model, mix = build_model(config_of(targets))
    learning = {n for n, p in model.towers["video"].named_parameters() if p.requires_grad}
    assert learning and all(is_update(name) for name in learning)
    plain = plain_of(model).eval()
    with torch.no_grad():
        for name, value in model.towers["video"].named_parameters():
            if ".lora_B." in name:
                value.normal_(std=0.1)
        found = {name: value for name, value in model.towers["video"].state_dict().items() if is_update(name)}
        for name, value in plain.towers["video"].named_parameters():
            for part, ending in (("in_proj", "attn.in_proj_weight"), ("out_proj", "attn.out_proj.weight")):
                if name.endswith(ending):
                    place = name.removesuffix(ending) + "attn."
                    value += 3 * found[f"{place}lora_B.{part}"] @ found[f"{place}lora_A.{part}"]
        batch = tower_batch(model)
        adapted, wanted = model.eval()(batch, mix.needs), plain(batch, mix.needs)
    for need in mix.needs:
        if need.tower == "video":
            torch.testing.assert_close(adapted.get(need), wanted.get(need), rtol=1e-5, atol=1e-6)
