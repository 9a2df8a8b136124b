"""A model keeps its learned fusions, and retrieval joins sets of modalities by them where it is asked to."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from support.recipes import tiny_config
from torch import Tensor, nn

from mmcl.concatenated import ConcatenatedModel
from mmcl.evaluation.embed import embed_to_folder
from mmcl.evaluation.embedding_store import EmbeddedItem, EmbeddedShards, model_checksum
from mmcl.evaluation.protocols import RetrievalProtocol, retrieval_protocol
from mmcl.evaluation.run import evaluate_checkpoint, evaluate_embeddings
from mmcl.evaluation.sides import learned_fusion, sides_of, wanted_directions
from mmcl.model import MultimodalModel
from mmcl.recipe import build_model
from mmcl.training.groups import parameter_groups
from mmcl.types import ConfigError

NAME = "video+audio"
SETS = "objectives.0.pairs=[[video, text], [text, audio + video], [text+audio, video]]"


def learned_model() -> MultimodalModel:
    """Its fusions are no longer the mean."""
    torch.manual_seed(0)
    model = build_model(tiny_config(SETS, "model.fusion={hidden: 16, layers: 3}"))[0]
    for parameter in model.fusions.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.fixture(scope="module")
def model() -> MultimodalModel:
    return learned_model()


def unit_rows(count: int, seed: int = 0) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(seed)
    return {m: F.normalize(torch.randn(count, 32, generator=random), dim=1) for m in ("text", "video", "audio")}


def test_fuse_takes_towers_in_any_order_and_gives_unit_rows(model: MultimodalModel) -> None:
    assert [*model.fusions] == [NAME, "audio+text"]
    rows = unit_rows(3)
    fused = model.fuse({"audio": rows["audio"], "video": rows["video"]})
    assert fused.dtype == torch.float32 and torch.allclose(fused.norm(dim=1), torch.ones(3), atol=1e-6)
    assert torch.equal(fused, model.fuse({"video": rows["video"], "audio": rows["audio"]})) and not fused.requires_grad
    x = torch.cat([rows["video"], rows["audio"]], 1)
    first, second, last = model.fusions[NAME].mlp.linears
    added = last(F.gelu(second(F.gelu(first(x)))))
    torch.testing.assert_close(fused, F.normalize(rows["video"] + rows["audio"] + added, dim=1).detach())
    with pytest.raises(ConfigError, match=r"no learned fusion of video\+text; it has: video\+audio, audio\+text"):
        model.fuse({"video": rows["video"], "text": rows["text"]})
    with pytest.raises(ValueError, match=r"rows of video\+audio differ in shape: \(3, 32\), \(2, 32\)"):
        model.fuse({"video": rows["video"], "audio": rows["audio"][:2]})


def test_a_folder_an_export_and_its_card_keep_them(model: MultimodalModel, tmp_path: Path) -> None:
    rows = {name: unit_rows(4)[name] for name in ("video", "audio")}
    folders = (model.save_pretrained(tmp_path / "saved"), model.export(tmp_path / "exported"))
    for folder in folders:
        again = MultimodalModel.from_pretrained(folder)
        assert [*again.fusions] == [*model.fusions]
        assert torch.equal(again.fuse(rows), model.fuse(rows))
    assert f"learned fusion of: {NAME}, audio+text" in (tmp_path / "exported/README.md").read_text()
    config = json.loads((tmp_path / "saved/config.json").read_text())
    config["fusions"] = ["video+sound"]
    (tmp_path / "saved/config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"fusion video\+sound: unknown name 'sound'"):
        MultimodalModel.from_pretrained(tmp_path / "saved")
    config["fusions"] = ["video"]
    (tmp_path / "saved/config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="fusion video: needs two towers"):
        MultimodalModel.from_pretrained(tmp_path / "saved")


def test_a_folder_from_before_there_were_any_loads(model: MultimodalModel, tmp_path: Path) -> None:
    folder = model.save_pretrained(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    del config["fusions"], config["model"]["fusion"]
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    save_file({k: v for k, v in tensors.items() if not k.startswith("fusions.")}, folder / "model.safetensors")
    old = MultimodalModel.from_pretrained(folder)
    assert not old.fusions and model_checksum(old) == model_checksum(model), "kept embeddings stay good"
    with pytest.raises(ConfigError, match=r"no learned fusion of video\+audio; it has: none"):
        old.fuse({"video": torch.ones(1, 32), "audio": torch.ones(1, 32)})


def test_they_learn_at_the_rate_of_heads_and_biases_do_not_decay(model: MultimodalModel) -> None:
    groups = parameter_groups(model, 0.1)
    where = {id(p): (group["factor"], group["weight_decay"]) for group in groups for p in group["params"]}
    for name, parameter in model.fusions.named_parameters():
        assert where[id(parameter)] == (1.0, 0.0 if name.endswith("bias") else 0.1), name


def embedded(count: int) -> EmbeddedShards:
    """Two captions each; every third item is silent; the last items are copies of the first."""
    rows = unit_rows(count)
    rows = {m: torch.cat([x[:-8], x[:8]]) for m, x in rows.items()}
    heard = torch.tensor([number for number in range(count) if number % 3])
    items = tuple(EmbeddedItem(str(n), n, ("a", "b"), -1, {}) for n in range(count))
    owners = {"video": torch.arange(count), "audio": heard, "text": torch.arange(count).repeat_interleave(2)}
    texts = torch.stack([rows["text"], unit_rows(count, 1)["text"]], 1).flatten(0, 1)
    return EmbeddedShards(items, {"video": rows["video"], "audio": rows["audio"][heard], "text": texts}, owners)


def test_sides_are_what_the_model_fuses_and_equal_items_tie(model: MultimodalModel) -> None:
    count = 6146  # of which 4097 are heard: the last one is fused alone, where products are rounded otherwise
    found, directions = embedded(count), wanted_directions(["text->video+audio", "video->text+audio"], [*unit_rows(1)])
    sides = sides_of(found, np.arange(count), directions, fuse=learned_fusion(model, directions))
    heard = found.owners["audio"]
    assert sides[NAME].items.tolist() == heard.tolist()
    wanted = model.fuse({"video": found.rows["video"][heard], "audio": found.rows["audio"]})
    torch.testing.assert_close(sides[NAME].embeddings, wanted)
    mean = sides_of(found, np.arange(count), directions)[NAME].embeddings
    assert (mean * wanted).sum(1).mean() < 0.95, "it is another row than the mean"
    # items n and count − 8 + n are alike, and heard alike, as count − 8 is a multiple of 3
    place = {item: row for row, item in enumerate(sides[NAME].items.tolist())}
    for n in (1, 2, 4, 5, 7):
        rows = (sides[NAME].embeddings[place[n]], sides[NAME].embeddings[place[count - 8 + n]])
        assert torch.equal(*rows), "bit for bit"
    both = sides["text+audio"]
    assert both.items.tolist() == heard.repeat_interleave(2).tolist() and both.captions.tolist()[:4] == [0, 1, 0, 1]
    second = model.fuse({"text": found.rows["text"][heard * 2 + 1], "audio": found.rows["audio"]})
    torch.testing.assert_close(both.embeddings[1::2], second)
    silent = sides_of(found, np.array([0, 3]), directions, fuse=learned_fusion(model, directions))[NAME]
    assert silent.embeddings.shape == (0, 32)


def test_what_cannot_be_joined_so_is_one_line(model: MultimodalModel, shards_folder: Path, tmp_path: Path) -> None:
    def refused(message: str, direction: str, of: object = model) -> None:
        with pytest.raises(ConfigError, match=message):
            learned_fusion(of, wanted_directions([direction], ["text", "video", "audio"]))  # type: ignore[arg-type]

    refused(r"no learned fusion of text\+video; it has: video\+audio, audio\+text", "audio->text+video")
    refused(r"learned fusion: no direction has a set of modalities", "text->video")
    joined = ConcatenatedModel([model, model])
    refused(r"no learned fusion of video\+audio; it has: none", "text->video+audio", joined)

    folder, shards = model.save_pretrained(tmp_path / "model"), str(shards_folder / "test")
    asked = retrieval_protocol(directions=["audio->text+video"], fusion="learned")
    with pytest.raises(ConfigError, match=r"no learned fusion of text\+video"):
        evaluate_checkpoint(folder, shards, tmp_path / "report", protocol=asked, cache=tmp_path / "cache")
    assert not (tmp_path / "cache").exists(), "said before anything is embedded"
    embed_to_folder(folder, shards, tmp_path / "rows", in_process=True)
    with pytest.raises(ConfigError, match=r"learned fusion of text\+video: embeddings hold no model; give CHECKPOINT"):
        evaluate_embeddings(tmp_path / "rows", tmp_path / "report", protocol=asked)
    with pytest.raises(ConfigError, match=r"fusion: input should be 'mean' or 'learned', got 'max'"):
        retrieval_protocol(fusion="max")


def test_a_protocol_keeps_its_fingerprint_unless_it_asks_for_it() -> None:
    plain = RetrievalProtocol(name="a", directions=("text->video+audio",))
    assert plain.asked()["fusion"] == "mean"
    assert plain.fingerprint() == "7436f53859fecd5e", "older reports compare"
    assert plain.model_copy(update={"fusion": "learned"}).fingerprint() != plain.fingerprint()
