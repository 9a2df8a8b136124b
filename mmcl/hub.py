"""Models as folders: ``config.json``, ``model.safetensors``, ``preprocessor.json``, what towers need, and a card.

Loading runs no code from a folder, unpickles nothing, and reads nothing beside it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub import ModelHubMixin, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import mmcl
from mmcl.card import card_text
from mmcl.config import nearest
from mmcl.distributed.sharded import FOLDER as SHARDED
from mmcl.distributed.sharded import read_sharded
from mmcl.encoders.stored import FOLDER as TOWERS_FOLDER
from mmcl.folders import CONFIG, HUB, model_folder
from mmcl.types import ConfigError, RunError

WEIGHTS, PREPROCESSOR, CARD = "model.safetensors", "preprocessor.json", "README.md"

_CLIENT_ERRORS = tuple(each for each in HfHubHTTPError.__mro__ if each.__name__ == "HTTPError")
"""of the library that huggingface_hub speaks HTTP with: requests, then httpx, then another"""

M = TypeVar("M", bound="Pretrained")


@dataclass(frozen=True)
class ModelFiles:
    """What a model folder holds besides tensors, so that another thread can write it while the model goes on."""

    description: Mapping[str, Any]
    preprocessing: Mapping[str, Any]
    assets: Mapping[str, Path]
    card: str | None = None


class Pretrained(nn.Module, ModelHubMixin, library_name="mmcl", tags=["mmcl"]):  # type: ignore[misc,call-arg]
    """A module that can be written to a folder, read back bit for bit, and pushed to a hub."""

    _card: str | None = None
    """the card of the folder it came from"""

    def description(self) -> dict[str, Any]:
        """All that is needed to build the module again, as JSON values."""
        raise NotImplementedError

    @classmethod
    def from_description(cls: type[M], description: dict[str, Any], *, folder: Path) -> M:
        """A freshly initialised module of the ``description`` in the ``config.json`` of ``folder``."""
        raise NotImplementedError

    def preprocessing(self) -> dict[str, Any]:
        """What is done to media and text before each tower, as JSON values."""
        return {}

    def assets(self) -> dict[str, Path]:
        """Further files of the folder: path in the folder → file to copy."""
        return {}

    def told(self) -> ModelFiles:
        """What a folder of this model holds besides its tensors."""
        return ModelFiles(self.description(), self.preprocessing(), self.assets(), self._card)

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        config: Mapping[str, Any] | None = None,
        repo_id: str | None = None,
        push_to_hub: bool = False,
        model_card_kwargs: Mapping[str, Any] | None = None,
        **push_to_hub_kwargs: Any,
    ) -> Path:
        """Writes the folder and returns it. A card that is there already stays, unless ``model_card_kwargs`` say more.

        Args:
            config: not used: ``config.json`` is the model's own; the mixin hands it in.
            repo_id: of ``push_to_hub``; default: the folder's name.
            model_card_kwargs: ``facts`` and ``report``, see :func:`mmcl.card.card_text`.

        Raises:
            RunError: the folder cannot be written.
        """
        target = write_model(Path(save_directory), self.told(), self.state_dict(), card=model_card_kwargs)
        if push_to_hub:
            self.push_to_hub(repo_id or target.name, model_card_kwargs=model_card_kwargs, **push_to_hub_kwargs)
        return target

    @classmethod
    def from_pretrained(
        cls: type[M],
        pretrained_model_name_or_path: str | Path,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
    ) -> M:
        """Reads a model folder, a checkpoint, or the newest checkpoint of a run folder; in eval mode, on the CPU.

        ``hub:ORGANISATION/NAME`` asks the hub for it, and only that does; with ``HF_HUB_OFFLINE=1`` or
        ``local_files_only`` what was downloaded before is used. The further arguments are the hub's.

        Raises:
            ConfigError: no such folder, not a model, or weights or preprocessing that do not fit its configuration.
        """
        name = str(pretrained_model_name_or_path)
        if name.startswith(HUB):
            with _one_line(f"{name}: cannot be downloaded", ConfigError):
                name = snapshot_download(
                    name.removeprefix(HUB),
                    revision=revision,
                    token=token,
                    cache_dir=cache_dir,
                    force_download=force_download,
                    local_files_only=local_files_only,
                    allow_patterns=[CONFIG, WEIGHTS, PREPROCESSOR, CARD, f"{TOWERS_FOLDER}/*"],
                )
        source = model_folder(Path(name))
        config = _read_json(source / CONFIG)
        if config.pop("format", None) != "mmcl":
            raise ConfigError(f"{source / CONFIG}: not a model of mmcl")
        config.pop("mmcl", None)
        try:
            model = cls.from_description(config, folder=source)
        except ConfigError:
            raise
        except (OSError, RuntimeError, TypeError, ValueError) as error:  # of a library that builds a tower
            raise ConfigError(f"{source / CONFIG}: cannot be built: {' '.join(str(error).split())[:300]}") from None
        if (source / PREPROCESSOR).exists():  # checkpoints of version 0.1.0 before it had the file
            check_preprocessing(source / PREPROCESSOR, _read_json(source / PREPROCESSOR), model.preprocessing())
        if not (source / WEIGHTS).exists() and (source / SHARDED).is_dir():  # a run that is split over ranks
            try:
                read_sharded(source / SHARDED, {f"model.{k}": v for k, v in model.state_dict().items()}, alone=True)
            except ValueError as error:
                raise ConfigError(f"{source / SHARDED}: {error}") from None
        else:
            load_weights(model, source / WEIGHTS)
        if (source / CARD).is_file():
            model._card = (source / CARD).read_text(encoding="utf-8", errors="replace")
        return model.eval()

    def push_to_hub(self, repo_id: str, **arguments: Any) -> str:
        """Uploads what :meth:`save_pretrained` writes, as one commit; the URL of the commit.

        ``private``, ``branch``, ``create_pr``, ``commit_message``, ``token``, ``model_card_kwargs``, … are the mixin's.

        Raises:
            RunError: the hub refuses, cannot be reached, or ``HF_HUB_OFFLINE`` is set.
        """
        with _one_line(f"{repo_id}: cannot be pushed", RunError):
            url: Any = super().push_to_hub(repo_id, **arguments)
        return str(getattr(url, "commit_url", url))


def write_model(
    target: Path, files: ModelFiles, tensors: Mapping[str, Tensor] | None, *, card: Mapping[str, Any] | None = None
) -> Path:
    """Writes a model folder, without ``model.safetensors`` where ``tensors`` is None; returns the folder.

    A card that is there already stays, unless ``card`` says more (``facts`` and ``report`` of ``card_text``).

    Raises:
        RunError: the folder cannot be written.
    """
    try:
        target.mkdir(parents=True, exist_ok=True)
        for name, source in files.assets.items():
            place = target / name
            place.parent.mkdir(parents=True, exist_ok=True)
            if not (place.exists() and place.samefile(source)):
                shutil.copyfile(source, place)
        if tensors is not None:
            save_file(_storable(tensors), target / WEIGHTS)
        _write_json(target / PREPROCESSOR, files.preprocessing)
        _write_json(target / CONFIG, {"format": "mmcl", "mmcl": mmcl.__version__, **files.description})
        if card or not (target / CARD).exists():
            text = None if card else files.card
            if text is None:  # a checkpoint is written under the name `.NAME.partial`
                text = card_text(target.name.strip(".").removesuffix(".partial"), files.preprocessing, **(card or {}))
            (target / CARD).write_text(text, encoding="utf-8")
    except (OSError, SafetensorError) as error:
        words = getattr(error, "strerror", None) or error
        raise RunError(f"cannot write the model to {target}: {words}") from None
    return target


@contextmanager
def _one_line(what: str, kind: type[ConfigError] | type[RunError]) -> Iterator[None]:
    """Errors of the hub's client in one line."""
    try:
        yield
    except (*_CLIENT_ERRORS, HFValidationError, OSError) as error:
        words = [word for word in str(error).split() if word]
        raise kind(f"{what}: {' '.join(words)[:300] or type(error).__name__}") from None


