"""A run: it learns, it stops when asked, it goes on bit for bit, and nothing of it is half-written."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.recipes import tiny_config

from mmcl.folders import model_folder
from mmcl.recipe import AdamWOptions, RunConfig
from mmcl.training.checkpoint import complete_checkpoints, find_checkpoint, write_checkpoint
from mmcl.training.launch import describe, pretrain
from mmcl.training.optim import learning_rate_factor
from mmcl.training.processes import build_accelerator
from mmcl.training.run_folder import RunFolder
from mmcl.training.trainer import Trainer
from mmcl.types import ConfigError, RunError


def run(config: RunConfig, resume: str | None = None, allow: tuple[str, ...] = ()) -> Path:
    pretrain(config, resume=resume, allow=allow)
    return Path(config.train.out)


def metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    found = find_checkpoint(folder)
    assert found is not None
    return load_file(found / "model.safetensors")


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.fixture(scope="module")
def finished(shards_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 12 steps, never interrupted."""
    out = tmp_path_factory.mktemp("finished") / "run"
    return run(
        tiny_config(
            "train.steps=12", "train.log_every=1", "train.checkpoint_every=4", shards=shards_folder / "train", out=out
        )
    )


def short(shards_folder: Path, out: Path, *overrides: str) -> RunConfig:
    return tiny_config(
        "train.steps=12",
        "train.log_every=1",
        "train.checkpoint_every=4",
        *overrides,
        shards=shards_folder / "train",
        out=out,
    )


def test_metrics_hold_what_is_promised(finished: Path) -> None:
    lines = metrics(finished)
    assert [line["step"] for line in lines] == list(range(1, 13))
    last = lines[-1]
    assert last["samples"] == 12 * 16
    for name in (
        "loss",
        "cross_modal",
        "temperature",
        "grad_norm",
        "samples_per_second",
        "data_wait_fraction",
        "skipped",
        "captions_cut",
    ):
        assert math.isfinite(last[name]), name
    assert last["temperature"] == pytest.approx(0.07, rel=0.2)
    assert last["loss"] < lines[0]["loss"]
    assert (finished / "config.yaml").exists()
    assert (finished / "checkpoints/latest").read_text().strip() == "step_00000012"
    assert [folder.name for folder in complete_checkpoints(finished / "checkpoints")] == [
        "step_00000008",
        "step_00000012",
    ]


