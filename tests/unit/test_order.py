"""The order of samples: every sample once per epoch, the same on any machine, by arithmetic alone."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmcl.data.order import MixedOrder, SampleOrder, fitting_workers, rank_rows, sample_order, worker_rows
from mmcl.hashing import hash64, uniform

sizes_strategy = st.lists(st.integers(0, 40), min_size=1, max_size=30).filter(lambda sizes: sum(sizes) > 0)


@dataclass
class Sizes:
    sizes: np.ndarray


@given(sizes_strategy, st.integers(0, 5), st.integers(0, 3), st.integers(1, 9), st.integers(1, 12))
@settings(max_examples=150)
def test_every_sample_once_per_epoch(sizes: list[int], seed: int, epoch: int, streams: int, block: int) -> None:
    manifest = Sizes(np.array(sizes))
    drawn = list(sample_order(manifest, seed=seed, epoch=epoch, streams=streams, block=block))
    assert sorted(drawn) == [(shard, index) for shard, size in enumerate(sizes) for index in range(size)]


@given(sizes_strategy, st.integers(0, 3), st.integers(1, 5), st.integers(1, 6))
@settings(max_examples=50)
def test_draws_are_a_pure_function_of_their_number(sizes: list[int], seed: int, streams: int, block: int) -> None:
    total = sum(sizes)
    draws = np.arange(3 * total)
    whole = SampleOrder(np.array(sizes), seed=seed, streams=streams, block=block).locate(draws)
    one_by_one = SampleOrder(np.array(sizes), seed=seed, streams=streams, block=block)
    for draw in np.random.default_rng(0).permutation(draws)[:40]:
        single = one_by_one.locate(np.array([draw]))
        assert [int(part[draw]) for part in whole] == [int(part[0]) for part in single]
    epochs = whole[0]
    assert epochs.tolist() == np.repeat([0, 1, 2], total).tolist()


def test_golden_values() -> None:
    """These numbers are part of the format of a run: a change of them breaks every resume."""
    assert f"{int(hash64(1, 2, 3)):016x}" == "48cf5028b6df10db"
    assert uniform(7, np.arange(2)).tolist() == pytest.approx([0.5940964974252599, 0.8962506218100144], abs=0)
    order = list(sample_order(Sizes(np.array([3, 2, 4])), seed=1, epoch=0))
    assert order == [(2, 1), (0, 2), (0, 1), (1, 1), (2, 2), (2, 3), (1, 0), (0, 0), (2, 0)]
    order = list(sample_order(Sizes(np.array([5, 6, 7])), seed=1, epoch=2, streams=2, block=3))
    assert order == [
        (2, 0),
        (0, 3),
        (1, 5),
        (0, 2),
        (2, 1),
        (0, 1),
        (2, 3),
        (0, 4),
        (2, 4),
        (1, 0),
        (2, 2),
        (1, 1),
        (2, 6),
        (1, 2),
        (2, 5),
        (1, 3),
        (0, 0),
        (1, 4),
    ]


def test_epochs_differ_and_seeds_differ() -> None:
    manifest = Sizes(np.array([50, 50]))
    orders = [tuple(sample_order(manifest, seed=s, epoch=e)) for s, e in [(0, 0), (0, 1), (1, 0)]]
    assert len(set(orders)) == 3


@given(
    st.lists(st.integers(0, 200), min_size=50, max_size=50),
    st.sampled_from([30, 300, 1_000, 20_000]),
    st.integers(0, 2**40),
    st.integers(0, 2**30),
)
@settings(max_examples=60)
def test_a_batch_mixes_shards(extra: list[int], size: int, seed: int, start: int) -> None:
    """A batch of 256 draws from 50 shards of about one size touches at least 45 of them at default settings."""
    order = SampleOrder(size + np.array(extra) * size // 1000, seed=seed)
    _, shards, _ = order.locate(np.arange(start, start + 256))
    assert len(set(shards.tolist())) >= 45


@given(sizes_strategy, st.integers(0, 3), st.integers(1, 5), st.integers(1, 6))
@settings(max_examples=50)
def test_resampled_draws_are_a_function_of_their_number_alone(
    sizes: list[int], seed: int, streams: int, block: int
) -> None:
    order = SampleOrder(np.array(sizes), seed=seed, streams=streams, block=block, resampled=True)
    draws = np.arange(200)
    epoch, shard, index = order.locate(draws)
    assert (epoch == draws).all(), "each draw is augmented by numbers of its own"
    assert ((index >= 0) & (index < np.array(sizes)[shard])).all()
    again = SampleOrder(np.array(sizes), seed=seed, resampled=True)
    for draw in np.random.default_rng(seed).permutation(draws)[:20]:
        assert [int(x) for x in again.locate(np.array(draw))] == [epoch[draw], shard[draw], index[draw]]


def test_resampled_draws_are_with_replacement_and_each_sample_is_as_likely() -> None:
    sizes, draws = np.array([30, 0, 50, 20]), 100_000
    _, shard, index = SampleOrder(sizes, seed=1, resampled=True).locate(np.arange(draws))
    counts = np.bincount((np.cumsum(sizes) - sizes)[shard] + index, minlength=100)
    chi_square = float(((counts - draws / 100) ** 2 / (draws / 100)).sum())
    assert 60 < chi_square < 150  # of 99 degrees of freedom: outside once in a thousand
    _, shard, index = SampleOrder(sizes, seed=1, resampled=True).locate(np.arange(100))
    assert 50 <= len(set(zip(shard.tolist(), index.tolist(), strict=True))) <= 76  # 1 − 1/e of them, not all
    mixed = MixedOrder([np.array([10]), np.array([10])], [3, 1], seed=2, streams=4, resampled=True)
    assert np.bincount(mixed.locate(np.arange(4000))[0]).tolist() == [3000, 1000]


def test_without_shuffle_shards_are_read_in_order() -> None:
    epoch, shard, index = SampleOrder(np.array([2, 0, 3]), shuffle=False).locate(np.arange(5))
    assert shard.tolist() == [0, 0, 2, 2, 2]
    assert index.tolist() == [0, 1, 0, 1, 2]
    assert epoch.tolist() == [0] * 5


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("workers", [1, 2, 4])
def test_ranks_and_workers_share_a_batch_in_draw_order(world_size: int, workers: int) -> None:
    """Rank r's row i is draw tB + r + iW; worker j decodes rows i ≡ j (mod w); interleaved they are the batch again."""
    batch, step = 48, 5
    rows = {}
    for rank in range(world_size):
        mine = rank_rows(step, global_batch=batch, rank=rank, world_size=world_size)
        count = fitting_workers(workers, len(mine))
        parts = [worker_rows(mine, worker=j, workers=count) for j in range(count)]
        assert {len(part) for part in parts} == {len(mine) // count}
        assert np.stack(parts, 1).reshape(-1).tolist() == mine.tolist()
        rows[rank] = mine
    gathered = np.stack([rows[rank] for rank in range(world_size)], 1).reshape(-1)
    assert gathered.tolist() == list(range(step * batch, (step + 1) * batch))


def test_very_many_samples_need_little() -> None:
    """Ten billion samples in a hundred thousand shards: one batch from the middle, without a list of samples."""
    order = SampleOrder(np.full(100_000, 100_000), seed=0)
    epoch, shard, index = order.locate(np.arange(5 * 10**9, 5 * 10**9 + 64))
    assert set(epoch.tolist()) == {0}
    assert shard.max() < 100_000
    assert index.max() < 100_000
    assert len(set(zip(shard.tolist(), index.tolist(), strict=True))) == 64


def test_the_order_needs_no_torch():
    """Opening a manifest and finding a position is quick and small in any process."""
    code = "import sys, mmcl.data.order, mmcl.shards.manifest; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
