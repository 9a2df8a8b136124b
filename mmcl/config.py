"""Loading a configuration: YAML, dotted overrides, one typed frozen tree, errors that name the path."""

from __future__ import annotations

import copy
import difflib
import types
import typing
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from mmcl.types import ConfigError


class Options(BaseModel):
    """Base of every part of a configuration: frozen, unknown keys refused."""

    # docstrings of options become the descriptions in configs/schema.json
    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


T = TypeVar("T", bound=Options)


def nearest(name: str, allowed: Iterable[str]) -> str:
    """`` (did you mean 'x'?)`` for the closest allowed name, or nothing."""
    close = difflib.get_close_matches(name, list(allowed), n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


def unknown_name(path: str, name: object, allowed: Iterable[str]) -> ConfigError:
    """The error for a name that is not in a table: path, value, what is allowed, the nearest."""
    names = sorted(allowed)
    return ConfigError(f"{path}: unknown name {name!r}{nearest(str(name), names)}; allowed: {', '.join(names)}")


class _UniqueKeys(yaml.SafeLoader):
    """As ``yaml.safe_load``, but a key that stands twice is a mistake; YAML would let the later one win in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key.value!r} stands twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping that a YAML file holds."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"config {path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"config {path}: cannot be read: {error}") from None
    try:
        tree = _UniqueKeys(text).get_single_data()
    except yaml.YAMLError as error:
        raise ConfigError(f"config {path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"config {path}: must hold a mapping of keys, got {type(tree).__name__}")
    return tree


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Sets one ``dotted.path=value`` in ``tree``; the value is YAML, a number in the path indexes a list."""
    path, sign, text = override.partition("=")
    if not sign or not path:
        raise ConfigError(f"override {override!r}: must look like dotted.path=value, e.g. train.steps=50")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f"override {override!r}: the value is not valid YAML") from None
    *parents, last = path.split(".")
    node: Any = tree
    for depth, part in enumerate(parents):
        where = ".".join(parents[: depth + 1])
        if isinstance(node, list):
            node = node[_list_index(node, part, override, where)]
        else:
            if node.get(part) is None:
                node[part] = {}
            node = node[part]
        if not isinstance(node, (dict, list)):
            raise ConfigError(f"override {override!r}: {where} is a single value, not a group of keys")
    if isinstance(node, list):
        node[_list_index(node, last, override, path)] = value
    else:
        node[last] = value


def _list_index(items: list[Any], part: str, override: str, where: str) -> int:
    if not part.isdigit() or int(part) >= len(items):
        raise ConfigError(f"override {override!r}: {where} must be a number below {len(items)}")
    return int(part)


def build(options: type[T], tree: dict[str, Any], overrides: Sequence[str] = (), *, where: str = "config") -> T:
    """Checks ``tree`` with ``overrides`` applied against ``options``; :class:`ConfigError` lists every mistake."""
    tree = copy.deepcopy(tree)
    for override in overrides:
        apply_override(tree, override)
    try:
        return options.model_validate(tree)
    except ValidationError as error:
        issues = error.errors(include_url=False)
        # pydantic also calls a list too short whose items it could not read
        issues = [issue for issue in issues if issue["type"] != "too_short" or not _has_deeper(issue, issues)]
        lines = [_explain(options, tree, issue) for issue in issues]
        raise ConfigError(f"{where}: " + "; ".join(dict.fromkeys(lines))) from None


def _has_deeper(issue: Any, issues: Sequence[Any]) -> bool:
    place = issue["loc"]
    return any(other["loc"][: len(place)] == place and len(other["loc"]) > len(place) for other in issues)


def _explain(root: type[BaseModel], tree: dict[str, Any], issue: Any) -> str:
    """One sentence for one mistake: path, value, what is allowed, and the nearest name."""
    location = [str(part) for part in issue["loc"]]
    kind, value = issue["type"], issue["input"]
    path = ".".join(_without_tags(tree, issue["loc"], keep_last=kind == "missing"))
    if kind == "extra_forbidden":
        allowed = sorted(_fields_at(root, issue["loc"][:-1]))
        return f"{path}: unknown key{nearest(location[-1], allowed)}; allowed: {', '.join(allowed) or 'none'}"
    if kind == "missing":
        return f"{path}: missing"
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        context = issue.get("ctx", {})
        tags = [tag.strip().strip("'") for tag in str(context.get("expected_tags", "")).split(",") if tag.strip()]
        if not isinstance(value, dict) or "name" not in value:
            return f"{path}.name: missing, got {value!r}" + (f"; allowed: {', '.join(tags)}" if tags else "")
        given = value["name"]
        return f"{path}.name: unknown name {given!r}{nearest(str(given), tags)}; allowed: {', '.join(tags)}"
    if kind in ("tuple_type", "list_type"):
        return f"{path}: must be a list, got {_shown(value)}"
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        return f"{path}: must be a mapping of keys, got {_shown(value)}"
    if kind == "too_short":
        context = issue["ctx"]
        few = f"only {context['actual_length']}" if context["actual_length"] else "empty"
        return f"{path}: {few}; at least {context['min_length']} needed"
    message = issue["msg"][0].lower() + issue["msg"][1:]
    return f"{path}: {message.removeprefix('value error, ')}, got {_shown(value)}"


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _without_tags(node: Any, location: Sequence[int | str], *, keep_last: bool) -> list[str]:
    """A location without the tags that pydantic adds for unions: they stand nowhere in what the user wrote.

    ``keep_last``: the last part is a key that is not there.
    """
    path = []
    for depth, part in enumerate(location):
        inside = part in node if isinstance(node, dict) else isinstance(node, list) and part in range(len(node))
        if inside or (keep_last and depth == len(location) - 1):
            path.append(str(part))
        if inside:
            node = node[part]
    return path


def _fields_at(model: Any, location: Sequence[int | str]) -> set[str]:
    """The keys allowed at a location of a pydantic error, walking through lists, mappings and unions."""
    models = _models_in(model)
    for part in location:
        deeper: list[type[BaseModel]] = []
        for candidate in models:
            field = candidate.model_fields.get(str(part))
            if field is not None:
                deeper += _models_in(field.annotation)
        # a number, a mapping's key or a union's tag names no field: stay where we are
        named = [m for m in models if part in (m.__name__, _tag_of(m))]
        models = deeper or named or models
    return {name for candidate in models for name in candidate.model_fields}


def _tag_of(model: type[BaseModel]) -> str | None:
    field = model.model_fields.get("name")
    arguments = typing.get_args(field.annotation) if field is not None else ()
    return str(arguments[0]) if arguments else None


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        return [annotation] if issubclass(annotation, BaseModel) else []
    return [model for argument in typing.get_args(annotation) for model in _models_in(argument)]


def to_yaml(options: Options) -> str:
    """The resolved configuration as YAML, keys in the order in which they are declared."""
    return yaml.safe_dump(options.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)
