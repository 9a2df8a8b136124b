"""How often neighbours of a shard meet: against a count over whole epochs, and what is advised."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from mmcl.data.mixing import describe_mixing, enough_block, measure_mixing
from mmcl.data.order import sample_order


@dataclass
class Sizes:
    sizes: np.ndarray


def counted(manifest: Sizes, batch: int, **options: int) -> float:
    """Of all pairs of neighbours, those whose two samples are drawn in one batch."""
    number = {place: draw // batch for draw, place in enumerate(sample_order(manifest, seed=0, epoch=0, **options))}
    pairs = [(shard, i) for shard, size in enumerate(manifest.sizes) for i in range(size - 1)]
    return float(np.mean([number[shard, i] == number[shard, i + 1] for shard, i in pairs]))


@pytest.mark.parametrize(
    ("sizes", "batch", "streams", "block"),
    [([40] * 25, 50, 64, 256), ([100] * 50, 125, 8, 20), ([1, 999, 0, 500, 500], 40, 4, 50), ([3000], 30, 30, 10)],
)
def test_the_rate_is_what_counting_gives(sizes: list[int], batch: int, streams: int, block: int) -> None:
    manifest = Sizes(np.array(sizes))
    found = measure_mixing(manifest, batch=batch, streams=streams, block=block)
    assert found.rate == pytest.approx(counted(manifest, batch, streams=streams, block=block))
    assert found.perfect_rate == pytest.approx((batch - 1) / (sum(sizes) - 1))


def test_a_small_epoch_is_perfectly_mixed_and_a_large_one_is_not() -> None:
    """One permutation below S × block; beyond it a batch takes 4 of each block of 256."""
    small = measure_mixing(Sizes(np.full(50, 300)), batch=256)
    assert 0.7 < small.times < 1.4 and small.mixed
    large = measure_mixing(Sizes(np.full(1000, 1000)), batch=256)
    assert large.rate == pytest.approx(3 / 255, rel=0.1) and large.times > 30 and not large.mixed
    assert measure_mixing(Sizes(np.full(1000, 1000)), batch=64).mixed  # one sample of each stream at most
    huge = measure_mixing(Sizes(np.full(10**6, 10**4)), batch=256)
    assert huge.perfect_rate < 1e-7 and huge.rate > 0.005


def test_what_is_advised() -> None:
    manifest = Sizes(np.full(200, 500))
    block = enough_block(manifest, measure_mixing(manifest, batch=256))
    assert block is not None and block in (1024, 2048)
    assert measure_mixing(manifest, batch=256, block=block).times <= 2
    assert measure_mixing(manifest, batch=256, block=block // 2).times > 2
    facts, lines = describe_mixing(manifest, batch=256, alike=(0.8, 0.01))
    assert facts["reshard"] and facts["enough_block"] == block
    assert lines[-1].startswith("write them anew") and f"data.block={block}" in lines[-1] and "80 %" in lines[1]
    facts, lines = describe_mixing(manifest, batch=256, alike=(0.012, 0.01))
    assert not facts["reshard"] and "nothing to do" in lines[-1]
    assert describe_mixing(manifest, batch=256)[1][-1].startswith("if neighbours are alike")
    facts, lines = describe_mixing(Sizes(np.full(50, 300)), batch=256, alike=(0.8, 0.01))
    assert not facts["reshard"] and len(lines) == 2
    large = Sizes(np.full(10**4, 10**4))
    assert enough_block(large, measure_mixing(large, batch=256)) is None


def test_no_neighbours_at_all() -> None:
    found = measure_mixing(Sizes(np.ones(9, np.int64)), batch=256)
    assert (found.rate, found.times, found.batch) == (0.0, 1.0, 9)
