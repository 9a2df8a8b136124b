"""What objectives there are, read from ``configs/schema.json``: their options, needs and sources, without torch.

A docstring of an objective's options begins with what it is; a paragraph ``Needs: …`` says what it asks of towers and
data; what else it says, e.g. where it differs from the authors' code, are notes; arXiv numbers are its sources.
"""

from __future__ import annotations

import difflib
import json
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mmcl.shipped import shipped
from mmcl.types import ConfigError

WIDTH = 80
_TOWERS = ("tower", "towers", "pairs", "student", "teacher", "teachers", "other")
"""options that name towers"""


@dataclass(frozen=True, slots=True)
class Option:
    """One key of an objective's part of a configuration."""

    name: str
    kind: str
    default: str
    """as it would stand in a file; ``required``: there is none"""
    meaning: str


@dataclass(frozen=True, slots=True)
class Entry:
    """An objective, or one of its methods."""

    name: str
    summary: str
    notes: tuple[str, ...]
    """further paragraphs"""
    needs: str
    sources: tuple[str, ...]
    """arXiv numbers"""
    options: tuple[Option, ...]
    methods: tuple[Entry, ...] = ()


def read_catalogue(schema: Mapping[str, Any] | None = None) -> tuple[Entry, ...]:
    """All objectives by name; ``schema``: that of a configuration file, by default the shipped one."""
    whole = json.loads(shipped("configs/schema.json").read_text(encoding="utf-8")) if schema is None else schema
    definitions = whole["$defs"]
    listed = whole["properties"]["objectives"]["items"]["discriminator"]["mapping"]
    return tuple(_entry(name, _resolve(ref, definitions), definitions) for name, ref in sorted(listed.items()))


def find_entry(name: str, entries: Sequence[Entry]) -> Entry:
    """The objective of that name, or ``OBJECTIVE.METHOD``.

    Raises:
        ConfigError: there is none; names the nearest.
    """
    named = {entry.name: entry for entry in entries}
    named |= {f"{entry.name}.{method.name}": method for entry in entries for method in entry.methods}
    if name not in named:
        close = difflib.get_close_matches(name, named, n=1)
        near = f" (did you mean {close[0]!r}?)" if close else ""
        raise ConfigError(f"no objective {name!r}{near}; there are: {', '.join(entry.name for entry in entries)}")
    return named[name]


def overview(entries: Sequence[Entry]) -> str:
    """All objectives, at most 80 columns wide."""
    return "\n\n".join("\n".join(_head(entry, brief=True)) for entry in entries)


def detail(entry: Entry) -> str:
    """One objective with the meaning of its options and methods, at most 80 columns wide."""
    lines = [*_head(entry), "", *_options(entry)]
    for method in entry.methods:
        lines += ["", *_head(method, title=f"method {method.name}"), "", *_options(method)]
    return "\n".join(lines)


def _entry(name: str, definition: Mapping[str, Any], definitions: Mapping[str, Any]) -> Entry:
    text = str(definition.get("description", ""))
    paragraphs = [" ".join(part.split()).replace("``", "`") for part in text.split("\n\n")]
    told = [part for part in paragraphs if part.startswith("Needs: ")]
    required = definition.get("required", ())
    options: list[Option] = []
    methods: list[Entry] = []
    for key, value in definition["properties"].items():
        if key == "name":
            continue
        # a default that a function makes stands in no schema: all of them are empty mappings
        default = "required" if key in required else json.dumps(value.get("default", {}), ensure_ascii=False)
        meaning = " ".join(str(value.get("description", "")).split()).replace("``", "`")
        options.append(Option(key, _kind(value, definitions), default.replace('"', ""), meaning))
        mapping = value.get("discriminator", {}).get("mapping", {})
        methods += [_entry(method, _resolve(ref, definitions), definitions) for method, ref in mapping.items()]
    places = [option.name for option in options if option.name in _TOWERS]
    return Entry(
        name,
        paragraphs[0],
        tuple(part for part in paragraphs[1:] if part not in told),
        told[0].removeprefix("Needs: ") if told else (f"towers, as {', '.join(places)} say" if places else ""),
        tuple(dict.fromkeys(re.findall(r"\b\d{4}\.\d{5}\b", text))),
        tuple(options),
        _with_meanings(methods),
    )


def _with_meanings(methods: Sequence[Entry]) -> tuple[Entry, ...]:
    """A method that only changes the default of a shared option has no docstring of its own for it."""
    meanings = {option.name: option.meaning for method in methods for option in method.options if option.meaning}
    return tuple(
        replace(
            method, options=tuple(replace(o, meaning=o.meaning or meanings.get(o.name, "")) for o in method.options)
        )
        for method in methods
    )


def _resolve(ref: str, definitions: Mapping[str, Any]) -> Mapping[str, Any]:
    found: Mapping[str, Any] = definitions[ref.rpartition("/")[2]]
    return found


def _kind(value: Mapping[str, Any], definitions: Mapping[str, Any]) -> str:
    """What may stand there, in words."""
    if "$ref" in value:
        return "{" + ", ".join(_resolve(value["$ref"], definitions)["properties"]) + "}"
    if "discriminator" in value:
        return "{name: …}"
    for union in ("anyOf", "oneOf"):
        if union in value:
            return " or ".join(_kind(part, definitions) for part in value[union])
    if "enum" in value:
        return " | ".join(map(str, value["enum"]))
    if value.get("type") == "array":
        if "prefixItems" in value:
            return "[" + ", ".join(_kind(part, definitions) for part in value["prefixItems"]) + "]"
        return "list of " + _kind(value["items"], definitions)
    if value.get("type") == "object":
        return "name: " + _kind(value["additionalProperties"], definitions)
    names = {"integer": "whole number", "string": "text", "boolean": "true | false"}
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    limits = [f"{sign} {value[key]}" for key, sign in signs.items() if key in value]
    kind = str(value.get("type", "anything"))
    return " ".join([names.get(kind, kind), *limits])


def _head(entry: Entry, *, title: str = "", brief: bool = False) -> list[str]:
    lines = [title or entry.name, *_wrap(entry.summary, "  ")]
    if not brief:
        for note in entry.notes:
            lines += _wrap(note, "  ")
    facts = {"needs": entry.needs, "source": ", ".join(f"arXiv {number}" for number in entry.sources)}
    if brief:
        facts["methods"] = ", ".join(method.name for method in entry.methods)
        facts["options"] = ", ".join(f"{option.name} ({option.default})" for option in entry.options)
    for name, fact in facts.items():
        lines += _wrap(fact, f"  {name:9}", " " * 11) if fact else []
    return lines


def _options(entry: Entry) -> list[str]:
    lines = []
    for option in entry.options:
        default = "required" if option.default == "required" else f"default {option.default}"
        lines += [*_wrap(f"{option.name}: {option.kind}; {default}", "  ", "      ")]
        lines += _wrap(option.meaning, "      ") if option.meaning else []
    return lines


def _wrap(text: str, first: str, rest: str | None = None) -> list[str]:
    indent = first if rest is None else rest
    return textwrap.wrap(text, WIDTH, initial_indent=first, subsequent_indent=indent, break_on_hyphens=False)
