"""Checkpoints as model folders, and single towers in the formats of other libraries."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from mmcl.card import BLANK, card_report, recipe_facts
from mmcl.config import unknown_name
from mmcl.encoders.stored import FILES, tower_files
from mmcl.model import MultimodalModel
from mmcl.onnx_format import write_onnx
from mmcl.types import ConfigError, RunError, TextSpec, VideoSpec

OPEN_CLIP, TRANSFORMERS = "open_clip:", "hf:"
CONTEXT, VOCABULARY = 77, 49408
"""of CLIP's byte pairs"""


def export_checkpoint(
    checkpoint: Path, out: Path, *, to: str = "mmcl", tower: str | None = None, report: Path | None = None
) -> Path:
    """Writes a checkpoint as a model folder with a card, or one of its towers for another library; returns the folder.

    Args:
        to: ``mmcl``; ``open_clip`` (``open_clip.create_model("local-dir:OUT")``); ``transformers``
            (``AutoModel.from_pretrained(OUT)``); ``onnx`` (``TOWER.onnx`` with outputs ``pooled`` and ``joint``).

    Raises:
        ConfigError: no such format, checkpoint, tower or report, or a tower that the format cannot hold.
        RunError: the folder cannot be written.
    """
    if to not in (*WRITERS, "mmcl"):
        raise unknown_name("--to", to, (*WRITERS, "mmcl"))
    if (tower is None) != (to == "mmcl"):
        raise ConfigError(f"--to {to} {'takes no' if tower else 'needs a'} --tower")
    if report is not None and to != "mmcl":
        raise ConfigError(f"--report: --to {to} writes no card with figures; leave it out, or write --to mmcl")
    figures = None if report is None else card_report(report)
    model = MultimodalModel.from_pretrained(checkpoint)
    if tower is None:
        return model.export(out, facts=recipe_facts(checkpoint), report=figures)
    if tower not in model.towers:
        raise unknown_name("--tower", tower, model.towers)
    try:
        WRITERS[to](model.alone(), tower, out)
    except (OSError, SafetensorError) as error:
        raise RunError(f"cannot write the model to {out}: {getattr(error, 'strerror', None) or error}") from None
    return out


def _name(model: MultimodalModel, tower: str) -> str:
    return str(getattr(model.options.towers[tower], "name", ""))


def export_open_clip(model: MultimodalModel, tower: str, out: Path) -> Path:
    """A folder that ``open_clip.create_model("local-dir:OUT")`` reads, with this tower and, where the model has it, the
    other one of the same open_clip model; else a placeholder of one random layer stands for that one.

    Raises:
        ConfigError: the tower is not one of open_clip's.
    """
    name = _name(model, tower)
    if not name.startswith(OPEN_CLIP):
        raise ConfigError(f"--to open_clip: tower {tower!r} is {name}, not one of open_clip")
    import open_clip
    from open_clip.model import CustomTextCLIP

    config = open_clip.get_model_config(name.removeprefix(OPEN_CLIP)) or {}
    towers = {"text" if isinstance(model.tower(tower).spec, TextSpec) else "visual": tower}
    for other in model.towers:
        part = "text" if isinstance(model.tower(other).spec, TextSpec) else "visual"
        if _name(model, other) == name:
            towers.setdefault(part, other)
    known = {key: config[key] for key in ("embed_dim", "quick_gelu") if key in config}
    config = {
        **known,
        "vision_cfg": {"image_size": 32, "patch_size": 32, "width": 64, "layers": 1},
        "text_cfg": {"context_length": CONTEXT, "vocab_size": VOCABULARY, "width": 64, "heads": 1, "layers": 1},
        **{
            f"{_part(part)}_cfg": _open_clip_part(model, each, config[f"{_part(part)}_cfg"])
            for part, each in towers.items()
        },
    }
    torch.manual_seed(0)
    whole = CustomTextCLIP(**config)
    tensors = whole.state_dict()
    for part, each in towers.items():
        _replace(tensors, part, model.tower(each), each)
    scale = next(
        (value for key, value in model.log_scales.items() if set(key.split("-")) == set(towers.values())), None
    )
    if scale is not None:
        tensors["logit_scale"] = scale.detach()
    _write(
        out,
        {
            "open_clip_config.json": {
                "model_cfg": {**config, "custom_text": True},
                "preprocess_cfg": _pixels(model, towers),
            }
        },
        {"open_clip_model.safetensors": tensors},
        _note(tower, model, f'open_clip.create_model("local-dir:{out.name}")', _missing(towers)),
    )
    return out


def _part(part: str) -> str:
    return "vision" if part == "visual" else part


def _missing(towers: Mapping[str, str]) -> str:
    missing = {"visual", "text"} - towers.keys()
    return f"The {missing.pop()} tower of this file is a placeholder of one random layer." if missing else ""


