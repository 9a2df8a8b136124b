"""The comparisons of ``tools/bench/learning*.py``: some at a tiny size, clips to JSON; what others would run."""

from __future__ import annotations

import colorsys
import importlib
import itertools
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from support.recipes import ROOT

from mmcl.config import build
from mmcl.recipe import RunConfig, build_model


@pytest.mark.slow
def test_a_comparison_runs_and_its_runs_are_kept(tmp_path: Path) -> None:
    work, out = tmp_path / "work", tmp_path / "learning.json"
    command = [
        sys.executable, str(ROOT / "tools/bench/learning.py"), "--quick", "--distillation", "--seeds", "1",
        "--teachers", "audio", "image",
        "--work", str(work), "--out", str(out),
    ]  # fmt: skip
    first = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = json.loads(out.read_text(encoding="utf-8"))
    arms = found["distillation"]["arms"]
    assert {"untrained", "labels alone", "plain, from sound", "compositional, from pictures"} <= set(arms)
    assert all(0 <= figure["mean"] <= 100 for arm in arms.values() for name, figure in arm.items() if "cpu" not in name)
    assert "classifier" in arms["labels alone"]
    assert "classifier" not in arms["untrained"]
    runs = work / "quick/runs"
    (line,) = (runs / "distillation-labels_alone-0/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(line)["step"] == 4
    kept = runs / "distillation-labels_alone-0/checkpoints"
    written = kept.stat().st_mtime_ns
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout == first
    assert kept.stat().st_mtime_ns == written, "a run that is there is not made again"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "arguments", "experiment", "tiny", "figures"),
    [
        (
            "learning_stor",
            ["--background-erasing"],
            "background_erasing",
            {"clips_per_kind": 2, "test_clips_per_kind": 1},
            {f"{how}, {split}" for how in ("5-NN", "linear") for split in ("telling", "neutral")},
        ),
        ("learning_motion", ["--arms", "untrained", "motion"], "motion", {"clips": 16, "test_clips": 8}, {"5-NN"}),
    ],
)
def test_a_comparison_of_motion_runs(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    script: str,
    arguments: list[str],
    experiment: str,
    tiny: dict[str, int],
    figures: set[str],
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tools/bench"))
    bench = importlib.import_module(script)
    monkeypatch.setattr(bench, "QUICK", replace(bench.QUICK, **tiny, seeds=1, steps=2, batch=8))
    out = tmp_path / "found.json"
    given = ["--quick", *arguments, "--work", str(tmp_path / "work"), "--out", str(out)]
    monkeypatch.setattr(sys, "argv", [script, *given])
    bench.main()
    found = json.loads(out.read_text(encoding="utf-8"))
    arms = found[experiment]["arms"]
    told = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert found["settings"]["steps"] == 2 and {*arms} <= {arm for _, arm, _ in told}
    assert all(arm.keys() == {*figures, "cpu_seconds"} for arm in arms.values())
    assert all(0 <= arm[name]["mean"] <= 100 for arm in arms.values() for name in figures)
    trained = {arm for arm, figure in arms.items() if figure["cpu_seconds"]["mean"] > 0}
    assert trained == {*arms} - {"untrained"} and len(trained) == len([*tmp_path.glob("work/*/runs/*/trained.json")])


@pytest.mark.slow
def test_the_overhead_of_a_mix_is_measured_on_equal_losses(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "tools/bench/mix.py"), "--rows", "16", "--pairs", "4", "--calls", "1"]
    subprocess.run([*command, "--out", str(tmp_path / "mix.json")], check=True, capture_output=True)
    found = json.loads((tmp_path / "mix.json").read_text(encoding="utf-8"))
    for (figures,) in found.values():
        assert len(figures["terms"]) == 5
        low, high = figures["overhead_quartiles"]
        assert -1 < low <= figures["overhead"] <= high


def test_arms_of_the_comparison_of_views_are_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tools/bench"))
    bench = importlib.import_module("learning_views")
    found = {}
    for experiment in bench.FULL.steps:
        for job in bench.jobs_of(experiment, bench.FULL, tmp_path):
            mix = build_model(build(RunConfig, job.tree))[1]
            found[experiment, job.arm, job.seed] = (len(mix.needs), job.tree["train"]["steps"], len(job.bank))
    assert len(found) == 3 * (5 + 3) and {seed for _, _, seed in found} == {0, 1, 2}
    assert [found["draws", f"{n} views", 0] for n in (2, 3, 4)] == [(n, 300, 4) for n in (2, 3, 4)]
    assert found["draws", bench.TWICE, 0] == (2, 600, 4)
    assert [found["modalities", f"{n} views", 0] for n in (2, 3, 4)] == [(n, 200, 1) for n in (2, 3, 4)]
    assert {a for pair in bench.COMPARED for a in pair} <= {arm for _, arm, _ in found}


def test_arms_of_the_comparison_of_clips_are_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tools/bench"))
    bench = importlib.import_module("learning_stor")
    clips, heads, sources = {}, {}, {}
    for experiment in bench.ARMS:
        for job in bench.jobs_of(experiment, replace(bench.FULL, seeds=1), tmp_path, tmp_path):
            mix = build_model(build(RunConfig, job.tree))[1]
            views = [need.view for need in mix.needs]
            clips[job.arm] = ({view.erase is not None for view in views}, {view.clip for view in views})
            heads[job.arm] = {name.split(".")[3] for name, _ in mix.named_parameters() if ".heads." in name}
            sources.setdefault(experiment, set()).update(s["shards"] for s in job.tree["data"]["sources"])
        assert {arm for pair in bench.COMPARED[experiment] for arm in pair} <= clips.keys()
    assert sources == {"background_erasing": {str(tmp_path / "telling")}, "stor": {str(tmp_path / "neutral")}}
    assert clips["moco"] == ({False}, {0}) and clips["moco, erased"] == ({True, False}, {0})
    assert clips["moco, hard negatives"] == ({False}, {0, 1})
    assert clips["moco, erased, hard negatives"] == ({True, False}, {0, 1})
    assert heads["prediction alone"] == set() and heads["prediction, speed, turns"] == {"speed", "turns"}
    assert heads["overlap alone"] == {"overlap_space", "overlap_time"}
    assert heads["whole"] == heads["overlap alone"] | heads["prediction, speed, turns"]


def test_the_background_tells_where_it_should(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tools/bench"))
    clips = importlib.import_module("learning_clips")
    off: dict[str, list[float]] = {split: [] for split in clips.SPLITS}
    for split, change in itertools.product(clips.SPLITS, clips.CHANGES):
        pictures = clips.film(change, split, f"{change}-0", 40)
        hues = [colorsys.rgb_to_hsv(*map(float, picture[0, 0]))[0] for picture in pictures]
        assert max(hues) == min(hues), "the background stands still"
        away = abs(hues[0] - clips.CHANGES.index(change) / len(clips.CHANGES))
        off[split].append(min(away, 1 - away))
        moving = (pictures[1:] != pictures[:-1]).any()
        assert moving == (change != "still")
    assert max(off["telling"]) < 0.05
    assert max(off["neutral"]) > 0.1 and max(off["test"]) > 0.1
