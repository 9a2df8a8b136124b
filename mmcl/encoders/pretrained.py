"""First weights of a tower: from a file, a folder, an installed package, a hub, or a function. Nothing is unpickled."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from mmcl.config import nearest
from mmcl.encoders.base import Encoder
from mmcl.encoders.lora import is_update, plain_name
from mmcl.folders import CONFIG, model_folder
from mmcl.types import ConfigError

Source: TypeAlias = str | Callable[[], Mapping[str, Tensor]]
"""what ``pretrained`` says, or, from Python, a function that gives named tensors"""

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
USUAL = ("model", "open_clip_model", "open_clip_pytorch_model", "pytorch_model", "diffusion_pytorch_model")
"""what libraries call the file of weights in a folder"""
NESTS = ("state_dict", "model", "model_state_dict", "module", "net")
"""keys under which training scripts put the weights"""
SAID_AT_MOST = 4


def load_pretrained(encoder: Encoder, head: nn.Module, source: Source, *, tower: str, path: str) -> str:
    """Copies what ``source`` holds into a tower, and into its head where that comes with it and has the same shape.

    Args:
        encoder, head: of the tower.
        source: see :class:`~mmcl.encoders.options.TowerCommon`.
        tower: its name, by which it is looked for in models of ours.
        path: the option's place in the configuration.

    Returns:
        One line: how many tensors were loaded, which were left as they were and which had no use.

    Raises:
        ConfigError: nothing there, unreadable, of another shape, or no tensor of it belongs to this tower; names
            ``path``, the place and the nearest name.
    """
    where = source if isinstance(source, str) else getattr(source, "__name__", "a function")
    try:
        tensors, exact = read(source, tower)
        if exact:
            _copy_head(head, {k.removeprefix("heads."): v for k, v in tensors.items() if k.startswith("heads.")})
            tensors = {k: v for k, v in tensors.items() if not k.startswith("heads.")}
        else:
            tensors = encoder.foreign(tensors)
        return f"{path}: {where}: {_copy(encoder, tensors, exact=exact)}"
    except ConfigError as error:
        text = str(error).removeprefix("tower.pretrained: ")
        raise ConfigError(f"{path}: {text if where in text else f'{where}: {text}'}") from None


def read(source: Source, tower: str) -> tuple[dict[str, Tensor], bool]:
    """Named tensors, and whether they are those of a tower of ours (then those of its head begin with ``heads.``)."""
    if callable(source):
        return dict(source()), False
    kind, colon, name = source.partition(":")
    if colon and kind == "package":
        from mmcl.encoders import packages

        return dict(packages.load(name)), False
    if colon and kind == "hub":
        return _read_folder(_downloaded(name), tower)
    place = Path(source).expanduser()
    if place.is_dir():
        return _read_folder(place, tower)
    if place.is_file():
        return _read_file(place), False
    if colon and len(kind) > 1 and "/" not in kind:
        raise ConfigError(
            f"no file, no folder, and {kind!r} is not one of package, hub{nearest(kind, ('package', 'hub'))}"
        )
    there = [p.name for p in place.parent.iterdir()] if place.parent.is_dir() else []
    raise ConfigError(f"no such folder or file{nearest(place.name, there)}")


def _read_folder(folder: Path, tower: str) -> tuple[dict[str, Tensor], bool]:
    if _is_ours(folder):
        return _of_our_tower(model_folder(folder) / "model.safetensors", tower), True
    for suffix in SUFFIXES:
        index = [
            folder / f"{stem}{suffix}.index.json" for stem in USUAL if (folder / f"{stem}{suffix}.index.json").is_file()
        ]
        if index:
            return _read_parts(index[0]), False
        files = sorted(folder.glob(f"*{suffix}"))
        usual = [file for stem in USUAL for file in files if file.stem == stem]
        if not usual and len(files) > 1:
            raise ConfigError(f"which of {', '.join(file.name for file in files)}? Name the file")
        if files:
            return _read_file((usual or files)[0]), False
    raise ConfigError(
        f"neither a model, a checkpoint, nor a run folder with one, and no file of weights ({', '.join(SUFFIXES)})"
    )


def _is_ours(folder: Path) -> bool:
    try:
        config = json.loads((model_folder(folder) / CONFIG).read_text(encoding="utf-8"))
    except (ConfigError, OSError, ValueError):
        return False
    return isinstance(config, dict) and config.get("format") == "mmcl"


def _of_our_tower(file: Path, tower: str) -> dict[str, Tensor]:
    tensors = _read_file(file)
    found = {
        name.removeprefix(f"towers.{tower}."): t for name, t in tensors.items() if name.startswith(f"towers.{tower}.")
    }
    if not found:
        names = list(dict.fromkeys(name.split(".")[1] for name in tensors if name.startswith("towers.")))
        raise ConfigError(f"has no tower {tower!r}{nearest(tower, names)}; it has: {', '.join(names) or 'none'}")
    if any(is_update(name) for name in found):
        raise ConfigError(f"tower {tower!r} of it holds LoRA updates beside its weights: export it, which merges them")
    head = f"heads.{tower}."
    return found | {f"heads.{name.removeprefix(head)}": t for name, t in tensors.items() if name.startswith(head)}


def _read_parts(index: Path) -> dict[str, Tensor]:
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise ConfigError(f"{index.name}: not an index of weights") from None
    tensors: dict[str, Tensor] = {}
    for name in sorted(names):
        if Path(name).name != name or not (index.parent / name).is_file():
            raise ConfigError(f"{index.name} names {name!r}, which is not in the folder")
        tensors |= _read_file(index.parent / name)
    return tensors


def _read_file(file: Path) -> dict[str, Tensor]:
    """Tensors of a file; wrappers of training scripts round them are taken off."""
    if file.suffix == ".safetensors":
        try:
            return load_file(file)
        except (SafetensorError, OSError) as error:
            raise ConfigError(
                f"{file.name}: missing, truncated or not a safetensors file: {_one_line(error)}"
            ) from None
    if file.suffix not in SUFFIXES:
        raise ConfigError(
            f"{file.name}: {file.suffix or 'a file without a suffix'} is not one of {', '.join(SUFFIXES)}"
        )
    try:
        return _unwrapped(torch.load(file, map_location="cpu", weights_only=True))
    except pickle.UnpicklingError:
        raise ConfigError(f"{file.name}: damaged, or holds more than tensors, which is not unpickled") from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, AttributeError) as error:
        raise ConfigError(f"{file.name}: truncated or not a file of torch: {_one_line(error)}") from None


def _unwrapped(tree: Any) -> dict[str, Tensor]:
    for nest in NESTS:
        if isinstance(tree, Mapping) and isinstance(tree.get(nest), Mapping):
            tree = tree[nest]
    tensors = {str(k): v for k, v in tree.items() if isinstance(v, Tensor)} if isinstance(tree, Mapping) else {}
    if not tensors:
        raise ConfigError("holds no named tensors")
    while all(name.startswith("module.") for name in tensors):
        tensors = {name.removeprefix("module."): value for name, value in tensors.items()}
    return tensors


def _downloaded(name: str) -> Path:
    """The folder of a hub's model in the local cache; ``HF_HUB_OFFLINE=1`` asks nobody."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise ConfigError("a hub's model is named ORGANISATION/NAME")
    try:
        folder = Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors"]))
        if not any(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(name, allow_patterns=["*.json", "*.bin", "*.pt", "*.pth"]))
    except (OSError, HFValidationError) as error:  # all others of it are OSErrors
        raise ConfigError(f"not in the cache and not to be had: {_one_line(error)}") from None
    return folder


