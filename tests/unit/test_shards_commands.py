"""``mmcl shards``: plain lines, one line per error, exit codes, and a quick start."""

from __future__ import annotations

import subprocess
import sys

from support.media import write_clip
from typer.testing import CliRunner

from mmcl.shards import load_manifest
from mmcl.shards.commands import app
from mmcl.types import ConfigError


def run(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_make_then_index(media_folder, tmp_path):
    table = media_folder / "clips.csv"
    few = tmp_path / "few.csv"
    lines = table.read_text().splitlines()[:3]
    few.write_text("\n".join([lines[0], *(f"{media_folder}/{line}" for line in lines[1:]), "gone.mp4,x,train,g"]))
    planned = run("make", few, "--out", tmp_path / "out", "--dry-run")
    assert planned.exit_code == 0 and "3 rows" in planned.output and not (tmp_path / "out").exists()
    made = run("make", few, "--out", tmp_path / "out", "--workers", 1)
    assert made.exit_code == 0, made.output
    assert "2 samples (0 were there)" in made.output and "1 missing_file" in made.output
    before = load_manifest(tmp_path / "out/train").fingerprint
    (tmp_path / "out/train/index.json").unlink()
    indexed = run("index", tmp_path / "out/train")
    assert indexed.exit_code == 0 and "2 samples in 1 shards" in indexed.output
    assert load_manifest(tmp_path / "out/train").fingerprint == before


def test_output_inside_the_input_is_no_input(tmp_path):
    for name in ("a", "b"):
        write_clip(tmp_path / f"{name}.mp4", colour="red", seconds=0.5, audio=False)
    assert isinstance(run("make", tmp_path, "--out", tmp_path).exception, ConfigError)
    for reused in (0, 2):
        made = run("make", tmp_path, "--out", tmp_path / "out", "--workers", 1)
        assert made.exit_code == 0 and f"2 samples ({reused} were there)" in made.output


def test_options_of_scenes_need_scenes(tmp_path):
    for option in (("--scene-detector", "pyav"), ("--min-scene", 0.5)):
        refused = run("make", tmp_path, "--out", tmp_path / "out", *option).exception
        assert isinstance(refused, ConfigError) and option[0] in str(refused) and "--scenes" in str(refused)


def test_errors_are_raised_for_the_main_program_to_print(tmp_path):
    for arguments in (("index", tmp_path), ("make", tmp_path / "x.csv", "--out", tmp_path / "o")):
        assert isinstance(run(*arguments).exception, ConfigError)
    assert run("make", tmp_path).exit_code == 2


def test_the_commands_import_nothing_heavy():
    heavy = "{'torch', 'av', 'numpy', 'PIL', 'webdataset', 'rich.progress'}"
    code = f"import sys, mmcl.shards.commands; print({heavy} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"
