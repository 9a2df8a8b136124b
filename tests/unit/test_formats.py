"""Towers for other libraries: their own loaders give the same numbers; ONNX as onnxruntime computes it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from support.recipes import tiny_config
from torch import Tensor

from mmcl.encoders.base import Encoder
from mmcl.formats import export_checkpoint
from mmcl.model import ModelOptions, MultimodalModel
from mmcl.onnx_format import write_onnx
from mmcl.recipe import build_model
from mmcl.types import ConfigError, Features, VectorSpec

VIT = {"image_size": 32, "patch_size": 16, "width": 32, "layers": 1, "head_width": 16}
RESNET = {"image_size": 64, "layers": [1, 1, 1, 1], "width": 16, "head_width": 64}
WORDS = {"width": 32, "heads": 2, "layers": 1}


def saved(folder: Path, towers: dict[str, dict], scales: tuple[str, ...] = ()) -> tuple[MultimodalModel, Path]:
    torch.manual_seed(0)
    model = MultimodalModel(ModelOptions.model_validate({"towers": towers, "joint_width": 8})).eval()
    model.add_scales(scales)
    return model, model.save_pretrained(folder / "model")


def frames(model: MultimodalModel, tower: str, rows: int = 2) -> Tensor:
    spec = model.tower(tower).spec
    shape = (rows, spec.frames, 3, spec.size, spec.size)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def pixels(model: MultimodalModel, tower: str, x: Tensor) -> Tensor:
    spec = model.tower(tower).spec
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in (spec.mean, spec.std))
    return (x.flatten(0, 1).float() / 255 - mean) / std


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return build_model(tiny_config())[0].save_pretrained(tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"to": "onnx"}, r"--to onnx needs a --tower"),
        ({"to": "mmcl", "tower": "video"}, r"--to mmcl takes no --tower"),
        ({"to": "onnx", "tower": "vidoe"}, r"--tower: unknown name 'vidoe' \(did you mean 'video'"),
        ({"to": "open_clip", "tower": "video"}, r"tower 'video' is tiny_video, not one of open_clip"),
        ({"to": "transformers", "tower": "text"}, r"tower 'text' is tiny_text, not one of transformers"),
        ({"to": "onnx", "tower": "text", "report": Path("x")}, r"--report: --to onnx writes no card with figures"),
    ],
)
def test_what_a_format_cannot_hold_is_one_line(tiny: Path, tmp_path: Path, options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        export_checkpoint(tiny, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ViT-B-32", "RN50"])
def test_open_clip_reads_both_towers(tmp_path: Path, name: str) -> None:
    import open_clip

    own = f"open_clip:{name}"
    towers = {
        "video": {"name": own, "frames": 1, "config": VIT if name == "ViT-B-32" else RESNET},
        "text": {"name": own, "modality": "text", "config": WORDS},
    }
    model, folder = saved(tmp_path, towers, ("video-text",))
    out = export_checkpoint(folder, tmp_path / "out", to="open_clip", tower="video")
    library = open_clip.create_model(f"local-dir:{out}").eval()
    x, (ids, mask) = frames(model, "video"), model.tower("text").spec.tokenizer(["a dog", "two red clips"])
    with torch.no_grad():
        torch.testing.assert_close(library.encode_image(pixels(model, "video", x)), model.tower("video")(x).pooled)
        padded = torch.nn.functional.pad(ids, (0, 77 - ids.shape[1]))
        torch.testing.assert_close(library.encode_text(padded), model.tower("text")(ids, mask).pooled)
    assert torch.equal(library.logit_scale, model.log_scales["video-text"])
    settings = open_clip.get_model_preprocess_cfg(library)
    assert tuple(settings["mean"]) == tuple(model.tower("video").spec.mean)
    assert "placeholder" not in (out / "README.md").read_text()


@pytest.mark.slow
def test_open_clip_reads_one_tower_beside_a_placeholder(tmp_path: Path) -> None:
    import open_clip

    model, folder = saved(tmp_path, {"image": {"name": "open_clip:ViT-B-32", "frames": 1, "config": VIT}})
    out = export_checkpoint(folder, tmp_path / "out", to="open_clip", tower="image")
    library = open_clip.create_model(f"local-dir:{out}").eval()
    x = frames(model, "image")
    with torch.no_grad():
        torch.testing.assert_close(library.encode_image(pixels(model, "image", x)), model.tower("image")(x).pooled)
    assert "The text tower of this file is a placeholder" in (out / "README.md").read_text()
    (out / "open_clip_model.safetensors").rename(out / "kept")  # the weights do come from the file
    assert not torch.equal(
        open_clip.create_model(f"local-dir:{out}").visual.conv1.weight, model.tower("image").tower.conv1.weight
    )


BERT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
MAE = {**BERT, "image_size": 16, "patch_size": 8, "num_frames": 2, "tubelet_size": 2}


@pytest.mark.slow
def test_transformers_reads_its_towers(tmp_path: Path) -> None:
    from transformers import AutoModel

    towers = {
        "text": {"name": "hf:bert", "config": BERT},
        "video": {"name": "hf:videomae", "config": MAE},
        "part": {"name": "hf:t5", "config": {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}},
    }
    model, folder = saved(tmp_path, towers)
    ids, mask = model.tower("text").spec.tokenizer(["a dog", "two red clips"])
    with torch.no_grad():
        out = export_checkpoint(folder, tmp_path / "text", to="transformers", tower="text")
        library = AutoModel.from_pretrained(out).eval()
        tokens = library(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        torch.testing.assert_close(tokens[mask], model.tower("text")(ids, mask).tokens[mask])
        out = export_checkpoint(folder, tmp_path / "video", to="transformers", tower="video")
        library = AutoModel.from_pretrained(out).eval()
    left, right = library.state_dict(), model.tower("video").model.state_dict()
    assert left.keys() == right.keys() and all(torch.equal(value, right[name]) for name, value in left.items())
    with pytest.raises(ConfigError, match=r"'part' is a T5.*AutoModel reads its configuration as T5Model, of which"):
        export_checkpoint(folder, tmp_path / "part", to="transformers", tower="part")


def session(path: Path) -> object:
    import onnxruntime

    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


@pytest.mark.slow
@pytest.mark.parametrize("tower", ["video", "audio", "text"])
def test_onnxruntime_gives_the_same_on_any_batch(tiny: Path, tmp_path: Path, tower: str) -> None:
    model = MultimodalModel.from_pretrained(tiny)
    out = export_checkpoint(tiny, tmp_path / "out", to="onnx", tower=tower)
    told = json.loads((out / "preprocessor.json").read_text())
    assert told["opset"] == 18 and told["modality"] == tower
    run = session(out / f"{tower}.onnx")
    for rows in (1, 5):
        if tower == "video":
            given, own = {"video": (x := frames(model, "video", rows))}, (x, None)
        elif tower == "audio":
            given, own = {"audio": (x := torch.rand(rows, 8000) - 0.5)}, (x, None)
        else:
            own = model.tower("text").spec.tokenizer(["a dog barks at the sea and runs", "b"][:rows] * (1 + rows // 2))
            given = dict(zip(("ids", "mask"), own, strict=True))
        with torch.no_grad():
            pooled = model.tower(tower)(*own).pooled
            joint = torch.nn.functional.normalize(model.heads[tower](pooled), dim=-1)
        found = run.run(None, {name: value.numpy() for name, value in given.items()})
        for got, wanted in zip(found, (pooled, joint), strict=True):
            assert got.shape == wanted.shape and np.abs(got - wanted.numpy()).max() <= 1e-4


@pytest.mark.slow
def test_onnx_of_an_open_clip_image_tower(tmp_path: Path) -> None:
    model, folder = saved(tmp_path, {"image": {"name": "open_clip:ViT-B-32", "frames": 1, "config": VIT}})
    out = export_checkpoint(folder, tmp_path / "out", to="onnx", tower="image")
    x = frames(model, "image", 4)
    with torch.no_grad():
        wanted = model.tower("image")(x).pooled.numpy()
    assert np.abs(session(out / "image.onnx").run(None, {"video": x.numpy()})[0] - wanted).max() <= 1e-4


class Odd(Encoder):
    """A tower that has no ONNX form, or gives other numbers each time."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.spec, self.width, self.way = VectorSpec("teacher", 4), 4, way

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Features:
        if self.way == "random":
            return Features(x + torch.rand_like(x))
        return Features(torch.linalg.eigvals(x[:, :, None] * x[:, None]).real)


@pytest.mark.slow
@pytest.mark.parametrize(("way", "message"), [("none", "has no ONNX form"), ("random", "differs by .* in onnxruntime")])
def test_a_tower_that_onnx_cannot_hold_is_one_line(tmp_path: Path, way: str, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"--to onnx: tower 'odd'.*{message}") as caught:
        write_onnx(Odd(way), torch.nn.Identity(), tmp_path / "odd.onnx", tower="odd")
    assert "\n" not in str(caught.value) and not (tmp_path / "odd.onnx").exists()