def _copy(encoder: Encoder, tensors: Mapping[str, Tensor], *, exact: bool) -> str:
    """Copies by name; a line about what was left. Where the tensors are a tower of ours, all must be there."""
    own = {plain_name(n): t for n, t in encoder.state_dict(keep_vars=True).items() if not is_update(n)}
    for name in own.keys() & tensors.keys():
        if own[name].shape != tensors[name].shape:
            shapes = " × ".join(map(str, tensors[name].shape)), " × ".join(map(str, own[name].shape))
            raise ConfigError(
                f"does not fit: {name} is {shapes[0] or 'a number'} there, {shapes[1] or 'a number'} here"
            )
    left = [name for name in own if name not in tensors]
    unused = [name for name in tensors if name not in own and not name.endswith("num_batches_tracked")]
    if len(left) == len(own) or (exact and (left or unused)):
        name = (left or unused)[0]
        others = tensors if left else own
        raise ConfigError(
            f"does not fit: nothing there for {name}{nearest(name, others)}"
            if left
            else f"does not fit: no {name} here"
        )
    with torch.no_grad():
        for name in own.keys() - set(left):
            own[name].copy_(tensors[name])
    parts = [f"{len(own) - len(left)} of {len(own)} tensors loaded"]
    parts += [f"left as they were: {_some(left)}"] if left else []
    parts += [f"{len(unused)} not used: {_some(unused)}"] if unused else []
    return "; ".join(parts)


def _copy_head(head: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    own = head.state_dict()
    if {k: v.shape for k, v in own.items()} == {k: v.shape for k, v in tensors.items()}:
        head.load_state_dict(dict(tensors))


def _some(names: list[str]) -> str:
    more = f" and {len(names) - SAID_AT_MOST} more" if len(names) > SAID_AT_MOST else ""
    return ", ".join(names[:SAID_AT_MOST]) + more


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
