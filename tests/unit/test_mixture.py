"""Several sources in one stream: shares exact over P rows, each source's own epochs, one order on any machine."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.recipes import TINY, tiny_overrides

import mmcl
from mmcl.data import ClipStream
from mmcl.data.order import (
    MixedOrder,
    SampleOrder,
    fitting_workers,
    rank_rows,
    reduced_weights,
    spread_evenly,
    stream_sharing,
    worker_rows,
)
from mmcl.media.text import ByteTokenizer
from mmcl.shards import load_manifest
from mmcl.shards.manifest import Manifest, ShardEntry, write_manifest
from mmcl.training.launch import pretrain
from mmcl.types import ConfigError, TextSpec, View

VIEWS = (View(TextSpec(ByteTokenizer(32))),)

sizes_strategy = st.lists(st.integers(0, 20), min_size=1, max_size=6).filter(lambda sizes: sum(sizes) > 0)
sources_strategy = st.lists(st.tuples(sizes_strategy, st.integers(1, 12)), min_size=1, max_size=4)


def mixed(sources: list[tuple[list[int], int]], *, streams: int = 8, seed: int = 0, block: int = 5) -> MixedOrder:
    sizes = [np.array(sizes) for sizes, _ in sources]
    return MixedOrder(sizes, [weight for _, weight in sources], streams=streams, seed=seed, block=block)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=6))
def test_the_table_is_spread_evenly(weights: list[int]) -> None:
    table = spread_evenly(weights)
    assert np.bincount(table, minlength=len(weights)).tolist() == weights
    for source, weight in enumerate(weights):
        visits = np.concatenate([[0], np.cumsum(table == source)])
        wanted = weight / sum(weights) * np.arange(sum(weights) + 1)
        assert np.abs(visits - wanted).max() <= len(weights)


@given(sources_strategy, st.integers(1, 9), st.integers(0, 3))
@settings(max_examples=80)
def test_shares_are_exact_over_p_rows(sources: list, streams: int, start: int) -> None:
    """P rows are P·A draws; ``drawn`` counts as one that looks at each draw does."""
    order = mixed(sources, streams=streams)
    rows = order.period * streams
    source, *_ = order.locate(np.arange(start * rows, (start + 1) * rows))
    assert np.bincount(source, minlength=len(sources)).tolist() == [weight * streams for weight in order.weights]
    source, *_ = order.locate(np.arange(rows + 3))
    assert order.drawn(rows + 3) == np.bincount(source, minlength=len(sources)).tolist()


def largest_error(weights: list[int], streams: int, start: int, draws: int) -> float:
    """Of all windows of 1,000 draws among these, how far the share of a source is off at most."""
    source, *_ = mixed([([50], weight) for weight in weights], streams=streams).locate(np.arange(start, start + draws))
    visits = np.cumsum(source[None] == np.arange(len(weights))[:, None], 1)
    shares = (visits[:, 1000:] - visits[:, :-1000]) / 1000
    return float(np.abs(shares - np.array(weights)[:, None] / sum(weights)).max())


@given(st.lists(st.integers(1, 300), min_size=2, max_size=5), st.integers(0, 10**7))
@settings(max_examples=40)
@example([49, 64, 64], 0)
@example([1, 64], 0)
@example([64, 64, 1], 0)
@example([55, 89], 0)
@example([4, 1, 2], 0)
def test_shares_hold_over_any_thousand_draws(weights: list[int], start: int) -> None:
    """Whatever the period."""
    assert largest_error(weights, 64, start, 3000) <= 0.02


@given(st.lists(st.integers(1, 300), min_size=2, max_size=5), st.integers(1, 512), st.integers(0, 10**7))
@settings(max_examples=40)
@example([1, 1], 58, 0)
@example([1, 1], 192, 0)
@example([1, 1], 512, 0)
@example([1, 3], 65, 0)
def test_shares_hold_on_any_number_of_streams(weights: list[int], streams: int, start: int) -> None:
    assert largest_error(weights, streams, start, 2000) <= (0.02 if streams >= 64 else 0.025)


@given(sources_strategy, st.integers(1, 70))
@settings(max_examples=30)
def test_every_column_gets_its_share_of_every_source(sources: list, streams: int) -> None:
    """In P rows exactly; and the draw numbers of a column in a source are its visits there, one by one."""
    order = mixed(sources, streams=streams)
    draws = np.arange(2 * order.period * streams)
    source, own = order.source_draws(draws)
    for column in {0, streams // 2, streams - 1}:
        here = draws % streams == column
        once = source[here][: order.period]
        assert np.bincount(once, minlength=len(sources)).tolist() == list(order.weights)
        for number in range(len(sources)):
            visits = own[here & (source == number)]
            assert visits.tolist() == [streams * v + column for v in range(len(visits))]


@given(sources_strategy, st.integers(1, 9), st.integers(0, 5))
@settings(max_examples=30)
def test_every_source_has_epochs_of_its_own(sources: list, streams: int, seed: int) -> None:
    """In draws of a source alone, every sample comes once per epoch, and where is what its own order says."""
    order = mixed(sources, streams=streams, seed=seed)
    draws = np.arange(order.period * streams * 40)
    source, epoch, shard, index = order.locate(draws)
    for number, (sizes, _) in enumerate(sources):
        here = source == number
        own = np.sort(order.source_draws(draws[here])[1])
        # no draw of the source is left out or taken twice, but for columns that are further than others
        whole = own[: len(own) - streams * order.period]
        assert whole.tolist() == list(range(len(whole)))
        for e in range(len(whole) // sum(sizes)):
            seen = sorted(zip(shard[here & (epoch == e)].tolist(), index[here & (epoch == e)].tolist(), strict=True))
            assert seen == [(s, i) for s, size in enumerate(sizes) for i in range(size)]


@given(sizes_strategy, st.integers(1, 9), st.integers(0, 1000), st.integers(1, 9))
@settings(max_examples=50)
def test_one_source_is_no_mixture(sizes: list[int], streams: int, start: int, weight: int) -> None:
    draws = np.arange(start, start + 100)
    source, *places = mixed([(sizes, weight)], streams=streams).locate(draws)
    alone = SampleOrder(np.array(sizes), streams=streams, block=5).locate(draws)
    assert not source.any()
    for ours, theirs in zip(places, alone, strict=True):
        assert ours.tolist() == theirs.tolist()


@given(
    sources_strategy,
    st.sampled_from([1, 2, 3, 4, 8]),
    st.sampled_from([1, 2, 4]),
    st.integers(0, 500),
    st.sampled_from([24, 48, 72]),
)
@settings(max_examples=60)
def test_the_same_rows_for_any_ranks_and_workers(
    sources: list, world: int, workers: int, step: int, batch: int
) -> None:
    """Each worker asks for its own draws alone, from an order of its own that may have begun anywhere."""
    whole = np.stack(mixed(sources, streams=192).locate(np.arange(step * batch, (step + 1) * batch)))
    for rank in range(world):
        mine = rank_rows(step, global_batch=batch, rank=rank, world_size=world)
        count = fitting_workers(workers, len(mine))
        for worker in range(count):
            order = mixed(sources, streams=192)
            order.locate(worker_rows(mine - batch * min(step, 1), worker=worker, workers=count))  # the batch before
            part = np.stack(order.locate(worker_rows(mine, worker=worker, workers=count)))
            assert part.tolist() == whole[:, rank::world][:, worker::count].tolist()


def test_each_worker_keeps_to_its_own_columns_of_every_source() -> None:
    """With ranks × workers a divisor of S, workers share no stream of any source."""
    order = mixed([([500, 700], 3), ([900], 1)], streams=8)
    draws = np.arange(8 * 4 * 10)
    _, own = order.source_draws(draws)
    assert (own % 8 == draws % 8).all()


def test_golden_values() -> None:
    """Part of the format of a run."""
    assert spread_evenly([3, 1]).tolist() == [0, 0, 1, 0]
    assert reduced_weights([70, 30]) == (7, 3)
    order = mixed([([3, 4], 3), ([5], 1)], streams=4, block=2)
    assert [int(part.sum()) for part in order.locate(np.arange(64))] == [16, 159, 27, 90]
    source, own = order.source_draws(np.arange(16))
    assert source.tolist() == [0, 0, 1, 0, 0, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 1]
    assert own.tolist() == [0, 1, 2, 3, 4, 1, 2, 7, 0, 5, 6, 11, 8, 9, 10, 3]


@pytest.mark.parametrize("weights", [[1, 0], [9_999, 2]])
def test_impossible_weights(weights: list[int]) -> None:
    with pytest.raises(ValueError, match="weights"):
        mixed([([5], weight) for weight in weights])


@pytest.mark.parametrize(
    ("streams", "workers", "sharing"), [(64, 1, 1), (64, 16, 1), (64, 6, 3), (64, 3, 3), (192, 6, 1), (64, 128, 2)]
)
def test_how_many_workers_read_a_stream(streams: int, workers: int, sharing: int) -> None:
    assert stream_sharing(streams, workers) == sharing
    readers: dict[int, set[int]] = {}
    for draw in range(streams * workers):
        readers.setdefault(draw % streams, set()).add(draw % workers)
    assert {len(each) for each in readers.values()} == {sharing}


def remote(manifest: Manifest) -> Manifest:
    return Manifest(
        "https://shards.test/train",
        manifest.sizes,
        manifest.shard_bytes,
        manifest.checksums,
        manifest.name_start,
        manifest.names,
    )


def test_remote_streams_are_not_shared_unasked(tmp_path: Path) -> None:
    manifest = remote(write_manifest(tmp_path, [ShardEntry("a.tar", 100)]))
    options = {"views": VIEWS, "global_batch": 12, "world_size": 3, "workers": 2}
    with pytest.raises(ConfigError, match=r"64 streams.*6 decoding workers.*by 3 of them.*multiple of 6, e.g. 66, or"):
        ClipStream(manifest, **options)  # type: ignore[arg-type]
    assert ClipStream(manifest, **options, streams=66).sharing == 1  # type: ignore[arg-type]
    assert ClipStream(manifest, **options, allow_shared_streams=True).sharing == 3  # type: ignore[arg-type]
    assert ClipStream(manifest, **options, shuffle=False).sharing == 1  # type: ignore[arg-type]


def test_a_mixed_stream_goes_on_where_it_stopped(shards_folder: Path) -> None:
    """16 and 8 samples, 2 : 1 by weight: both have made an epoch after 24 draws, but for columns ahead of others."""
    sources = [(load_manifest(shards_folder / name), weight) for name, weight in (("train", 2), ("test", 1))]

    def stream(weights: tuple[int, int] = (2, 1), **options: object) -> ClipStream:
        options = {"global_batch": 6, "seed": 3, "streams": 2, "in_process": True, **options}
        pairs = [(manifest, weight) for (manifest, _), weight in zip(sources, weights, strict=True)]
        return ClipStream(pairs, VIEWS, **options)  # type: ignore[arg-type]

    first = stream()
    whole = [batch.keys for batch in itertools.islice(iter(first), 8)]
    assert first.epochs == [2.0, 2.0]
    assert {len([key for keys in whole for key in keys if key == name]) for name in {*whole[0], *whole[3]}} == {2}
    before = stream((20, 10))
    list(itertools.islice(iter(before), 3))
    state = json.loads(json.dumps(before.state_dict()))
    for rank in range(2):
        source = stream(rank=rank, world_size=2, in_process=rank == 0, workers=3)
        source.load_state_dict(state)
        assert [batch.keys for batch in itertools.islice(iter(source), 5)] == [keys[rank::2] for keys in whole[3:]]
    with pytest.raises(ConfigError, match=r"weights: \[2, 1\] then, \[1, 1\] now"):
        stream((1, 1)).load_state_dict(state)
    with pytest.raises(ConfigError, match=r"manifest.*weights: \[2, 1\] then, None now"):
        ClipStream(sources[0][0], VIEWS, global_batch=6, seed=3, streams=2).load_state_dict(state)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.shards=null", "data: needs either shards"),
        ("data.sources=[{shards: x}]", "data: needs either shards"),
        ("data.sources=[{shards: x, weight: 0}]", r"data\.sources\.0\.weight: "),
        ("data.sources=[{shards: x, weight: 0.5}]", r"data\.sources\.0\.weight: .*valid integer"),
    ],
)
def test_exactly_one_way_to_name_shards(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        mmcl.load_config(TINY, [override])


def test_a_run_on_a_mixture_counts_epochs_of_each(shards_folder: Path, tmp_path: Path) -> None:
    sources = f"[{{shards: {shards_folder / 'train'}, weight: 2}}, {{shards: {shards_folder / 'test'}}}]"
    config = mmcl.load_config(
        TINY,
        tiny_overrides(
            "data.shards=null",
            f"data.sources={sources}",
            "data.streams=2",
            "train.global_batch=12",
            "train.steps=2",
            out=tmp_path / "run",
        ),
    )
    pretrain(config)
    last = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1])
    assert (last["epoch/0"], last["epoch/1"]) == (1.0, 1.0)
    with pytest.raises(ConfigError, match="weights, without common factor, add up to 20,001"):
        ClipStream([(load_manifest(shards_folder / "test"), w) for w in (20_000, 1)], VIEWS, global_batch=4)
