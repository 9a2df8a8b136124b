"""The stream: the same rows on any number of ranks and workers, resumed at the very next one; bad samples are holes."""

from __future__ import annotations

import io
import itertools
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from mmcl.data import ClipStream
from mmcl.data.health import SkipLimits
from mmcl.media.text import ByteTokenizer
from mmcl.shards import load_manifest
from mmcl.types import AudioSpec, Batch, ConfigError, RunError, TextSpec, VideoSpec, View

VIDEO = View(VideoSpec(frames=2, size=32, fps=4.0))
AUDIO = View(AudioSpec(sample_rate_hz=16_000, seconds=0.25))
TEXT = View(TextSpec(ByteTokenizer(32)))
VIEWS = (VIDEO, AUDIO, TEXT)


def stream(folder: Path, **options: object) -> ClipStream:
    options = {"global_batch": 6, "in_process": True, "seed": 3, "views": VIEWS, **options}
    return ClipStream(load_manifest(str(folder)), **options)  # type: ignore[arg-type]


def take(source: ClipStream, count: int) -> list[Batch]:
    return list(itertools.islice(iter(source), count))


def assert_same(left: Batch, right: Batch) -> None:
    assert left.keys == right.keys
    assert left.draws.tolist() == right.draws.tolist()
    assert torch.equal(left.groups, right.groups)
    assert left.skipped == right.skipped
    for view in left.views:
        a, b = left.views[view], right.views[view]
        assert torch.equal(a.present, b.present)
        assert torch.equal(a.data, b.data)
        assert (a.mask is None and b.mask is None) or torch.equal(a.mask, b.mask)


