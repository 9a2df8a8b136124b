"""First weights: every kind of place, what is left and what has no use, mistakes in one line, and never twice."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.recipes import tiny_config
from torch import Tensor

from mmcl.encoders.build import build_encoder
from mmcl.encoders.options import LoraOptions
from mmcl.encoders.packages import PACKAGES
from mmcl.encoders.text import TinyText, TinyTextOptions
from mmcl.model import MultimodalModel
from mmcl.recipe import build_model
from mmcl.training.launch import pretrain
from mmcl.types import ConfigError

OVERRIDE = "model.towers.text.pretrained="
HUB = "models--someone--words/snapshots/0123"


@pytest.fixture(scope="module")
def wanted() -> dict[str, Tensor]:
    """Weights of the text tower of the tiny model, of another seed than the tests'."""
    torch.manual_seed(77)
    return build_encoder(tiny_config().model.towers["text"]).state_dict()


def load(place: Path | str) -> MultimodalModel:
    torch.manual_seed(1)
    return build_model(tiny_config(f"{OVERRIDE}{place}"))[0]


def as_safetensors(tensors: dict[str, Tensor], folder: Path) -> str:
    save_file(tensors, folder / "weights.safetensors")
    return "weights.safetensors"


def as_nested_file(tensors: dict[str, Tensor], folder: Path) -> str:
    wrapped = {f"module.{name}": tensor for name, tensor in tensors.items()}
    torch.save({"epoch": 3, "state_dict": {"model": wrapped}}, folder / "last.pth")
    return "last.pth"


def as_folder(tensors: dict[str, Tensor], folder: Path) -> str:
    save_file(tensors, folder / "model.safetensors")
    save_file({}, folder / "other.safetensors")
    return ""


def as_open_clip_folder(tensors: dict[str, Tensor], folder: Path) -> str:
    torch.save(tensors, folder / "open_clip_pytorch_model.bin")
    return ""