def test_a_stopped_run_goes_on_bit_for_bit(
    shards_folder: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = short(shards_folder, tmp_path / "run")
    step = Trainer.optimizer_step

    def stop_after_five(self: Trainer, batches: list) -> object:
        result = step(self, batches)
        if self.progress.step == 4:  # the fifth step
            (tmp_path / "run/stop").touch()
        return result

    monkeypatch.setattr(Trainer, "optimizer_step", stop_after_five)
    folder = run(config)
    assert find_checkpoint(folder).name == "step_00000005"  # type: ignore[union-attr]
    monkeypatch.setattr(Trainer, "optimizer_step", step)
    run(config, resume="auto")
    assert same(weights(folder), weights(finished))
    kept = ("step", "samples", "loss", "grad_norm", "temperature")
    assert [{k: line[k] for k in kept} for line in metrics(folder)] == [
        {k: line[k] for k in kept} for line in metrics(finished)
    ]


def test_a_crashed_run_goes_on_from_its_last_checkpoint_bit_for_bit(
    shards_folder: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps 5 and 6 were logged but not saved: they are taken, and logged, again, once."""
    step = Trainer.optimizer_step

    def crash_in_seven(self: Trainer, batches: list) -> object:
        if self.progress.step == 6:
            raise KeyboardInterrupt
        return step(self, batches)

    config = short(shards_folder, tmp_path / "run")
    monkeypatch.setattr(Trainer, "optimizer_step", crash_in_seven)
    with pytest.raises(KeyboardInterrupt):
        run(config)
    monkeypatch.setattr(Trainer, "optimizer_step", step)
    folder = run(config, resume="auto")
    assert same(weights(folder), weights(finished))
    assert [line["step"] for line in metrics(folder)] == list(range(1, 13))


def test_a_torn_checkpoint_is_not_taken(shards_folder: Path, finished: Path, tmp_path: Path) -> None:
    folder = run(short(shards_folder, tmp_path / "run"))
    newest = folder / "checkpoints/step_00000012"
    (newest / "optimizer.pt").write_bytes((newest / "optimizer.pt").read_bytes()[:-7])
    assert find_checkpoint(folder) == folder / "checkpoints/step_00000008"
    damaged = folder / "checkpoints/step_00000008/model.safetensors"
    data = bytearray(damaged.read_bytes())
    data[-1] ^= 1  # the size is right, the content is not
    damaged.write_bytes(data)
    assert find_checkpoint(folder) is None


def test_a_failing_write_leaves_the_last_good_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def good(folder: Path) -> None:
        (folder / "a").write_text("1")

    def full(folder: Path) -> None:
        (folder / "a").write_text("2")
        raise OSError(28, "No space left on device")

    with RunFolder(tmp_path) as folder:
        folder.checkpoint(1, good, keep=2)
        folder.checkpoint(2, full, keep=2)
    assert "No space left on device" in capsys.readouterr().out
    assert find_checkpoint(tmp_path) == tmp_path / "checkpoints/step_00000001"
    assert [path.name for path in (tmp_path / "checkpoints").iterdir() if path.name != "latest"] == ["step_00000001"]
    with pytest.raises(OSError, match="No space"):
        write_checkpoint(tmp_path / "checkpoints", 3, full, keep=2)


def test_a_second_writer_and_a_second_run_are_refused(shards_folder: Path, finished: Path) -> None:
    with RunFolder(finished), pytest.raises(RunError, match="another run is writing"), RunFolder(finished):
        pass
    with pytest.raises(ConfigError, match=r"already holds a run.*--resume"):
        run(short(shards_folder, finished))


def test_a_checkpoint_of_another_model_or_order_is_refused(shards_folder: Path, finished: Path, tmp_path: Path) -> None:
    narrow = short(shards_folder, tmp_path / "a", "model.joint_width=16", "train.log_every=2")
    refused = r"another configuration: model\.joint_width: 32 → 16; --allow model\.joint_width goes on"
    with pytest.raises(ConfigError, match=refused):
        run(narrow, resume=str(finished))
    with pytest.raises(ConfigError, match="does not fit"):
        run(narrow, resume=str(finished), allow=("model",))
    with pytest.raises(ConfigError, match=r"--allow: 'model\.jointwidth' is no key"):
        run(narrow, resume=str(finished), allow=("model.jointwidth",))
    with pytest.raises(ConfigError, match=r"order has changed: seed"):
        run(short(shards_folder, tmp_path / "b", "train.seed=5"), resume=str(finished), allow=("train.seed",))
    with pytest.raises(ConfigError, match="neither a checkpoint"):
        run(short(shards_folder, tmp_path / "c"), resume=str(tmp_path))


def test_a_loss_that_is_not_finite_stops_before_the_step_and_names_the_batch(
    shards_folder: Path, tmp_path: Path
) -> None:
    config = short(
        shards_folder, tmp_path / "run", "train.optimizer.learning_rate=1e30", "train.optimizer.warmup_steps=0"
    )
    with pytest.raises(RunError, match=r"not finite: .*nothing was changed.*keys of its batch: .*\w"):
        run(config)


def test_accumulated_losses_give_the_mean_gradient(shards_folder: Path, tmp_path: Path) -> None:
    """One step on two batches moves the weights as the mean of their gradients does."""
    config = short(
        shards_folder, tmp_path / "run", "train.global_batch=8", "train.accumulate=2", "train.optimizer.clip_norm=null"
    )
    trainer = Trainer(config, build_accelerator(config))
    batches = [batch for batch, _ in zip(trainer.stream, range(2), strict=False)]
    wanted = []
    for batch in batches:
        trainer.optimizer.zero_grad()
        torch.autograd.backward(trainer.step_module(batch).loss)
        wanted.append([p.grad.clone() for p in trainer.step_module.parameters()])  # type: ignore[union-attr]
    trainer.optimizer.zero_grad()
    seen: list[torch.Tensor] = []
    trainer.optimizer.register_step_pre_hook(
        lambda *_: seen.extend(p.grad.clone() for p in trainer.step_module.parameters())  # type: ignore[union-attr]
    )
    trainer.optimizer_step(batches)
    for first, second, mean in zip(*wanted, seen, strict=True):
        assert torch.allclose((first + second) / 2, mean, atol=1e-6)


def test_no_decay_on_norms_biases_and_temperatures(shards_folder: Path, tmp_path: Path) -> None:
    config = short(shards_folder, tmp_path / "run")
    trainer = Trainer(config, build_accelerator(config))
    decayed, free = trainer.optimizer.param_groups
    assert all(p.ndim >= 2 for p in decayed["params"])
    assert free["weight_decay"] == 0.0
    names = {name for name, p in trainer.model.named_parameters() if any(p is q for q in free["params"])}
    assert "log_scales.video-text" in names
    assert any("norm" in name for name in names)


def test_the_schedule_warms_up_and_ends_at_zero() -> None:
    factors = [learning_rate_factor(step, AdamWOptions(warmup_steps=10), steps=100) for step in range(100)]
    assert factors[0] == pytest.approx(0.1)
    assert max(factors) == 1.0
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert factors[-1] < 0.001


def test_the_wrong_number_of_processes_is_refused(shards_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.processes: 2 asked for, but 1 started"):
        run(short(shards_folder, tmp_path / "run", "train.processes=2"))


def test_a_dry_run_says_what_would_run(shards_folder: Path, tmp_path: Path) -> None:
    text = describe(short(shards_folder, tmp_path / "run"))
    assert "global_batch: 16" in text
    assert "# total: " in text
    assert "video[0]: uint8 16 × 2 × 3 × 32 × 32, 16 present" in text
    assert not (tmp_path / "run").exists()


def test_it_learns_what_the_clips_show(shards_folder: Path, tmp_path: Path) -> None:
    """Colour = word = tone: after a hundred steps every direction finds every test clip."""
    from mmcl.evaluation.run import evaluate_checkpoint

    config = tiny_config(
        "train.steps=100", "train.checkpoint_every=100", shards=shards_folder / "train", out=tmp_path / "run"
    )
    evaluation = evaluate_checkpoint(run(config), str(shards_folder / "test"), tmp_path / "report", clips=2, workers=1)
    figures = {name: direction.metrics["R@1"] for name, direction in evaluation.report.headline.directions.items()}
    assert figures == dict.fromkeys(figures, 100.0)
    assert len(figures) == 6
    page = (tmp_path / "report/report.html").read_text()
    assert "data:image/jpeg" in page
    saved = json.loads((tmp_path / "report/report.json").read_text())
    assert saved["directions"]["text->video"]["R@1"] == 100.0


def test_a_disk_that_fills_costs_a_checkpoint_not_the_run(
    shards_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Libraries say "no space" as errors of their own; the last checkpoint must not be missed in silence."""
    from mmcl.training import checkpoint

    save, calls = checkpoint.save_optimizer, []

    def full_at_first(path: Path, state: dict) -> None:
        calls.append(path)
        if len(calls) == 1:
            raise RuntimeError("[enforce fail at inline_container.cc] . unexpected pos 64 vs 0")
        save(path, state)

    monkeypatch.setattr(checkpoint, "save_optimizer", full_at_first)
    folder = run(short(shards_folder, tmp_path / "run"))
    assert "checkpoint of step 4 not written: [enforce fail" in capsys.readouterr().out
    assert not list((folder / "checkpoints").glob(".*partial"))
    assert find_checkpoint(folder).name == "step_00000012"  # type: ignore[union-attr]
    calls.clear()
    config = short(shards_folder, tmp_path / "other", "train.checkpoint_every=12")
    with pytest.raises(RunError, match="step 12, the last one, was not written"):
        run(config)


def test_a_damaged_checkpoint_is_named(shards_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = short(shards_folder, tmp_path / "run")
    folder = run(config)
    newest, older = (folder / f"checkpoints/step_{step:08d}" for step in (12, 8))
    (newest / "optimizer.pt").write_bytes(b"garbage")
    with pytest.raises(RunError, match=r"step_00000012: damaged or incomplete: optimizer\.pt"):
        run(config, resume=str(newest))
    (newest / "config.yaml").write_text("a: [")
    with pytest.raises(RunError, match=r"step_00000012: damaged or incomplete: config\.yaml, optimizer\.pt"):
        run(config, resume=str(newest))
    for resume in ("auto", str(folder)):
        (newest / "optimizer.pt").write_bytes(b"garbage")
        run(config, resume=resume)
        assert "not taken: " in capsys.readouterr().out
    for name in ("state.json", "files.json"):
        for checkpoint in (newest, older):
            (checkpoint / name).write_text("[1, 2]")
        with pytest.raises(RunError, match="no checkpoint is whole"):
            run(config, resume="auto")


def test_going_back_gives_up_what_came_after(shards_folder: Path, tmp_path: Path, finished: Path) -> None:
    """A checkpoint taken after going back is the newest, though an older run of this folder had come further."""
    folder = run(short(shards_folder, tmp_path / "run", "train.keep_checkpoints=3"))
    back = short(shards_folder, folder, "train.keep_checkpoints=1", "train.checkpoint_every=5")
    step, crash = Trainer.optimizer_step, RuntimeError("pulled the plug")

    def crash_in_seven(self: Trainer, batches: list) -> object:
        if self.progress.step == 6:
            raise crash
        return step(self, batches)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError, match="plug"):
        patch.setattr(Trainer, "optimizer_step", crash_in_seven)
        run(back, resume=str(folder / "checkpoints/step_00000004"))
    assert find_checkpoint(folder) == model_folder(folder) == folder / "checkpoints/step_00000005"
    run(back, resume="auto")
    assert same(weights(folder), weights(finished))
    assert [path.name for path in complete_checkpoints(folder / "checkpoints")] == ["step_00000012"]


def test_a_refused_resume_leaves_the_configuration_alone(shards_folder: Path, tmp_path: Path) -> None:
    folder = run(short(shards_folder, tmp_path / "run"))
    before = (folder / "config.yaml").read_bytes()
    for override, part in (("model.joint_width=64", "does not fit"), ("train.steps=5", r"train\.steps: 5, but")):
        with pytest.raises(ConfigError, match=part):
            run(short(shards_folder, folder, override), resume="auto", allow=("model.joint_width", "train.steps"))
        assert (folder / "config.yaml").read_bytes() == before


def test_an_unknown_tracker_is_refused(shards_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.trackers\.0: 'foo' is unknown or not installed"):
        run(short(shards_folder, tmp_path / "run", "train.trackers=[foo]"))