@pytest.fixture(scope="module")
def broken_shards(shards_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The training shards, three of their videos truncated, zeroed and emptied."""
    from mmcl.shards.index import index_shards

    out = tmp_path_factory.mktemp("broken")
    number = 0
    for shard in sorted((shards_folder / "train").glob("*.tar")):
        with tarfile.open(shard) as source, tarfile.open(out / shard.name, "w") as target:
            for member in source.getmembers():
                file = source.extractfile(member)
                assert file is not None
                data = file.read()
                if member.name.endswith(".mp4"):
                    damage = {1: data[: len(data) // 2], 4: b"\0" * len(data), 8: b""}
                    data = damage.get(number, data)
                    number += 1
                member.size = len(data)
                target.addfile(member, io.BytesIO(data))
    index_shards(out)
    return out


def test_every_sample_comes_once_per_epoch(shards_folder: Path) -> None:
    source = stream(shards_folder / "train", global_batch=4)
    keys = [key for batch in take(source, 8) for key in batch.keys]
    assert len(set(keys[:16])) == 16
    assert set(keys[16:]) == set(keys[:16])
    assert keys[:16] != keys[16:]
    assert source.draws == 32
    assert source.epochs == [2.0]


def test_rows_hold_what_they_should(shards_folder: Path) -> None:
    batch = take(stream(shards_folder / "train", global_batch=16), 1)[0]
    assert batch.views[VIDEO].data.shape == (16, 2, 3, 32, 32)
    assert batch.views[VIDEO].data.dtype == torch.uint8
    assert batch.views[AUDIO].data.shape == (16, 4000)
    silent = ~batch.views[AUDIO].present
    assert 0 < int(silent.sum()) < 16, "the generated set has clips without sound"
    assert not batch.views[AUDIO].data[silent].any()
    assert batch.views[AUDIO].data[~silent].abs().amax(1).min() > 0.05
    assert batch.views[TEXT].mask.any(1).all()
    assert batch.groups.shape == (16, 3)


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_together_hold_the_rows_of_one(shards_folder: Path, world_size: int) -> None:
    alone = take(stream(shards_folder / "train"), 4)
    ranks = [take(stream(shards_folder / "train", rank=r, world_size=world_size), 4) for r in range(world_size)]
    for step, whole in enumerate(alone):
        for rank in range(world_size):
            assert ranks[rank][step].keys == whole.keys[rank::world_size]
            for view in (VIDEO, AUDIO):
                assert torch.equal(ranks[rank][step].views[view].data, whole.views[view].data[rank::world_size])


def test_worker_processes_give_the_same_batches(shards_folder: Path) -> None:
    alone = take(stream(shards_folder / "train"), 5)
    for left, right in zip(alone, take(stream(shards_folder / "train", in_process=False, workers=3), 5), strict=True):
        assert_same(left, right)


def test_resume_is_the_very_next_sample(broken_shards: Path) -> None:
    """In the middle of an epoch and of a block, over a bad sample, on another number of workers."""
    whole = take(stream(broken_shards), 6)
    first = stream(broken_shards)
    take(first, 2)
    state = json.loads(json.dumps(first.state_dict()))
    assert state["draws"] == 12
    second = stream(broken_shards, in_process=False, workers=2)
    second.load_state_dict(state)
    for left, right in zip(whole[2:], take(second, 4), strict=True):
        assert_same(left, right)


def test_resume_on_other_ranks(shards_folder: Path) -> None:
    whole = take(stream(shards_folder / "train"), 5)
    other = stream(shards_folder / "train", rank=1, world_size=2)
    other.load_state_dict({"draws": 18, "fingerprint": other.fingerprint(), "quarantine": []})
    assert [batch.keys for batch in take(other, 2)] == [batch.keys[1::2] for batch in whole[3:]]


@pytest.mark.parametrize("change", [{"seed": 4}, {"streams": 2}, {"block": 7}])
def test_a_state_of_another_order_is_refused_by_name(shards_folder: Path, change: dict[str, int]) -> None:
    state = stream(shards_folder / "train").state_dict()
    with pytest.raises(ConfigError, match=next(iter(change))):
        stream(shards_folder / "train", **change).load_state_dict(state)
    with pytest.raises(ConfigError, match="manifest"):
        stream(shards_folder / "test").load_state_dict(state)


def test_a_bad_sample_is_a_hole_that_is_named(broken_shards: Path) -> None:
    batches = take(stream(broken_shards, global_batch=8), 2)
    skipped = [skip for batch in batches for skip in batch.skipped]
    assert len(skipped) == 3
    for batch in batches:
        for draw, key, reason, _detail in batch.skipped:
            row = batch.draws.tolist().index(draw)
            assert key
            assert reason
            assert batch.keys[row] == ""
            assert batch.groups[row].tolist() == [-1, -1, -1]
            for view in VIEWS:
                assert not batch.views[view].present[row]
                assert not batch.views[view].data[row].any()
    good = {key for batch in batches for key in batch.keys} - {""}
    assert len(good) == 13


def test_holes_do_not_move_the_others(shards_folder: Path, broken_shards: Path) -> None:
    """Two manifests of equal sizes give equal places to equal keys, whatever fails."""
    clean = take(stream(shards_folder / "train", global_batch=16), 1)[0]
    holed = take(stream(broken_shards, global_batch=16), 1)[0]
    rows = [row for row, key in enumerate(holed.keys) if key]
    assert [holed.keys[row] for row in rows] == [clean.keys[row] for row in rows]
    assert torch.equal(holed.views[VIDEO].data[rows], clean.views[VIDEO].data[rows])


def test_quarantined_keys_are_holes(shards_folder: Path) -> None:
    source = stream(shards_folder / "train", global_batch=16)
    key = take(source, 1)[0].keys[5]
    again = stream(shards_folder / "train", global_batch=16)
    again.load_state_dict({**again.state_dict(), "quarantine": [key]})
    batch = take(again, 1)[0]
    assert batch.keys[5] == ""
    assert [(skip[1], skip[2]) for skip in batch.skipped] == [(key, "quarantined")]
    assert again.state_dict()["quarantine"] == [key]


def test_evaluation_reads_everything_once_and_ends(shards_folder: Path) -> None:
    keys = []
    for rank in range(2):
        source = stream(
            shards_folder / "test",
            global_batch=6,
            rank=rank,
            world_size=2,
            shuffle=False,
            rule="even",
            with_metadata=True,
        )
        batches = list(source)
        assert [len(batch) for batch in batches] == [3, 3], "every rank makes the same number of forwards"
        keys += [key for batch in batches for key in batch.keys if key]
        assert all(batch.captions[0] for batch in batches)
    assert len(keys) == len(set(keys)) == 8


def test_windows_are_random_in_training_and_fixed_in_evaluation(shards_folder: Path) -> None:
    source = stream(shards_folder / "train", global_batch=16)
    first, second = take(source, 2)
    starts = {
        key: float(start) for key, start in zip(first.keys, first.views[VIDEO].params["start_seconds"], strict=True)
    }
    later = {
        key: float(start) for key, start in zip(second.keys, second.views[VIDEO].params["start_seconds"], strict=True)
    }
    assert sum(starts[key] != later[key] for key in starts) >= 14
    assert np.ptp(list(starts.values())) > 0.5
    even = [take(stream(shards_folder / "train", global_batch=16, shuffle=False, rule="even"), 1)[0] for _ in range(2)]
    assert_same(*even)


def test_a_batch_that_ranks_cannot_share_names_the_nearest(shards_folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"global_batch.*4 processes.*10 rows.*nearest: 8"):
        stream(shards_folder / "train", global_batch=10, world_size=4)


def test_too_many_bad_samples_stop_the_run(broken_shards: Path) -> None:
    batch = take(stream(broken_shards, global_batch=16), 1)[0]
    limits = SkipLimits(in_a_row=100, rate=0.1)
    with pytest.raises(RunError, match=r"max_skipped_rate.*reasons"):
        for _ in range(10):
            limits.watch(batch)
    assert limits.skipped >= 3
    with pytest.raises(RunError, match="in a row"):
        SkipLimits(in_a_row=1, rate=1.0).watch(batch)


def test_resampled_goes_on_exactly_on_any_number_of_ranks(shards_folder: Path) -> None:
    options = {"resampled": True, "samples_per_epoch": 8}
    whole = take(stream(shards_folder / "train", **options), 6)
    begun = stream(shards_folder / "train", **options)
    take(begun, 2)
    assert begun.epochs == [12 / 8]
    keys = [key for batch in whole for key in batch.keys]
    assert len(set(keys[:16])) < 16, "with replacement, some come again before all have come"
    for world_size in (1, 2, 3):
        for rank in range(world_size):
            again = stream(shards_folder / "train", rank=rank, world_size=world_size, **options)
            again.load_state_dict(begun.state_dict())
            for mine, all_rows in zip(take(again, 4), whole[2:], strict=True):
                assert mine.keys == all_rows.keys[rank::world_size]
                assert torch.equal(mine.views[VIDEO].data, all_rows.views[VIDEO].data[rank::world_size])
    with pytest.raises(ConfigError, match=r"resampled: True then, None now"):
        stream(shards_folder / "train").load_state_dict(begun.state_dict())
    # the figure alone: the order does not depend on it
    stream(shards_folder / "train", resampled=True, samples_per_epoch=5).load_state_dict(begun.state_dict())


def test_a_sample_that_is_drawn_again_is_seen_anew(shards_folder: Path) -> None:
    batches = take(stream(shards_folder / "train", resampled=True, global_batch=16), 3)
    seen: dict[str, list[torch.Tensor]] = {}
    for batch in batches:
        for key, pictures in zip(batch.keys, batch.views[VIDEO].data, strict=True):
            seen.setdefault(key, []).append(pictures)
    again = [pictures for pictures in seen.values() if len(pictures) > 1]
    different = [not all(torch.equal(pictures[0], other) for other in pictures[1:]) for pictures in again]
    assert len(again) >= 8 and sum(different) >= 0.8 * len(again)