def as_parts(tensors: dict[str, Tensor], folder: Path) -> str:
    names = sorted(tensors)
    files = {"model-1.safetensors": names[:3], "model-2.safetensors": names[3:]}
    for file, own in files.items():
        save_file({name: tensors[name] for name in own}, folder / file)
    index = {"weight_map": {name: file for file, own in files.items() for name in own}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return ""


@pytest.mark.parametrize("write", [as_safetensors, as_nested_file, as_folder, as_open_clip_folder, as_parts])
def test_every_kind_of_place(
    write: Callable[[dict[str, Tensor], Path], str], wanted: dict[str, Tensor], tmp_path: Path
) -> None:
    place = tmp_path / write(wanted, tmp_path)
    model = load(place)
    for name, tensor in model.towers["text"].state_dict().items():
        assert torch.equal(tensor, wanted[name]), name
    count = len(wanted)
    assert model.loaded == [f"model.towers.text.pretrained: {place}: {count} of {count} tensors loaded"]


def test_what_was_left_and_what_had_no_use_is_said(wanted: dict[str, Tensor], tmp_path: Path) -> None:
    part = {name: tensor for name, tensor in wanted.items() if not name.startswith("norm.")}
    save_file(part | {"head.weight": torch.ones(2)}, tmp_path / "part.safetensors")
    (line,) = load(tmp_path / "part.safetensors").loaded
    assert line.endswith(f"{len(part)} of {len(wanted)} tensors loaded; left as they were: norm.weight, norm.bias; "
                         "1 not used: head.weight")  # fmt: skip


def test_makers_names_are_the_towers_own_after_foreign(wanted: dict[str, Tensor], tmp_path: Path,
                                                       monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    save_file({f"text_model.{name}": tensor for name, tensor in wanted.items()}, tmp_path / "a.safetensors")
    with pytest.raises(ConfigError, match=r"does not fit: nothing there for embedding\.weight"):
        load(tmp_path / "a.safetensors")
    strip = {"foreign": lambda self, tensors: {k.removeprefix("text_model."): v for k, v in tensors.items()}}
    monkeypatch.setattr(TinyText, "foreign", strip["foreign"])
    assert torch.equal(load(tmp_path / "a.safetensors").towers["text"].state_dict()["norm.bias"], wanted["norm.bias"])


def test_a_function_gives_weights(wanted: dict[str, Tensor]) -> None:
    model, _ = build_model(tiny_config(f"{OVERRIDE}nowhere.pt"), pretrained={"text": lambda: wanted})
    assert torch.equal(model.towers["text"].state_dict()["embedding.weight"], wanted["embedding.weight"])
    with pytest.raises(ConfigError, match=r"pretrained: unknown name 'txet' \(did you mean 'text'\?\)"):
        build_model(tiny_config(), pretrained={"txet": lambda: wanted})


@pytest.mark.slow
def test_lora_surrounds_layers_and_they_are_found_all_the_same() -> None:
    options = {"name": "hf:bert", "config": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}}
    config = tiny_config(f"model.towers.text={json.dumps({**options, 'lora': {'rank': 2}})}")
    plain, _ = build_model(tiny_config(f"model.towers.text={json.dumps(options)}"))
    tensors = plain.towers["text"].state_dict()
    adapted, _ = build_model(config, pretrained={"text": lambda: tensors})
    (line,) = adapted.loaded
    assert f"{len(tensors)} of {len(tensors)} tensors loaded" in line
    assert LoraOptions(rank=2) == adapted.options.towers["text"].lora  # type: ignore[union-attr]


def test_the_hub_is_asked_by_name_and_not_when_offline(
    wanted: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match=r"model\.towers\.text\.pretrained: hub:someone/words: not in the cache"):
        load("hub:someone/words")
    (tmp_path / HUB).mkdir(parents=True)
    (tmp_path / "models--someone--words/refs").mkdir()
    (tmp_path / "models--someone--words/refs/main").write_text("0123")
    save_file(wanted, tmp_path / HUB / "model.safetensors")
    assert torch.equal(load("hub:someone/words").towers["text"].state_dict()["norm.bias"], wanted["norm.bias"])
    with pytest.raises(ConfigError, match="ORGANISATION/NAME"):
        load("hub:words")


class Evil:
    """What a file could do if it were unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("evil",)


def test_mistakes_are_one_line_that_names_key_and_place(
    wanted: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save_file(wanted, "good.safetensors")
    whole = Path("good.safetensors").read_bytes()
    Path("cut.safetensors").write_bytes(whole[:-50])
    torch.save(wanted, "good.pt")
    Path("cut.pt").write_bytes(Path("good.pt").read_bytes()[:-500])
    Path("evil.pt").write_bytes(pickle.dumps({"a": Evil()}, protocol=2))
    torch.save({"epoch": 3}, "empty.pt")
    save_file(wanted | {"norm.bias": torch.zeros(7)}, "shape.safetensors")
    save_file({"nrom.bias": torch.zeros(7), "layers.0.norm.wieght": torch.zeros(7)}, "names.safetensors")
    Path("notes.txt").write_text("weights")
    Path("two").mkdir()
    save_file({}, "two/a.safetensors")
    save_file({}, "two/b.safetensors")
    Path("none").mkdir()
    messages = {
        "god.safetensors": "no such folder or file (did you mean 'good.safetensors'?)",
        "cut.safetensors": "cut.safetensors: missing, truncated or not",
        "cut.pt": "cut.pt: truncated or not",
        "evil.pt": "not unpickled",
        "empty.pt": "holds no named tensors",
        "shape.safetensors": "does not fit: norm.bias is 7 there, 32 here",
        "names.safetensors": "nothing there for embedding.weight",
        "notes.txt": ".txt is not one of .safetensors, .pth, .pt, .bin",
        "two": "which of a.safetensors, b.safetensors? Name the file",
        "none": "neither a model, a checkpoint, nor a run folder",
        "package:minilmm": "unknown name 'package:minilmm' (did you mean 'package:minilm'?)",
        "packge:minilm": "did you mean 'package'?",
    }
    for place, message in messages.items():
        with pytest.raises(ConfigError) as caught:
            load(place)
        text = str(caught.value)
        assert text.startswith("model.towers.text.pretrained: ") and place in text, text
        assert message in text and "\n" not in text, text
    assert not Path("evil").exists()


def test_every_package_of_the_table_is_read_by_its_name() -> None:
    config = tiny_config(f"{OVERRIDE}package:minilm")
    assert "minilm" in PACKAGES
    with pytest.raises(ConfigError, match=r"package:minilm: does not fit"):
        build_model(config)  # its weights are read, and are not a tiny tower's


def test_nothing_is_loaded_again_on_resume_nor_from_a_folder(
    wanted: dict[str, Tensor], shards_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "first.safetensors"
    save_file(wanted, file)
    places = {"shards": shards_folder / "train", "out": tmp_path / "run"}
    pretrain(tiny_config(f"{OVERRIDE}{file}", "train.steps=1", **places))
    assert f"{file}: {len(wanted)} of" in capsys.readouterr().out
    file.unlink()
    pretrain(tiny_config(f"{OVERRIDE}{file}", "train.steps=2", **places), resume="auto", allow=["train.steps"])
    assert MultimodalModel.from_pretrained(tmp_path / "run").options.towers["text"] == TinyTextOptions(
        width=32, depth=1
    )
    exported = MultimodalModel.from_pretrained(MultimodalModel.from_pretrained(tmp_path / "run").export(tmp_path / "e"))
    assert exported.options.towers["text"] == TinyTextOptions(width=32, depth=1)
