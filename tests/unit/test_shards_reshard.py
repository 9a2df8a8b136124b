"""Other shards of the same samples: every sample once, its files unchanged, into a new folder only."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.shards import read_shards, write_shards
from typer.testing import CliRunner

from mmcl.shards import load_manifest
from mmcl.shards.commands import app
from mmcl.shards.reshard import ReshardOptions, parse_split, reshard
from mmcl.types import ConfigError, RunError


def sample(number: int, group: str = "") -> dict[str, bytes]:
    facts = json.dumps({"group": group or f"g{number}", "n": number}).encode()
    return {
        "mp4": bytes([number % 256]) * (100 + number),
        "json": facts,
        "txt": f"caption {number}".encode(),
        "npy": b"",
    }


@pytest.fixture
def shards(tmp_path) -> Path:
    write_shards(tmp_path / "in", {f"k{i:03d}": sample(i) for i in range(40)}, max_count=7)
    return tmp_path / "in"


def run(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_another_size_keeps_order_and_bytes(shards, tmp_path):
    reshard([shards], tmp_path / "out", ReshardOptions(max_count=16))
    assert load_manifest(tmp_path / "out").sizes.tolist() == [16, 16, 8]
    before, after = read_shards(shards), read_shards(tmp_path / "out")
    assert list(after.items()) == list(before.items())
    reshard([tmp_path / "out"], tmp_path / "back", ReshardOptions(max_count=7))
    assert load_manifest(tmp_path / "back").fingerprint == load_manifest(shards).fingerprint
    reshard([shards], tmp_path / "small", ReshardOptions(max_bytes=12_000))
    sizes = [path.stat().st_size for path in (tmp_path / "small").glob("*.tar")]
    assert len(sizes) > 6 and max(sizes) <= 12_000 + 10_240


def test_the_shuffle_is_global_and_depends_on_keys_and_seed_alone(shards, tmp_path):
    orders = {}
    for name, source, seed in (("a", shards, 1), ("b", shards, 2), ("c", tmp_path / "a", 1)):
        reshard([source], tmp_path / name, ReshardOptions(max_count=10, shuffle=seed))
        orders[name] = list(read_shards(tmp_path / name))
        assert read_shards(tmp_path / name) == read_shards(shards)
    assert orders["a"] == orders["c"] != orders["b"]
    together = {int(key[1:]) // 7 for key in orders["a"][:10]}
    assert len(together) >= 4  # one new shard draws on most of the old ones


def test_split_keeps_groups_together_and_loses_nothing(tmp_path):
    write_shards(tmp_path / "in", {f"k{i}": sample(i, group=f"film{i // 4}") for i in range(200)})
    report = reshard([tmp_path / "in"], tmp_path / "out", ReshardOptions(split={"train": 0.8, "test": 0.2}))
    parts = {name: read_shards(tmp_path / "out" / name) for name in ("train", "test")}
    groups = {name: {json.loads(members["json"])["group"] for members in part.values()} for name, part in parts.items()}
    assert not groups["train"] & groups["test"] and len(groups["train"] | groups["test"]) == 50
    assert parts["train"] | parts["test"] == read_shards(tmp_path / "in")
    assert 20 <= len(parts["test"]) <= 64 and sum(m.num_samples for m in report.manifests) == 200
    reshard([tmp_path / "in"], tmp_path / "two", ReshardOptions(split={"train": 0.8, "test": 0.2}, shuffle=3))
    assert set(read_shards(tmp_path / "two/test")) == set(parts["test"])  # whatever the order


def test_merge_takes_all_and_does_not_hide_a_key_that_comes_twice(shards, tmp_path):
    write_shards(tmp_path / "other", {"k001": sample(200), "k001-2": sample(201), "new": sample(202)})
    with pytest.raises(ConfigError, match="1 keys come twice"):
        reshard([shards, tmp_path / "other"], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    report = reshard([shards, tmp_path / "other"], tmp_path / "out", ReshardOptions(rename=True))
    merged = read_shards(tmp_path / "out")
    assert len(merged) == 43 and report.renamed == 1
    assert json.loads(merged["k001-2"]["json"])["n"] == 201 and json.loads(merged["k001-3"]["json"])["n"] == 200


def test_the_old_shards_are_never_touched(shards, tmp_path):
    before = {path.name: path.read_bytes() for path in shards.iterdir()}
    for out in (shards, tmp_path):
        with pytest.raises(ConfigError, match="new folder"):
            reshard([shards], out)
    (tmp_path / "empty").mkdir()
    reshard([shards], tmp_path / "empty")
    assert {path.name: path.read_bytes() for path in shards.iterdir()} == before


def test_what_cannot_be_read_stops_it_and_leaves_no_manifest(shards, tmp_path):
    (shards / "shard-000003.tar").write_bytes(b"")
    with pytest.raises(RunError, match="shard-000003"):
        reshard([shards], tmp_path / "out")
    assert not (tmp_path / "out/index.json").exists() and not list((tmp_path / "out").glob(".*"))


def test_a_part_without_samples_is_said(tmp_path):
    write_shards(tmp_path / "in", {"k": sample(1)})
    with pytest.raises(RunError, match="no sample fell"):
        reshard([tmp_path / "in"], tmp_path / "out", ReshardOptions(split={"a": 0.5, "b": 0.5}))


@pytest.mark.parametrize("text", ["a", "a=0", "a=x", "a=2", "a=0.5,a=0.5", "a=0.5", "../a=1", "a=nan"])
def test_a_wrong_split_is_refused(text):
    with pytest.raises(ConfigError, match="split"):
        ReshardOptions(split=parse_split(text))


def test_the_command(shards, tmp_path):
    done = run("reshard", shards, "--out", tmp_path / "o", "--max-count", 9, "--shuffle", 4, "--split", "a=0.5,b=0.5")
    assert done.exit_code == 0, done.output
    assert len(read_shards(tmp_path / "o/a")) + len(read_shards(tmp_path / "o/b")) == 40
    assert str(tmp_path / "o/a") in done.output
