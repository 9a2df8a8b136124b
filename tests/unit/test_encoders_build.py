"""The table of towers: names, prefixes, wrong names; library towers at random, small, without a network."""

from __future__ import annotations

import json
import pickle

import pytest
import torch
from torch import nn

from mmcl.config import Options, build
from mmcl.encoders.audio import TinyAudio
from mmcl.encoders.build import TOWERS, TowerOptions, build_encoder, tower_tag
from mmcl.encoders.hf_text import HfTokenizer
from mmcl.encoders.library import OpenClipTokenizer
from mmcl.encoders.text import TinyText
from mmcl.encoders.video import TinyVideo
from mmcl.media.text import ByteTokenizer
from mmcl.types import ConfigError

VIT = {"layers": 1, "width": 64, "patch_size": 16, "image_size": 32}
TEXT = {"layers": 1, "width": 64, "heads": 2, "vocab_size": 49408}
BERT = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


class _Holder(Options):
    tower: TowerOptions


def _build(**tower):
    return build_encoder(build(_Holder, {"tower": tower}).tower)


def _all_trained(tower, x, mask=None):
    tower.train()
    (tower(x, mask).pooled @ torch.linspace(-1, 1, tower.width)).pow(2).sum().backward()
    return [name for name, p in tower.named_parameters() if p.grad is None]


def test_each_name_builds_its_tower():
    kinds = {"tiny_video": TinyVideo, "tiny_audio": TinyAudio, "tiny_text": TinyText}
    assert {name: type(_build(name=name, width=16)) for name in kinds} == kinds


def test_every_entry_of_the_table_is_an_option_of_the_type():
    schema = json.dumps(_Holder.model_json_schema())
    assert all(options.__name__ in schema for options in (entry.options for entry in TOWERS.values()))
    assert {tower_tag({"name": name}) for name in (*TOWERS, "hf:bert", "open_clip:RN50")} <= set(TOWERS)


def test_options_survive_the_round_trip_through_a_file():
    holder = build(_Holder, {"tower": {"name": "open_clip:ViT-B-32", "config": VIT, "frames": 2}})
    assert build(_Holder, json.loads(holder.model_dump_json())) == holder


@pytest.mark.parametrize(
    ("name", "near"),
    [("tiny_vidoe", "tiny_video"), ("open_clip:ViT-B-33", "open_clip:ViT-B-32"), ("hf:robertta", "roberta")],
)
def test_an_unknown_name_gets_the_nearest(name, near):
    with pytest.raises(ConfigError, match=r"tower\.name") as caught:
        _build(name=name)
    assert f"did you mean '{near}'" in str(caught.value)


def test_options_of_no_tower_are_refused():
    class Other(Options):
        name: str = "tiny_audio"

    with pytest.raises(ConfigError, match="tiny_audio"):
        build_encoder(Other())


def test_a_wrong_key_of_a_tower_is_named():
    with pytest.raises(ConfigError, match="widht"):
        _build(name="tiny_text", widht=3)


def test_open_clip_sees_each_frame():
    tower = _build(name="open_clip:ViT-B-32", config=VIT, frames=2).eval()
    assert tower.spec.size == 32 and tower.width == 512
    frames = torch.randint(0, 256, (2, 3, 3, 32, 32), dtype=torch.uint8)
    features = tower(frames)
    assert features.tokens.shape == (2, 3, 512) and features.grid == (3,)
    torch.testing.assert_close(features.pooled, features.tokens.mean(1))
    torch.testing.assert_close(tower(frames[:1, 1:2]).pooled[0], features.tokens[0, 1])
    assert _all_trained(tower, frames) == []


def test_batch_norm_of_open_clip_is_frozen():
    tower = _build(name="open_clip:RN50", config={"layers": [1, 1, 1, 1], "width": 8, "image_size": 64})
    assert not any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in tower.modules())
    frames = torch.randint(0, 256, (2, 1, 3, 64, 64), dtype=torch.uint8)
    together = tower.train()(frames).pooled
    torch.testing.assert_close(tower(frames[:1]).pooled[0], together[0], rtol=1e-4, atol=1e-5)


