"""Writes configs/pretrain/README.md: every objective and method with its source, its needs and a configuration."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import yaml

import mmcl.multistage
from mmcl.catalogue import Entry, read_catalogue

FOLDER = Path(__file__).parents[1] / "configs" / "pretrain"

Configurations = dict[tuple[str, str], list[Path]]
"""by objective and method ("": any)"""


def configurations(folder: Path = FOLDER) -> Configurations:
    """The files that train each objective, those that bear its name first."""
    found: Configurations = {}
    for path in sorted(folder.glob("*.yaml")):
        for objective in yaml.safe_load(path.read_text(encoding="utf-8"))["objectives"]:
            name, method = objective["name"], objective.get("method", "")
            method = method["name"] if isinstance(method, dict) else ""
            for key in dict.fromkeys([(name, method), (name, "")]):
                if path not in found.setdefault(key, []):
                    found[key].append(path)
    return {
        key: sorted(paths, key=lambda path: (not path.stem.startswith(key[0]), path.stat().st_size))
        for key, paths in found.items()
    }


def multistage_section(folder: Path = FOLDER) -> Iterator[str]:
    """What stages are, and their configuration; any objective may be theirs."""
    about = (mmcl.multistage.__doc__ or "").strip().split("\n\n")
    yield from ("", "## Multistage", "", "\n\n".join(" ".join(part.split()) for part in about))
    yield from ("", "`python pipelines/multistage.py configs/pretrain/multistage.yaml data.shards=FOLDER` runs it.")
    yield from _files([folder / "multistage.yaml"])


def page(entries: Sequence[Entry], found: Configurations) -> str:
    """The page as Markdown."""
    names = ", ".join(f"[{entry.name}](#{entry.name})" for entry in entries)
    head = [
        "# Objectives and their configurations",
        "",
        "Written by `python tools/write_objectives_page.py` from the options' docstrings and the files here.",
        "`mmcl train configs/pretrain/NAME.yaml data.shards=FOLDER` runs one; where it names `runs/tiny`, first",
        "[tiny_cpu.yaml](tiny_cpu.yaml). `mmcl objectives NAME` explains every option. A configuration may list",
        "several objectives, each with its `weight`: a number, or a schedule such as",
        "`{start: 0, end: 1, to_step: 1000, shape: cosine}`.",
        "",
        f"{names}.",
    ]
    sections = (line for entry in entries for line in _section(entry, found))
    return "\n".join([*head, *sections, *multistage_section()]) + "\n"


def _section(entry: Entry, found: Configurations) -> Iterator[str]:
    yield from ("", f"## {entry.name}", "")
    yield from _about(entry)
    if not entry.methods:
        yield from _files(found.get((entry.name, ""), []))
    for method in entry.methods:
        yield from ("", f"### {entry.name}: {method.name}", "")
        known = replace(method, needs=method.needs or entry.needs, sources=method.sources or entry.sources)
        yield from _about(known)
        yield from _files(found.get((entry.name, method.name), []))


def _about(entry: Entry) -> Iterator[str]:
    yield "\n\n".join((entry.summary, *entry.notes))
    facts = {
        "Needs": entry.needs,
        "Source": ", ".join(f"[arXiv {number}](https://arxiv.org/abs/{number})" for number in entry.sources),
    }
    for name, fact in facts.items():
        if fact:
            yield from ("", f"**{name}:** {fact}")


def _files(paths: Sequence[Path]) -> Iterator[str]:
    if not paths:
        yield from ("", "No configuration of its own.")
        return
    first, *others = paths
    text = first.read_text(encoding="utf-8").rstrip()
    text = text.removeprefix("# yaml-language-server: $schema=../schema.json\n")
    yield from ("", f"[{first.name}]({first.name}):", "", "```yaml", text, "```")
    if others:
        yield from ("", "Also in " + ", ".join(f"[{path.name}]({path.name})" for path in others) + ".")


def main() -> None:
    path = FOLDER / "README.md"
    path.write_text(page(read_catalogue(), configurations()), encoding="utf-8")
    print(path)


if __name__ == "__main__":
    main()
