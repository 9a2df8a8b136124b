"""Models as folders: ``config.json``, ``model.safetensors`` and a card. Loading runs no code from the folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import mmcl
from mmcl.distributed.sharded import FOLDER, read_sharded
from mmcl.folders import CONFIG, model_folder
from mmcl.types import ConfigError, RunError

WEIGHTS, CARD = "model.safetensors", "README.md"

M = TypeVar("M", bound="Pretrained")


class Pretrained(nn.Module):
    """A module that can be written to a folder and read back bit for bit."""

    def description(self) -> dict[str, Any]:
        """All that is needed to build the module again, as JSON values."""
        raise NotImplementedError

    @classmethod
    def from_description(cls: type[M], description: dict[str, Any], *, where: str) -> M:
        """A freshly initialised module of this description."""
        raise NotImplementedError

    def save_pretrained(self, folder: str | Path) -> Path:
        """Writes ``config.json`` and ``model.safetensors``; returns the folder."""
        return write_model(Path(folder), self.description(), self.state_dict())

    @classmethod
    def from_pretrained(cls: type[M], folder: str | Path) -> M:
        """Reads a model folder, a checkpoint, or the newest checkpoint of a run folder; in eval mode, on the CPU.

        Raises:
            ConfigError: no such folder, not a model, or weights that do not fit its configuration.
        """
        source = model_folder(Path(folder))
        try:
            config = json.loads((source / CONFIG).read_text(encoding="utf-8"))
        except (ValueError, OSError) as error:
            raise ConfigError(f"{source / CONFIG}: cannot be read: {error}") from None
        if not isinstance(config, dict) or config.pop("format", None) != "mmcl":
            raise ConfigError(f"{source / CONFIG}: not a model of mmcl")
        config.pop("mmcl", None)
        model = cls.from_description(config, where=str(source / CONFIG))
        try:
            if not (source / WEIGHTS).exists() and (source / FOLDER).is_dir():
                read_sharded(source / FOLDER, {f"model.{k}": v for k, v in model.state_dict().items()}, alone=True)
            else:
                model.load_state_dict(load_file(source / WEIGHTS))
        except Exception as error:  # safetensors raises its own types, torch a RuntimeError: both mean a bad file
            raise ConfigError(f"{source / WEIGHTS}: {' '.join(str(error).split())[:300]}") from None
        return model.eval()


def write_model(target: Path, description: Mapping[str, Any], tensors: Mapping[str, Tensor] | None) -> Path:
    """Writes ``config.json`` and, unless None, ``model.safetensors``; returns the folder.

    Raises:
        RunError: the folder cannot be written.
    """
    try:
        target.mkdir(parents=True, exist_ok=True)
        if tensors is not None:
            save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, target / WEIGHTS)
        config = {"format": "mmcl", "mmcl": mmcl.__version__, **description}
        (target / CONFIG).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    except (OSError, SafetensorError) as error:
        words = getattr(error, "strerror", None) or error
        raise RunError(f"cannot write the model to {target}: {words}") from None
    return target


def write_card(folder: Path, facts: dict[str, str]) -> None:
    """The model's README: what is known of it; what is not is visibly blank."""
    lines = ["---", "library_name: mmcl", "license: # not stated", "---", "", "# A model trained with mmcl", ""]
    lines += [f"- {name}: {value or '—'}" for name, value in facts.items()]
    lines += [
        "",
        "```python",
        "import mmcl",
        f'model = mmcl.MultimodalModel.from_pretrained("{folder.name}")',
        'rows = model.encode_text(["a caption"])  # float32 (1, D), unit rows',
        "```",
        "",
    ]
    (folder / CARD).write_text("\n".join(lines), encoding="utf-8")