def _storable(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors on the CPU, each with memory of its own: a file holds shared ones once per name."""
    seen: set[int] = set()
    found = {}
    for name, tensor in tensors.items():
        value = tensor.detach().cpu().contiguous()
        place = value.untyped_storage().data_ptr()
        found[name] = value.clone() if place in seen else value
        seen.add(place)
    return found


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
        raise ConfigError(f"{path}: cannot be read: {reason}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: must hold a mapping, not a {type(values).__name__}")
    return values


def check_preprocessing(path: Path, stored: Any, own: Any, *, at: str = "") -> None:
    """That a folder's preprocessing is what its towers, built here, ask for.

    Raises:
        ConfigError: names the first key that differs.
    """
    own = json.loads(json.dumps(own)) if not at else own
    if isinstance(stored, dict) and isinstance(own, dict):
        for key in dict.fromkeys([*own, *stored]):
            place = f"{at}.{key}" if at else str(key)
            if key not in own:
                raise ConfigError(f"{path}: {place}: unknown key{nearest(str(key), own)}; {CONFIG} asks for none such")
            if key not in stored:
                raise ConfigError(f"{path}: {place} is missing; {CONFIG} asks for {json.dumps(own[key])[:80]}")
            check_preprocessing(path, stored[key], own[key], at=place)
    elif stored != own:
        raise ConfigError(
            f"{path}: {at} is {json.dumps(stored)[:80]}, but the tower of {CONFIG} asks for {json.dumps(own)[:80]}"
        )


def load_weights(module: nn.Module, path: Path) -> None:
    """Gives a module the tensors of a safetensors file, all of them and no others, bit for bit.

    Raises:
        ConfigError: no such file, not a whole one, or a tensor that is missing, unknown, or of another shape or type.
    """
    if not path.is_file():
        raise ConfigError(f"{path}: no such file")
    try:
        with safe_open(path, framework="pt") as opened:
            found = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError, ValueError) as error:
        raise ConfigError(f"{path}: not a whole safetensors file: {' '.join(str(error).split())[:200]}") from None
    own = module.state_dict()
    for name in own:
        if name not in found:
            raise ConfigError(f"{path}: tensor {name!r} is missing{nearest(name, found.keys() - own.keys())}")
    for name, value in found.items():
        if name not in own:
            raise ConfigError(f"{path}: unknown tensor {name!r}{nearest(name, own)}")
        if value.shape != own[name].shape or value.dtype != own[name].dtype:
            raise ConfigError(
                f"{path}: tensor {name!r} is {_kind(value)}, but the model of {CONFIG} has {_kind(own[name])}"
            )
    with torch.no_grad():
        module.load_state_dict(found)


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
