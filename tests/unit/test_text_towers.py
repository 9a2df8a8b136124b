"""Text towers of transformers do as their folder says; captions that are too long are counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from support.recipes import tiny_config
from support.towers import build_tower, gradients_missing
from torch import nn

from mmcl.data.collate import Row, Value, collate
from mmcl.encoders.hf_text import HfTokenizer
from mmcl.encoders.library import OpenClipTokenizer
from mmcl.media.text import ByteTokenizer
from mmcl.training.launch import pretrain
from mmcl.types import ConfigError, TextSpec, View

BERT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
SIGLIP = {**BERT, "projection_size": 24, "max_position_embeddings": 16, "pad_token_id": 1, "vocab_size": 8}
WORDS = {"[PAD]": 0, "[UNK]": 1, "a": 2, "dog": 3, "barks": 4, "[CLS]": 5, "[SEP]": 6}
CAPTIONS = ["a dog barks", "dog"]


def write_tokenizer(folder: Path, **said: Any) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = Tokenizer(models.WordLevel(WORDS, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", None, [("[CLS]", 5), ("[SEP]", 6)])
    words.save(str(folder / "tokenizer.json"))
    said = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "[PAD]", "unk_token": "[UNK]", **said}
    (folder / "tokenizer_config.json").write_text(json.dumps(said))


def write_sentence(folder: Path, steps: list[str], pooling: dict[str, Any], **said: Any) -> None:
    """What sentence-transformers writes beside a model."""
    places = {"Transformer": "", "Pooling": "1_Pooling", "Normalize": "2_Normalize"}
    (folder / "modules.json").write_text(
        json.dumps([{"type": f"sentence_transformers.models.{kind}", "path": places.get(kind, kind)} for kind in steps])
    )
    (folder / "1_Pooling").mkdir(exist_ok=True)
    (folder / "1_Pooling/config.json").write_text(json.dumps(pooling))
    (folder / "sentence_bert_config.json").write_text(json.dumps(said))


def bert_folder(folder: Path) -> Any:
    torch.manual_seed(0)
    model = transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=7, **BERT)).eval()
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return model


@pytest.mark.parametrize(
    ("pooling", "how"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
        ({"pooling_mode_mean_tokens": True}, "mean"),
        ({"pooling_mode_max_tokens": True}, "max"),
        ({"pooling_mode": "mean"}, "mean"),
        ({"pooling_mode": "lasttoken"}, "last"),
    ],
)
def test_a_folder_of_sentence_transformers_is_obeyed(pooling: dict[str, Any], how: str, tmp_path: Path) -> None:
    model = bert_folder(tmp_path)
    steps = ["Transformer", "Pooling", *(["Normalize"] if how == "cls" else [])]
    write_sentence(tmp_path, steps, pooling, max_seq_length=4, do_lower_case=True)
    tower = build_tower(name=f"hf:{tmp_path}")
    tower.load_state_dict(tower.foreign(load_file(tmp_path / "model.safetensors")), strict=False)
    assert tower.spec.tokenizer == HfTokenizer(str(tmp_path), 4, lower=True)
    ids, mask = tower.spec.tokenizer(["A dog BARKS", "dog"])
    assert ids.tolist() == [[5, 2, 3, 6], [5, 3, 6, 0]] and mask.sum(1).tolist() == [4, 3]
    with torch.no_grad():
        pooled = tower.eval()(ids, mask).pooled
        for row in range(2):  # alone and without padding: by the words of its definition
            tokens = model.bert(ids[row : row + 1, : int(mask[row].sum())]).last_hidden_state[0]
            expected = {"cls": tokens[0], "mean": tokens.mean(0), "max": tokens.amax(0), "last": tokens[-1]}[how]
            expected = nn.functional.normalize(expected, dim=0) if how == "cls" else expected
            torch.testing.assert_close(pooled[row], expected, rtol=1e-4, atol=1e-5)
    assert gradients_missing(tower, ids, mask) == []
    assert build_tower(name=f"hf:{tmp_path}", pooling="mean", max_tokens=3).spec.tokenizer.max_tokens == 3


def test_what_a_folder_asks_and_is_not_known_is_refused(tmp_path: Path) -> None:
    bert_folder(tmp_path)
    write_sentence(tmp_path, ["Transformer", "Pooling", "Dense"], {"pooling_mode": "mean"})
    with pytest.raises(ConfigError, match="a step Dense"):
        build_tower(name=f"hf:{tmp_path}")
    write_sentence(tmp_path, ["Transformer", "Pooling"], {"pooling_mode": ["mean", "max"]})
    with pytest.raises(ConfigError, match="pools by mean, max"):
        build_tower(name=f"hf:{tmp_path}")


def test_a_plain_folder_says_its_length(tmp_path: Path) -> None:
    bert_folder(tmp_path)
    assert build_tower(name=f"hf:{tmp_path}").spec.tokenizer.max_tokens == 64  # as long as nobody says
    write_tokenizer(tmp_path, model_max_length=9)
    from mmcl.encoders import hf_text

    hf_text._hf_tokenizer.cache_clear()
    assert build_tower(name=f"hf:{tmp_path}").spec.tokenizer.max_tokens == 9


def test_siglip_is_its_own_head_on_a_full_row(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = transformers.SiglipTextModel(transformers.SiglipTextConfig(**SIGLIP)).eval()
    model.save_pretrained(tmp_path)
    write_tokenizer(tmp_path, model_max_length=16)
    tower = build_tower(name=f"hf:{tmp_path}").eval()
    assert (tower.pooling, tower.width, tower.spec.tokenizer.max_tokens) == ("head", 24, 16)
    tower.load_state_dict(tower.foreign(load_file(tmp_path / "model.safetensors")))
    ids, mask = tower.spec.tokenizer(CAPTIONS)
    full = nn.functional.pad(ids.masked_fill(~mask, 1), (0, 16 - ids.shape[1]), value=1)
    with torch.no_grad():
        torch.testing.assert_close(tower(ids, mask).pooled, model(input_ids=full).pooler_output, rtol=1e-4, atol=1e-5)
        longer = tower(nn.functional.pad(ids, (0, 5)), nn.functional.pad(mask, (0, 5)))
        torch.testing.assert_close(longer.pooled, tower(ids, mask).pooled, rtol=1e-4, atol=1e-5)
    assert gradients_missing(tower, ids, mask) == [] and len(tower.blocks()) == 3
    assert build_tower(name=f"hf:{tmp_path}", pooling="mean").width == 32


@pytest.mark.parametrize("kind", ["T5Model", "DistilBertForSequenceClassification"])
def test_weights_of_other_tasks_find_their_names(kind: str, tmp_path: Path) -> None:
    sizes: dict[str, Any] = {
        "T5Model": {"d_model": 32, "d_ff": 32, "d_kv": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 7},
        "DistilBertForSequenceClassification": {"dim": 32, "n_layers": 1, "n_heads": 2, "hidden_dim": 32},
    }
    library = getattr(transformers, kind)
    torch.manual_seed(0)
    model = library(library.config_class(**sizes[kind])).eval()
    model.save_pretrained(tmp_path)
    write_tokenizer(tmp_path)
    tower = build_tower(name=f"hf:{tmp_path}").eval()
    found = tower.foreign(load_file(tmp_path / "model.safetensors"))
    assert tower.load_state_dict(found, strict=False).missing_keys == []
    ids, mask = tower.spec.tokenizer(CAPTIONS)
    inner = model.encoder if kind == "T5Model" else model.distilbert
    with torch.no_grad():
        theirs = inner(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        torch.testing.assert_close(tower(ids, mask).tokens[mask], theirs[mask], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("own", ["bytes", "open_clip", "hf"])
def test_captions_that_are_cut_are_known(own: str, tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    tokenizer = {"bytes": ByteTokenizer(11), "open_clip": OpenClipTokenizer(6), "hf": HfTokenizer(str(tmp_path), 5)}[
        own
    ]
    captions = ["a dog barks", "a dog barks é", "dog", "a dog barks a dog"]
    assert tokenizer.cut(captions) == [False, True, False, True]  # type: ignore[attr-defined]
    view = View(TextSpec(tokenizer))
    rows = [Row(n, f"k{n}", {view: Value(caption)}) for n, caption in enumerate(captions)]
    values = collate([*rows, Row(4)], [view]).views[view]
    assert values.params["cut"].tolist() == [False, True, False, True, False]
    unaware = View(TextSpec(_Unaware()))
    assert not collate([Row(0, "k", {unaware: Value("a" * 99)})], [unaware]).views[unaware].params["cut"].any()


class _Unaware:
    def __call__(self, texts: Any) -> Any:
        return torch.ones(len(texts), 2, dtype=torch.int64), torch.ones(len(texts), 2, dtype=torch.bool)


def test_a_run_counts_the_captions_it_cuts(
    shards_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = ("train.steps=2", "train.log_every=1", "model.towers.text.max_tokens=2")
    pretrain(tiny_config(*long, shards=shards_folder / "train", out=tmp_path / "run"))
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["captions_cut"] for line in lines] == [16, 32]
    assert capsys.readouterr().out.count("captions were longer than their tower takes") == 1
