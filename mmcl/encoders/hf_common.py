"""What towers from transformers share: their configuration, their parts, and the names of published weights."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
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


def by_own_names(
    tensors: dict[str, Tensor], tower: nn.Module, library: Any, config: Any, part: str = ""
) -> dict[str, Tensor]:
    """Published weights by the names of ``tower``, whose ``model`` is ``part`` of a model of the class ``library``.

    The library's own loader finds them: it knows older names, and the models of other tasks that they come from. Names
    that are the tower's already stay; what neither knows keeps its name, for whoever loads them to tell.

    Raises:
        ConfigError: a tensor has another shape than the configuration says.
    """
    own = tower.state_dict()
    if own.keys() & tensors.keys():
        return tensors
    with _quiet():
        model, said = library.from_pretrained(
            None, config=config, state_dict=dict(tensors), output_loading_info=True, ignore_mismatched_sizes=True
        )
    for name, there, here in sorted(said["mismatched_keys"]):
        raise ConfigError(f"does not fit: {name} is {tuple(there)} there, {tuple(here)} here")
    found = {f"model.{n[len(part) :]}": t for n, t in model.state_dict().items() if n.startswith(part)}
    missing = {f"model.{name[len(part) :]}" for name in said["missing_keys"]}
    named = {name: tensor for name, tensor in found.items() if name in own and name not in missing}
    return {**named, **{name: tensors[name] for name in said["unexpected_keys"] if name in tensors}}


@contextmanager
def _quiet() -> Iterator[None]:
    """No table and no progress bar of transformers: what was loaded is told in one line, by whoever loads."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
