"""Configuration: typed, frozen, unknown keys refused; errors name the path, the value, what is allowed, the nearest."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

import mmcl
from mmcl.config import to_yaml
from mmcl.recipe import RunConfig, json_schema
from mmcl.types import ConfigError

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "configs/pretrain/demo.yaml"


def message(overrides: list[str], path: Path = DEMO) -> str:
    with pytest.raises(ConfigError) as caught:
        mmcl.load_config(path, overrides)
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_the_demo_loads_and_is_frozen() -> None:
    config = mmcl.load_config(DEMO)
    assert isinstance(config, RunConfig)
    with pytest.raises(ValueError, match="frozen"):
        config.train.steps = 3  # type: ignore[misc]


def test_dotted_overrides_reach_lists_and_nested_keys() -> None:
    config = mmcl.load_config(DEMO, ["train.steps=50", "objectives.0.weight=0.5", "train.optimizer.clip_norm=null"])
    assert config.train.steps == 50
    assert config.objectives[0].weight == 0.5
    assert config.train.optimizer.clip_norm is None


def test_resolved_yaml_loads_to_the_same(tmp_path: Path) -> None:
    config = mmcl.load_config(DEMO, ["train.seed=7"])
    saved = tmp_path / "config.yaml"
    saved.write_text(to_yaml(config), encoding="utf-8")
    assert mmcl.load_config(saved) == config


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("train.stpes=5", ["train.stpes", "unknown key", "did you mean 'steps'?", "allowed:", "global_batch"]),
        ("train.steps=many", ["train.steps", "'many'"]),
        ("train.steps=0", ["train.steps", "greater than or equal to 1", "0"]),
        ("train.precision=fp8", ["train.precision", "'fp8'", "'bf16'"]),
        ("trian.steps=5", ["trian", "did you mean 'train'?"]),
        ("model.towers.video.name=tiny_vdeo", ["model.towers.video.name", "'tiny_vdeo'", "did you mean 'tiny_video'?"]),
        ("model.towers.video.sizes=64", ["model.towers.video.sizes: unknown key", "did you mean 'size'?"]),
        ("objectives.0.wieght=2", ["objectives.0.wieght", "did you mean 'weight'?"]),
        ("objectives.0.name=cross_model", ["objectives.0.name", "cross_model", "cross_modal"]),
        ("objectives.3.weight=2", ["objectives.3", "number below 1"]),
        ("model.towers.video={}", ["model.towers.video.name: missing"]),
        ("train.optimizer.learning_rate=.inf", ["learning_rate", "finite"]),
        ("train.optimizer.beta1=1", ["beta1", "less than 1"]),
        ("train.seed=99999999999999999999999", ["train.seed"]),
        ("model.towers.audio.seconds=1e9", ["model.towers.audio.seconds"]),
        ("train.steps.more=2", ["train.steps", "single value"]),
        ("steps", ["dotted.path=value"]),
        ("data.decoder=ffmpeg", ["data.decoder", "'ffmpeg'", "'pyav'"]),
    ],
)
def test_a_mistake_is_named_with_its_path_value_and_remedy(override: str, parts: list[str]) -> None:
    text = message([override])
    for part in parts:
        assert part in text, f"{part!r} not in {text!r}"


def test_lists_and_mappings_are_asked_for_by_these_names() -> None:
    assert message(["objectives=[]"]).endswith("objectives: empty; at least 1 needed")
    assert message(["objectives={a: 1}"]).endswith("objectives: must be a list, got {'a': 1}")
    assert message(["train=fast"]).endswith("train: must be a mapping of keys, got 'fast'")
    assert message(["objectives=[cross_modal]"]).endswith("objectives.0: must be a mapping of keys, got 'cross_modal'")


def test_one_mistake_is_said_once() -> None:
    assert "at least 1 item" not in message(["objectives.0.wieght=2"])


def test_several_mistakes_are_all_named() -> None:
    text = message(["train.stpes=5", "data.workers=-1"])
    assert "train.stpes" in text
    assert "data.workers" in text


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"a: 1\na: 2\n", "'a' stands twice"),
        (b"a: [", "not valid YAML"),
        (b"- 1\n", "must hold a mapping"),
        (b"\xff\xfe\xfa", "cannot be read"),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, content: bytes, part: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_bytes(content)
    text = message([], path)
    assert part in text
    assert str(path) in text


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    assert "no such file" in message([], tmp_path / "none.yaml")


def test_a_pair_of_unknown_towers_is_refused_when_the_run_is_built() -> None:
    from mmcl.recipe import build_model

    config = mmcl.load_config(DEMO, ["objectives.0.pairs=[[video, txt]]"])
    with pytest.raises(ConfigError, match=r"objectives\.0\.pairs.*'txt'.*text"):
        build_model(config)


def test_the_shipped_schema_is_true() -> None:
    """To renew it: python tools/write_schema.py"""
    assert json.loads((ROOT / "configs/schema.json").read_text()) == json.loads(json.dumps(json_schema()))


RECIPES = sorted([*(ROOT / "configs/pretrain").glob("*.yaml"), *(ROOT / "configs/finetune").glob("*.yaml")])


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_shipped_config_is_valid(path: Path) -> None:
    mmcl.load_config(path)


@pytest.mark.parametrize("path", sorted((ROOT / "configs/accelerate").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_launch_file_states_its_processes(path: Path) -> None:
    settings = yaml.safe_load(path.read_text())
    assert settings["num_processes"] >= 1
    assert settings["use_cpu"] is False  # true makes the launcher start a single process, whatever is asked