def test_open_clip_reads_its_own_byte_pairs():
    tower = _build(name="open_clip:ViT-B-32", modality="text", config=TEXT).eval()
    tokenizer = pickle.loads(pickle.dumps(tower.spec.tokenizer))
    assert tokenizer == OpenClipTokenizer(77) and hash(tokenizer) == hash(tower.spec.tokenizer)
    ids, mask = tokenizer(["a dog barks", ""])
    assert mask.sum(1).tolist() == [6, 2] and ids[0].tolist() == [49406, 320, 1929, 1040, 662, 49407]
    features = tower(ids, mask)
    assert features.pooled.shape == (2, 512) and features.tokens.shape == (2, 6, 512)
    torch.testing.assert_close(features.pooled[1], features.tokens[1, 1])
    longer = tower(nn.functional.pad(ids, (0, 7)), nn.functional.pad(mask, (0, 7)))
    torch.testing.assert_close(longer.pooled, features.pooled)
    assert _all_trained(tower, ids, mask) == []


def test_a_caption_too_long_is_cut():
    ids, mask = OpenClipTokenizer(8)(["dog " * 50])
    assert ids.shape == (1, 8) and mask.all() and ids[0, -1] == 49407


def test_open_clip_asks_no_hub():
    with pytest.raises(ConfigError, match="nothing is downloaded"):
        _build(name="open_clip:ViT-B-16-SigLIP", modality="text")


def test_a_wrong_key_of_a_library_is_named():
    with pytest.raises(ConfigError, match="layrs"):
        _build(name="open_clip:ViT-B-32", config={"layrs": 1})


@pytest.mark.parametrize("kind", ["bert", "distilbert", "t5"])
def test_transformers_from_a_model_type(kind):
    sizes = {
        "bert": BERT,
        "distilbert": {"dim": 32, "n_layers": 1, "n_heads": 2, "hidden_dim": 32},
        "t5": {"d_model": 32, "d_ff": 32, "d_kv": 16, "num_layers": 1, "num_heads": 2},
    }
    tower = _build(name=f"hf:{kind}", config=sizes[kind])
    assert tower.spec.tokenizer == ByteTokenizer(64) and tower.width == 32
    ids, mask = tower.spec.tokenizer(["a dog barks", ""])
    features = tower.train()(ids, mask)
    torch.testing.assert_close(tower(ids[:1, :11], mask[:1, :11]).pooled[0], features.pooled[0])  # no dropout
    longer = tower(nn.functional.pad(ids, (0, 5)), nn.functional.pad(mask, (0, 5)))
    torch.testing.assert_close(longer.pooled, features.pooled, rtol=1e-4, atol=1e-5)
    assert _all_trained(tower, ids, mask) == []


def test_transformers_from_a_folder_with_its_tokenizer(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({"[PAD]": 0, "[UNK]": 1, "a": 2, "dog": 3, "barks": 4}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "[PAD]", "unk_token": "[UNK]"})
    )
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", "vocab_size": 5, **BERT}))
    tower = _build(name=f"hf:{tmp_path}", max_tokens=8)
    tokenizer = pickle.loads(pickle.dumps(tower.spec.tokenizer))
    assert tokenizer == HfTokenizer(str(tmp_path), 8)
    assert tokenizer.vocabulary == 5 and tokenizer.mask_id is None
    ids, mask = tokenizer(["a dog barks", "", "cat " * 20])
    assert ids[0, :3].tolist() == [2, 3, 4] and mask.sum(1).tolist() == [3, 1, 8]
    assert tower(ids, mask).pooled.isfinite().all()


def test_transformers_limits_and_strangers():
    with pytest.raises(ConfigError, match="takes at most 16"):
        _build(name="hf:bert", config={**BERT, "max_position_embeddings": 16}, max_tokens=64)
    with pytest.raises(ConfigError, match="not a text model"):
        _build(name="hf:vit")
    with pytest.raises(ConfigError, match="nothing is downloaded"):
        _build(name="hf:google-bert/bert-base-uncased")
