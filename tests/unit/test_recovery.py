"""A decoding worker that dies or stands still costs one sample, which is named; nothing else is lost or repeated."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support.deadly import make_deadly
from support.gloo import GlooPool
from support.recipes import tiny_config

from mmcl.data import ClipStream
from mmcl.data.collate import pack, unpack
from mmcl.data.health import append_quarantine, read_quarantine
from mmcl.data.journal import NAME_BYTES, Journal, Note
from mmcl.distributed import Comm
from mmcl.media.text import ByteTokenizer
from mmcl.shards import load_manifest
from mmcl.training import trainer as training
from mmcl.training.launch import pretrain
from mmcl.types import AudioSpec, Batch, RunError, TextSpec, VideoSpec, View

VIEWS = (
    View(VideoSpec(frames=2, size=32, fps=4.0)),
    View(AudioSpec(sample_rate_hz=16_000, seconds=0.25)),
    View(TextSpec(ByteTokenizer(32))),
)
EPOCH = 4
"""batches of 4 in 16 samples"""


def stream(folder: Path, fates: Mapping[str, str] | None = None, **options: object) -> ClipStream:
    options = {"global_batch": 4, "seed": 3, "workers": 1, "decoder": "pyav", "timeout_seconds": 60.0, **options}
    source = ClipStream(load_manifest(str(folder)), VIEWS, **options)  # type: ignore[arg-type]
    return make_deadly(source, fates or {})


def take(source: ClipStream, count: int) -> list[Batch]:
    return list(itertools.islice(iter(source), count))


def keys_of(batches: list[Batch]) -> list[str]:
    return [key for batch in batches for key in batch.keys]


@pytest.fixture(scope="module")
def train(shards_folder: Path) -> Path:
    return shards_folder / "train"


@pytest.fixture(scope="module")
def clean(train: Path) -> list[Batch]:
    """Two epochs without trouble."""
    return take(stream(train, in_process=True), 2 * EPOCH)


def assert_only_missing(batches: list[Batch], clean: list[Batch], missing: set[str], rank: int, world: int) -> None:
    """Row for row what an untroubled stream gives, but for holes where ``missing`` would be."""
    for batch, whole in zip(batches, clean, strict=True):
        wanted = whole.keys[rank::world]
        assert batch.keys == tuple("" if key in missing else key for key in wanted)
        named = {(key, reason) for _, key, reason, _ in batch.skipped}
        assert named == {(key, "quarantined") for key in wanted if key in missing}
        for view in VIEWS[:2]:
            good = torch.tensor([key not in missing for key in wanted])
            assert torch.equal(batch.views[view].data[good], whole.views[view].data[rank::world][good])
            assert not batch.views[view].data[~good].any()


@pytest.mark.parametrize(
    ("world", "workers", "fate"),
    [
        (1, 2, "SIGSEGV"),
        (2, 1, "SIGSTOP"),
        pytest.param(1, 1, "SIGKILL", marks=pytest.mark.slow),
        pytest.param(2, 2, "SIGKILL", marks=pytest.mark.slow),
    ],
)
def test_a_lost_worker_costs_its_sample_alone(
    train: Path, clean: list[Batch], tmp_path: Path, world: int, workers: int, fate: str
) -> None:
    """Two samples in the middle of an epoch end their worker; two epochs are read over it."""
    order = keys_of(clean)
    fates = {order[6]: fate, order[11]: "SIGKILL"}
    quarantined: set[str] = set()
    for rank in range(world):
        file = tmp_path / "run" / "quarantine.jsonl"
        source = stream(
            train,
            fates,
            rank=rank,
            world_size=world,
            workers=workers,
            quarantine_file=file,
            timeout_seconds=1.5 if fate == "SIGSTOP" else 60.0,
        )
        source.add_quarantine(quarantined)
        batches = take(source, 2 * EPOCH)
        quarantined |= source.quarantine
        mine = {key for batch in clean[:EPOCH] for key in batch.keys[rank::world]} & fates.keys()
        assert mine <= source.quarantine
        assert_only_missing(batches, clean, set(fates) & quarantined, rank, world)
        assert source.draws == 2 * EPOCH * 4
        assert source.state_dict()["quarantine"] == sorted(quarantined)
    records = {record["key"]: record for record in map(json.loads, file.read_text().splitlines())}
    assert records.keys() == fates.keys() == read_quarantine(file)
    first = records[order[6]]
    assert first["draw"] == 6
    assert first["reason"] == ("worker_hung" if fate == "SIGSTOP" else "worker_died")
    assert ("1.5 s (data.timeout_seconds)" if fate == "SIGSTOP" else fate) in first["detail"]


def test_a_shard_that_cannot_be_opened_is_left_after_the_timeout(
    train: Path, clean: list[Batch], tmp_path: Path
) -> None:
    """A pipe that nobody writes to, in place of a shard: its samples have no keys yet, their places are noted."""
    for file in train.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    manifest = load_manifest(str(tmp_path))
    last = manifest.num_shards - 1
    assert manifest.sizes[last] == 1
    shard = Path(manifest.shard_url(last))
    shard.unlink()
    os.mkfifo(shard)
    batches = take(stream(tmp_path, timeout_seconds=1.0), EPOCH)
    assert [skip[1:3] for batch in batches for skip in batch.skipped] == [(f"{shard}#0", "quarantined")]
    assert len(set(keys_of(batches)) - {""}) == 15
    assert set(keys_of(batches)) < {*keys_of(clean), ""}


def test_a_worker_killed_from_outside_costs_at_most_one_sample(train: Path, clean: list[Batch]) -> None:
    """As the kernel does where memory ends: whatever it was at is quarantined, everything else comes, once."""
    others = set(multiprocessing.active_children())
    source = stream(train, workers=2)
    batches = []
    for batch in itertools.islice(iter(source), 2 * EPOCH):
        batches.append(batch)
        if len(batches) == 2:
            mine = [process for process in multiprocessing.active_children() if process not in others]
            assert len(mine) == 2
            mine[0].kill()
    assert len(source.quarantine) <= 1
    missing = {key for batch in batches for _, key, _, _ in batch.skipped}
    assert missing <= source.quarantine
    for batch, whole in zip(batches, clean, strict=True):
        assert all(mine in (key, "") for mine, key in zip(batch.keys, whole.keys, strict=True))
    assert sum(key == "" for key in keys_of(batches)) == sum(len(batch.skipped) for batch in batches)


def test_nothing_outlives_a_trainer_that_is_killed(train: Path) -> None:
    """SIGKILL to the process that reads: its workers and their fork server end too, full queues or not."""
    program = (
        "import sys, time; from mmcl.data import ClipStream; from mmcl.shards import load_manifest\n"
        "from mmcl.media.text import ByteTokenizer; from mmcl.types import TextSpec, View\n"
        "if __name__ == '__main__':\n"
        "    views = (View(TextSpec(ByteTokenizer(32))),)\n"
        "    stream = ClipStream(load_manifest(sys.argv[1]), views, global_batch=4, seed=3, workers=2)\n"
        "    batches = iter(stream); next(batches); print('reading', flush=True); time.sleep(100)\n"
    )
    command = [sys.executable, "-c", program, str(train)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "reading\n"
        finally:
            process.kill()
        # every process that it started holds the other end of this pipe: it ends when the last of them does
        assert process.communicate(timeout=90) == ("", None)


def test_mistakes_of_ours_and_missing_shards_always_raise(train: Path, clean: list[Batch], tmp_path: Path) -> None:
    source = stream(train, {keys_of(clean)[5]: "mistake"})
    with pytest.raises(RuntimeError, match="a mistake in our own code"):
        take(source, EPOCH)
    assert source.quarantine == frozenset()
    for file in train.iterdir():
        if file.suffix != ".tar":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(RunError, match=r"^cannot read .*\.tar: No such file"):
        take(stream(tmp_path), 1)


@pytest.mark.slow
def test_a_loader_that_gets_nowhere_stops_the_run(train: Path, clean: list[Batch]) -> None:
    source = stream(train, dict.fromkeys(keys_of(clean), "SIGKILL"))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(RunError, match=r"2 samples cost.*data\.decoder=pyav"):
        patch.setattr("mmcl.data.stream.SAMPLE_LOSSES", 2)
        take(source, 1)


def test_a_batch_crosses_as_one_tensor(clean: list[Batch]) -> None:
    back = unpack(pack(clean[0]), VIEWS)
    assert isinstance(back, Batch)
    assert back.keys == clean[0].keys
    assert torch.equal(back.groups, clean[0].groups)
    for view in VIEWS:
        ours, theirs = clean[0].views[view], back.views[view]
        assert torch.equal(ours.data, theirs.data)
        assert torch.equal(ours.present, theirs.present)
        assert ours.params.keys() == theirs.params.keys()
    error = unpack(pack(RunError("no shard")), VIEWS)
    assert isinstance(error, RunError)
    assert str(error) == "no shard"


def test_the_journal_keeps_what_fits() -> None:
    journal = Journal(2)
    journal.open(1)
    assert (journal.pid(0), journal.pid(1), journal.note(1)) == (0, os.getpid(), None)
    journal.begin(1, 0)
    assert journal.note(1) == Note(0, None)
    journal.name(1, "ключ")
    assert journal.note(1) == Note(0, "ключ")
    journal.name(1, "é" * NAME_BYTES)
    assert journal.note(1) == Note(0, "é" * (NAME_BYTES // 2))
    journal.begin(1, 7)
    assert journal.note(1) == Note(7, None)
    journal.clear(1)
    assert journal.note(1) is None


def test_a_torn_quarantine_file_is_read_as_far_as_it_goes(tmp_path: Path) -> None:
    file = tmp_path / "new" / "quarantine.jsonl"
    assert read_quarantine(file) == set()
    append_quarantine(file, [{"key": "a\n"}, {"key": "b\u2028"}])
    file.write_bytes(file.read_bytes() + b'{"key": "c')
    assert read_quarantine(file) == {"a\n", "b\u2028"}


def test_a_run_survives_and_remembers(
    shards_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Quarantined in its folder and its checkpoint; a later epoch of a resumed run has the hole without a death."""

    def config(steps: int, workers: int) -> training.RunConfig:
        places = {"shards": shards_folder / "train", "out": tmp_path / "run"}
        few = ("train.global_batch=8", "train.checkpoint_every=2", "train.log_every=1", f"train.steps={steps}")
        return tiny_config(*few, f"data.in_process={not workers}", f"data.workers={workers}", **places)

    build = training.build_stream
    victim = take(build(config(2, 0), VIEWS, Comm()), 1)[0].keys[3]

    def deadly(*args: object) -> ClipStream:
        return make_deadly(build(*args), {victim: "SIGKILL"})  # type: ignore[arg-type]

    monkeypatch.setattr(training, "build_stream", deadly)
    pretrain(config(2, 1))
    folder = tmp_path / "run"
    assert read_quarantine(folder / "quarantine.jsonl") == {victim}
    state = json.loads((folder / "checkpoints/step_00000002/state.json").read_text())
    assert state["stream"]["quarantine"] == [victim]
    monkeypatch.setattr(training, "build_stream", build)
    pretrain(config(4, 0), resume="auto", allow=["train.steps"])
    skipped = [json.loads(line) for line in (folder / "skipped.jsonl").read_text().splitlines()]
    assert [(entry["key"], entry["reason"], entry["draw"] // 16) for entry in skipped] == [
        (victim, "quarantined", 0),
        (victim, "quarantined", 1),
    ]
    assert f"sample {victim} is quarantined: its decoding process ended with SIGKILL" in capfd.readouterr().out
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert (last["epoch"], last["skipped"]) == (2.0, 2)


def _share(rank: int, world: int, folder: str) -> list[str]:
    source = ClipStream(load_manifest(folder), VIEWS, global_batch=4, rank=rank, world_size=world)
    source.add_quarantine([f"of rank {rank}"])
    training.Trainer._share_quarantine(SimpleNamespace(comm=Comm.current(), stream=source))  # type: ignore[arg-type]
    return sorted(source.quarantine)


def test_ranks_share_what_they_quarantine(gloo: GlooPool, train: Path) -> None:
    assert gloo(2, _share, str(train)) == [["of rank 0", "of rank 1"]] * 2