def _open_clip_part(model: MultimodalModel, tower: str, config: Mapping[str, Any]) -> dict[str, Any]:
    changed = {**config, **(getattr(model.options.towers[tower], "config", None) or {})}
    if "timm_model_name" in changed:
        changed["timm_model_pretrained"] = False
    return changed


def _replace(tensors: dict[str, Tensor], part: str, encoder: nn.Module, tower: str) -> None:
    """Puts a tower's weights in; batch norms that are frozen here do not count their batches."""
    library: Any = getattr(encoder, "tower", None)
    given = {f"{part}.{key}": value for key, value in library.state_dict().items()} if library is not None else {}
    wanted = {key: value for key, value in tensors.items() if key.startswith(f"{part}.")}
    lacking = {key for key in wanted.keys() - given.keys() if not key.endswith("num_batches_tracked")}
    wrong = lacking | {key for key, value in given.items() if key not in wanted or wanted[key].shape != value.shape}
    if wrong:
        raise ConfigError(
            f"--to open_clip: tower {tower!r} is not as open_clip builds it: {', '.join(sorted(wrong)[:3])}"
        )
    tensors.update(given)


def _pixels(model: MultimodalModel, towers: Mapping[str, str]) -> dict[str, Any]:
    spec = model.tower(towers["visual"]).spec if "visual" in towers else None
    if not isinstance(spec, VideoSpec):
        return {}
    mode = "squash" if spec.fit == "squash" else "shortest"
    return {
        "size": spec.size,
        "mean": list(spec.mean),
        "std": list(spec.std),
        "interpolation": "bilinear",
        "resize_mode": mode,
    }


def export_transformers(model: MultimodalModel, tower: str, out: Path) -> Path:
    """A folder that ``AutoModel.from_pretrained(OUT)`` and ``AutoTokenizer.from_pretrained(OUT)`` read.

    Raises:
        ConfigError: the tower is not one of transformers', or a part of one that ``AutoModel`` has no class for.
    """
    name, library = _name(model, tower), getattr(model.tower(tower), "model", None)
    if not name.startswith(TRANSFORMERS) or library is None:
        raise ConfigError(f"--to transformers: tower {tower!r} is {name}, not one of transformers")
    from transformers import MODEL_MAPPING

    built = MODEL_MAPPING.get(type(library.config), None)
    if built is not type(library):
        raise ConfigError(
            f"--to transformers: tower {tower!r} is a {type(library).__name__}; AutoModel reads its configuration as "
            f"{getattr(built, '__name__', 'nothing')}, of which it is only a part"
        )
    out.mkdir(parents=True, exist_ok=True)
    library.save_pretrained(out)
    for target, source in tower_files(tower, model.options.towers[tower]).items():
        place = out / target.split("/", 2)[2]
        if place.name in FILES and place.name != "config.json":
            shutil.copyfile(source, place)
    _write(out, {}, {}, _note(tower, model, f'AutoModel.from_pretrained("{out.name}")'))
    return out


def export_onnx(model: MultimodalModel, tower: str, out: Path) -> Path:
    """``TOWER.onnx`` with a free batch axis, and ``preprocessor.json``; see :func:`mmcl.onnx_format.write_onnx`."""
    out.mkdir(parents=True, exist_ok=True)
    told = write_onnx(model.tower(tower), model.heads[tower], out / f"{tower}.onnx", tower=tower)
    spec = model.preprocessing()["towers"][tower]
    _write(out, {"preprocessor.json": {**told, **spec}}, {}, _note(tower, model, f'InferenceSession("{tower}.onnx")'))
    return out


WRITERS: Mapping[str, Callable[[MultimodalModel, str, Path], Path]] = {
    "open_clip": export_open_clip,
    "transformers": export_transformers,
    "onnx": export_onnx,
}


def _note(tower: str, model: MultimodalModel, reader: str, *more: str) -> str:
    """A card for one tower: how it is read, and what of the model is not in the file."""
    own = (
        ""
        if reader.startswith("InferenceSession")
        else (
            f"The projection from this tower to the joint space ({model.joint_width} numbers) is not in this format; "
            "what it gives is the tower's own embedding."
        )
    )
    sentences = [
        f"Tower `{tower}` ({model.card_names()[tower]}) of a model trained with mmcl; read by `{reader}`.",
        own,
        *more,
    ]
    head = ["---", "tags: [mmcl]", "# license: not stated", "---", "", f"# {tower}", ""]
    return "\n".join([*head, *filter(None, sentences), "", f"- training data: {BLANK}", f"- limits: {BLANK}", ""])


def _write(out: Path, documents: Mapping[str, Any], tensors: Mapping[str, dict[str, Tensor]], card: str) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for name, values in tensors.items():
        save_file({key: value.detach().cpu().contiguous().clone() for key, value in values.items()}, out / name)
    for name, document in documents.items():
        (out / name).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    (out / "README.md").write_text(card, encoding="utf-8")
