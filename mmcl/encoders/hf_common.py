"""What towers from transformers share: their configuration, their parts, and the names of published weights."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mmcl.config import nearest, unknown_name
from mmcl.encoders.packages import place_of
from mmcl.types import ConfigError


def library_error(options: Any, error: Exception) -> ConfigError:
    """One line for what a library says against a configuration."""
    said = " ".join(str(error).split())[:300]
    return ConfigError(f"tower.config: {options.name} cannot be built with {options.config}: {said}")


def model_type(name: str) -> str:
    """What ``hf:…`` names: the type that the ``config.json`` of a folder says, or the name itself."""
    place = name.removeprefix("hf:")
    try:
        said = json.loads((place_of(place) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # no folder, not JSON, no such package: said when the tower is built
        return place
    return str(said.get("model_type", place)) if isinstance(said, dict) else place


def load_config(options: Any, folder: Path, changes: dict[str, Any], part: str = "") -> Any:
    """The configuration in a folder, or of a model type, with ``changes``; of a model of several towers the ``part``,
    such as ``text_config``. Dropout and dropped layers are 0 unless ``options.config`` sets them.

    Raises:
        ConfigError: the name is neither a folder nor a model type, or a key is not known.
    """
    from transformers import CONFIG_MAPPING, AutoConfig

    place = options.name.removeprefix("hf:")
    try:
        if (folder / "config.json").is_file():
            config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        elif place in CONFIG_MAPPING:
            config = AutoConfig.for_model(place)
        else:
            raise ConfigError(
                f"tower.name: {options.name} is neither a folder with a config.json nor a model type of "
                f"transformers{nearest(place, CONFIG_MAPPING)}; nothing is downloaded"
            )
        config = getattr(config, part, config) if part else config
        known = config.to_dict()
        for key in options.config:
            if key not in known and not hasattr(config, key):
                raise unknown_name("tower.config", key, known)
        config = type(config)(**{**known, **changes})
    except (OSError, TypeError, ValueError) as error:
        raise error if isinstance(error, ConfigError) else library_error(options, error) from error
    for key, value in config.to_dict().items():
        chance = "dropout" in key or "pdrop" in key or "layerdrop" in key
        if chance and isinstance(value, float) and key not in options.config:
            setattr(config, key, 0.0)
    return config


def stem_and_layers(model: nn.Module, layers: str) -> list[nn.Module]:
    """What has weights and comes before the list of layers that ``layers`` names, then each layer."""
    before: list[nn.Module] = []
    module = model
    for step in layers.split("."):
        for name, child in module.named_children():
            if name == step:
                break
            if any(True for _ in child.parameters()):
                before.append(child)
        module = getattr(module, step)
    assert isinstance(module, nn.ModuleList)
    return [*before, *module]


def longest_list(model: nn.Module) -> str:
    """The name of the list of layers that holds most weights."""
    lists = {name: part for name, part in model.named_modules() if isinstance(part, nn.ModuleList)}
    name: str = max(lists, key=lambda name: sum(p.numel() for p in lists[name].parameters()))
    return name


def without_prefix(tensors: dict[str, Tensor], own: Iterable[str], prefix: str) -> dict[str, Tensor]:
    """Weights of a library's whole model, by this tower's names: those of the part that the tower is, with ``prefix``.

    The part is where most of the tower's names are found; what lies beside it (heads, another tower) is left out.
    What lies in it and is not the tower's stays, for whoever loads them to refuse.
    """
    mine = {name.removeprefix(prefix) for name in own}
    if any(name in tensors for name in own):
        return tensors
    found: dict[str, int] = {}
    for name in tensors:
        steps = name.split(".")
        for cut in range(len(steps)):
            if ".".join(steps[cut:]) in mine:
                start = "".join(f"{step}." for step in steps[:cut])
                found[start] = found.get(start, 0) + 1
    if not found:
        return tensors
    # a decoder has parts of the same names as its encoder
    place = max(found, key=lambda start: (found[start], "decoder" not in start))
    return {prefix + name[len(place) :]: tensor for name, tensor in tensors.items() if name.startswith(place)}
