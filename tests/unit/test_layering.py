"""Imports go one way: a module imports only from the layers below its own."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

LAYERS = [
    {"types", "specs", "hashing", "progress"},
    {"config", "folders", "shipped", "media", "shards", "losses", "layers", "distributed"},
    {"data", "encoders", "objectives"},
    {"card", "concatenated", "encode", "formats", "hub", "model", "onnx_format", "recipe"},
    {"evaluation", "search", "search_faiss", "serve", "training"},
    {"catalogue", "cli", "cli_classify", "cli_options", "demo", "multistage", "__main__"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}

# neighbours on one level that may be imported, and why
NEIGHBOURS = {
    ("media", "config"),  # `unknown_name` for errors
    ("shards", "config"),
    ("shards", "media"),  # preparing shards decodes and encodes media
    ("distributed", "layers"),
    ("hub", "card"),
    ("concatenated", "encode"),
    ("concatenated", "model"),
    ("formats", "card"),
    ("formats", "model"),
    ("formats", "onnx_format"),
    ("model", "encode"),
    ("model", "hub"),
    ("recipe", "model"),
    ("training", "evaluation"),  # runs are evaluated while they go on
    ("search", "search_faiss"),
    ("serve", "evaluation"),
    ("serve", "search"),
    ("search", "evaluation"),  # what `mmcl embed` writes
    ("__main__", "cli"),
    ("cli", "demo"),
    ("cli", "catalogue"),
    ("cli", "cli_classify"),
    ("cli", "cli_options"),
    ("cli_classify", "cli_options"),
    ("hashing", "types"),
    ("types", "specs"),
}
TORCH_ALONE = {"losses", "layers"}


def imports_of(path: Path) -> set[str]:
    """Names of the parts of ``mmcl`` that a file imports, at any depth of its code."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names = [node.module]
            if node.module == "mmcl":
                names = [f"mmcl.{alias.name}" for alias in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("mmcl.")}
    return found


def part_of(path: Path) -> str:
    return path.relative_to(ROOT / "mmcl").parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", sorted((ROOT / "mmcl").rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down(path: Path) -> None:
    part = part_of(path)
    if part == "__init__":
        return
    assert part in LEVEL, f"{part} has no layer: give it one"
    for other in imports_of(path) - {part}:
        if other not in LEVEL:  # a name of the package itself, e.g. __version__
            continue
        allowed = LEVEL[other] < LEVEL[part] or (part, other) in NEIGHBOURS
        assert allowed, f"{path.relative_to(ROOT)} ({part}) must not import {other}"
        assert part not in TORCH_ALONE, f"{part} imports torch alone, not {other}"


def test_cli_starts_without_anything_heavy() -> None:
    code = (
        "import mmcl.cli, sys; "
        "heavy = {'torch', 'numpy', 'av', 'transformers', 'accelerate', 'pydantic', 'matplotlib'}; "
        "sys.exit(', '.join(heavy & sys.modules.keys()) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"imported at start: {done.stderr}"
