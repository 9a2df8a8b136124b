"""Batches of one pseudo-label: every labelled sample once per epoch, by arithmetic, on any number of ranks."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmcl.data import ClipStream
from mmcl.data.cluster_order import ClusterOrder
from mmcl.data.clusters import Clusters, check_radix, digits_of, read_clusters, with_digit
from mmcl.media.text import ByteTokenizer
from mmcl.shards import load_manifest
from mmcl.types import Batch, ConfigError, TextSpec, View

TEXT = View(TextSpec(ByteTokenizer(16)))

labelled = (
    st.lists(st.tuples(st.integers(0, 8), st.integers(0, 2**31)), min_size=1, max_size=12)
    .flatmap(
        lambda shards: st.tuples(
            st.just([size for size, _ in shards]),
            st.lists(
                st.sampled_from([-1, 0, 3, 7, 70]),
                min_size=sum(size for size, _ in shards),
                max_size=sum(size for size, _ in shards),
            ),
        )
    )
    .filter(lambda both: any(label >= 0 for label in both[1]))
)


def clusters_of(labels: list[int] | np.ndarray, manifest: str = "") -> Clusters:
    return Clusters(np.array(labels, np.int64), (10, 10), manifest)


@given(labelled, st.integers(1, 9), st.integers(0, 3), st.integers(0, 2), st.integers(1, 4), st.integers(1, 5))
@settings(max_examples=60)
def test_every_labelled_sample_once_in_batches_of_one_label(
    both: tuple[list[int], list[int]], batch: int, seed: int, epoch: int, streams: int, block: int
) -> None:
    sizes, labels = both
    order = ClusterOrder(np.array(sizes), clusters_of(labels), batch=batch, seed=seed, streams=streams, block=block)
    rows = order.steps * batch
    source, epochs, shard, index = order.locate(np.arange(epoch * rows, (epoch + 1) * rows))
    assert set(source.tolist()) == {0} and set(epochs.tolist()) == {epoch}
    numbers = np.where(index < 0, -1, np.cumsum([0, *sizes])[shard] + index).reshape(order.steps, batch)
    drawn = numbers[numbers >= 0]
    assert sorted(drawn.tolist()) == [number for number, label in enumerate(labels) if label >= 0]
    for step in numbers:
        held = step[step >= 0]
        assert len(held), "a batch of holes alone"
        assert len({labels[number] for number in held}) == 1
        of_label = labels.count(labels[held[0]])
        assert len(held) >= min(of_label, batch / 2), "what is left over is spread"
        assert (np.diff(step < 0) >= 0).all(), "holes stand at the end, so that ranks share them"
    for draws in (0, batch, rows // 2 // batch * batch, rows):
        done = (index[:draws] >= 0).sum()
        assert order.epochs(epoch * rows + draws) == pytest.approx([epoch + done / len(drawn)])


@given(labelled, st.integers(1, 6), st.integers(1, 4))
@settings(max_examples=20)
def test_a_draw_is_a_pure_function_of_its_number(both: tuple[list[int], list[int]], batch: int, world: int) -> None:
    sizes, labels = both
    order = ClusterOrder(np.array(sizes), clusters_of(labels), batch=batch)
    draws = np.arange(3 * order.steps * batch)
    whole = np.stack(order.locate(draws))
    for rank in range(world):
        alone = ClusterOrder(np.array(sizes), clusters_of(labels), batch=batch).locate(draws[rank::world][::-1])
        assert np.array_equal(np.stack(alone)[:, ::-1], whole[:, rank::world])


def test_the_order_is_this_one_for_ever() -> None:
    order = ClusterOrder(np.array([4, 3, 5]), clusters_of([0, 0, 7, 0, 0, 7, 7, 0, 0, -1, 7, 0]), batch=3, seed=5)
    assert order.steps == 5
    _, epoch, shard, index = order.locate(np.arange(30))
    assert epoch.tolist() == [0] * 15 + [1] * 15
    golden = "12 02 - 11 23 - 20 21 24 03 01 - 10 00 - 20 21 - 01 00 10 11 12 - 03 24 - 02 23 -"
    assert " ".join("-" if i < 0 else f"{s}{i}" for s, i in zip(shard.tolist(), index.tolist(), strict=True)) == golden


def test_epochs_and_seeds_differ() -> None:
    labels = np.arange(200) % 3
    drawn = [
        ClusterOrder(np.full(10, 20), clusters_of(labels), batch=8, seed=seed).locate(np.arange(e * 216, e * 216 + 216))
        for seed, e in [(0, 0), (0, 1), (1, 0)]
    ]
    for a, b in itertools.combinations(drawn, 2):
        assert (20 * a[2] + a[3] != 20 * b[2] + b[3]).mean() > 0.8


def test_a_million_samples_take_no_time_per_batch() -> None:
    """Tables are made once per label and epoch; a draw is arithmetic."""
    order = ClusterOrder(np.full(1000, 1000), clusters_of(np.arange(10**6) * 7919 % 10), batch=512)
    order.locate(np.arange(512 * 40))
    assert len(order._orders) <= 10


def test_labels_are_numbers_in_mixed_radix(tmp_path: Path) -> None:
    labels = np.zeros(60, np.int64)
    digits = np.stack([np.arange(60) % 3, np.arange(60) // 3 % 4, np.arange(60) // 12], 1)
    for stage, radix in enumerate((3, 4, 5)):
        labels = with_digit(labels, digits[:, stage], radix)
    assert len(set(labels.tolist())) == 60
    assert [digits_of(label, (3, 4, 5)) for label in labels.tolist()] == [tuple(row) for row in digits.tolist()]
    with pytest.raises(ValueError, match="below 4"):
        with_digit(labels, np.full(60, 4), 4)
    check_radix([10] * 18)
    with pytest.raises(ConfigError, match="63 bits"):
        check_radix([10] * 19)


def test_a_file_of_labels_is_whole_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "new" / "clusters.safetensors"
    written = clusters_of([3, -1, 3, 0], "abc")
    written.save(path)
    found = read_clusters(path)
    assert found.checksum == written.checksum and found.labels.tolist() == [3, -1, 3, 0]
    assert (found.radix, found.manifest, found.counts) == ((10, 10), "abc", {0: 1, 3: 2})
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    content = bytearray(path.read_bytes())
    content[-8] ^= 1
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="damaged"):
        read_clusters(path)
    path.write_bytes(content[:40])
    with pytest.raises(ConfigError, match="cannot be read"):
        read_clusters(path)
    with pytest.raises(ConfigError, match="No such file"):
        read_clusters(tmp_path / "none")
    assert clusters_of([1, 2], "a").checksum != clusters_of([1, 2], "b").checksum


def stream(folder: Path, labels: list[int] | None = None, **options: object) -> ClipStream:
    manifest = load_manifest(str(folder))
    chosen = [0, 1, 1, 0, 5, 0, 1, 0, 0, 0, 1, 5, 0, -1, 0, 1] if labels is None else labels
    options = {"global_batch": 4, "in_process": True, "seed": 3, **options}
    return ClipStream(manifest, [TEXT], clusters=clusters_of(chosen, manifest.fingerprint), **options)  # type: ignore[arg-type]


def take(source: ClipStream, count: int) -> list[Batch]:
    return list(itertools.islice(iter(source), count))


def test_the_stream_draws_pure_batches_on_ranks_and_workers_and_goes_on(shards_folder: Path) -> None:
    plain = ClipStream(load_manifest(str(shards_folder / "train")), [TEXT], global_batch=16, shuffle=False)
    keys = next(iter(plain)).keys
    label_of = dict(zip(keys, stream(shards_folder / "train").plan.clusters.labels.tolist(), strict=True))  # type: ignore[union-attr]
    source = stream(shards_folder / "train")
    whole = take(source, 10)  # two epochs of 8 / 4 + ⌈5 / 4⌉ + ⌈2 / 4⌉ = 5 batches
    assert source.epochs == [2.0]
    for batch in whole:
        assert len({label_of[key] for key in batch.keys if key}) == 1
        assert not batch.skipped, "holes are no bad samples"
    for epoch in (whole[:5], whole[5:]):
        drawn = [key for batch in epoch for key in batch.keys if key]
        assert sorted(drawn) == sorted(key for key, label in label_of.items() if label >= 0)
    for rank in range(2):
        half = take(stream(shards_folder / "train", rank=rank, world_size=2), 10)
        assert [b.keys for b in half] == [b.keys[rank::2] for b in whole]
    second = stream(shards_folder / "train", in_process=False, workers=2)
    half_way = stream(shards_folder / "train")
    take(half_way, 3)
    second.load_state_dict(json.loads(json.dumps(half_way.state_dict())))
    assert [batch.keys for batch in take(second, 4)] == [batch.keys for batch in whole[3:7]]


def test_mixed_batches_carry_the_label_of_each_row(shards_folder: Path) -> None:
    bare = take(ClipStream(load_manifest(str(shards_folder / "train")), [TEXT], global_batch=4, seed=3), 4)
    assert all(batch.pools is None for batch in bare)
    plain = next(iter(ClipStream(load_manifest(str(shards_folder / "train")), [TEXT], global_batch=16, shuffle=False)))
    source = stream(shards_folder / "train", mixed_clusters=True)
    label_of = dict(zip(plain.keys, source.plan.clusters.labels.tolist(), strict=True))  # type: ignore[union-attr]
    whole = take(source, 4)
    for batch, same in zip(whole, bare, strict=True):
        assert batch.keys == same.keys, "the usual order"
        assert batch.pools is not None and batch.pools.tolist() == [label_of[key] for key in batch.keys]
    workers = take(stream(shards_folder / "train", mixed_clusters=True, in_process=False, workers=2), 4)
    assert [batch.pools.tolist() for batch in workers] == [batch.pools.tolist() for batch in whole]  # type: ignore[union-attr]
    assert "global batch" not in source.fingerprint() and "clusters" in source.fingerprint()
    assert all(batch.pools is None for batch in take(stream(shards_folder / "train"), 1))


def test_a_state_of_other_labels_or_batches_is_refused(shards_folder: Path) -> None:
    state = stream(shards_folder / "train").state_dict()
    with pytest.raises(ConfigError, match="clusters"):
        stream(shards_folder / "train", labels=[0] * 16).load_state_dict(state)
    with pytest.raises(ConfigError, match="global batch"):
        stream(shards_folder / "train", global_batch=8).load_state_dict(state)
    manifest = load_manifest(str(shards_folder / "train"))
    bare = ClipStream(manifest, [TEXT], global_batch=4)
    assert "clusters" not in bare.fingerprint()
    with pytest.raises(ConfigError, match="clusters"):
        bare.load_state_dict(state)


def test_labels_of_other_shards_are_refused(shards_folder: Path) -> None:
    manifest = load_manifest(str(shards_folder / "train"))
    with pytest.raises(ConfigError, match="other shards"):
        ClipStream(manifest, [TEXT], global_batch=4, clusters=clusters_of([0] * 16, "another"))
    labels = clusters_of([0] * 16, manifest.fingerprint)
    with pytest.raises(ConfigError, match="one indexed folder"):
        ClipStream([(manifest, 1), (manifest, 1)], [TEXT], global_batch=4, clusters=labels)
    with pytest.raises(ConfigError, match="one indexed folder"):
        ClipStream(manifest, [TEXT], global_batch=4, shuffle=False, clusters=labels)
    with pytest.raises(ConfigError, match="no sample has a label"):
        ClusterOrder(np.array([2]), clusters_of([-1, -1]), batch=2)
