"""`mmcl objectives` and the page of configurations: complete, true, quick, and no wider than a terminal."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest
from support.recipes import ROOT
from typer.testing import CliRunner

from mmcl.catalogue import Entry, detail, find_entry, overview, read_catalogue
from mmcl.cli import app
from mmcl.objectives import OBJECTIVES
from mmcl.recipe import json_schema
from mmcl.types import ConfigError

ENTRIES = read_catalogue()


def each() -> list[Entry]:
    return [one for entry in ENTRIES for one in (entry, *entry.methods)]


def test_it_is_the_table_of_objectives() -> None:
    assert [entry.name for entry in ENTRIES] == sorted(OBJECTIVES)
    assert read_catalogue(json_schema()) == ENTRIES, "to renew it: python tools/write_schema.py"
    for entry in ENTRIES:
        fields = set(OBJECTIVES[entry.name].options.model_fields) - {"name"}
        assert {option.name for option in entry.options} == fields
        assert entry.summary and entry.needs, f"{entry.name}: its options' docstring needs a first line and `Needs: …`"
        sources = [number for one in (entry, *entry.methods) for number in one.sources]
        assert sources, f"{entry.name}: no arXiv number in its options' docstrings"


def test_defaults_and_meanings_are_those_of_the_options() -> None:
    options = {option.name: option for option in find_entry("persistency", ENTRIES).options}
    assert options["tower"].default == options["method"].default == "required"
    assert (options["rho"].kind, options["rho"].default) == ("whole number ≥ 1 ≤ 4", "2")
    assert options["reduction"].kind == "mean | sum" and "makes gradients grow" in options["reduction"].meaning
    moco = {option.name: option for option in find_entry("intra_modal.moco", ENTRIES).options}
    assert moco["queue"].default == "65536" and moco["queue"].meaning.startswith("keys of earlier batches")
    assert moco["layers"].meaning == "linear maps of the projector", "inherited, only the default is its own"
    assert find_entry("compositional_distillation", ENTRIES).options[5].default == "{}"
    described = [bool(option.meaning) for one in each() for option in one.options]
    assert sum(described) > 0.6 * len(described)


def test_it_fits_a_terminal() -> None:
    texts = [overview(ENTRIES), *(detail(entry) for entry in each())]
    assert max(len(line) for text in texts for line in text.splitlines()) <= 80
    assert all(name in texts[0] for name in OBJECTIVES)


def test_the_command_needs_no_towers() -> None:
    done = CliRunner().invoke(app, ["objectives", "mutual"])
    assert done.exit_code == 0 and "soft_temperature: number > 0; default 3.0" in done.output
    with pytest.raises(ConfigError, match=r"no objective 'mutal' \(did you mean 'mutual'\?\); there are: cmim, comp"):
        find_entry("mutal", ENTRIES)
    code = (
        "import sys; from mmcl.cli import app; app(['objectives'], standalone_mode=False); "
        "sys.exit(', '.join({'torch', 'numpy', 'av'} & sys.modules.keys()) or 0)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert ran.returncode == 0, ran.stderr
    assert "configs/pretrain/README.md" in ran.stdout


def test_the_page_is_up_to_date() -> None:
    """To renew it: python tools/write_objectives_page.py"""
    spec = importlib.util.spec_from_file_location("write_objectives_page", ROOT / "tools/write_objectives_page.py")
    assert spec is not None and spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    text = (ROOT / "configs/pretrain/README.md").read_text(encoding="utf-8")
    assert text == tool.page(ENTRIES, tool.configurations())
    assert "No configuration of its own" not in text
    titles = [line for line in text.splitlines() if line.startswith("##")]
    assert titles.pop() == "## Multistage"
    assert len(titles) == sum(1 + len(entry.methods) for entry in ENTRIES) == len(set(titles))
