"""One global batch, shared out; what does not divide is refused with the arithmetic."""

from __future__ import annotations

import pytest
from support.recipes import tiny_config

from mmcl.recipe import TrainOptions
from mmcl.training.large_batch import describe_split
from mmcl.training.launch import describe
from mmcl.types import ConfigError


def options(**given: int) -> TrainOptions:
    return TrainOptions(out="run", steps=1, **given)


def test_the_split_in_words() -> None:
    assert describe_split(options(global_batch=64), 1) == "64 rows = 1 process(es) × 64 rows"
    assert (
        describe_split(options(global_batch=64, micro_batch=8, accumulate=3), 2)
        == "64 rows = 2 process(es) × 4 micro-batches × 8 rows, 3 such losses per step: 192 samples"
    )
    assert describe_split(options(global_batch=64, micro_batch=99), 2) == "64 rows = 2 process(es) × 32 rows"


def test_what_does_not_divide_is_refused_with_the_arithmetic() -> None:
    with pytest.raises(ConfigError, match=r"^train\.global_batch: .* 24 / 5 = 4\.8; nearest: 25$"):
        describe_split(options(global_batch=24), 5)
    message = r"^train\.micro_batch: 24 rows / 2 process\(es\) = 12 rows of a rank, / 5 rows = 2\.4 micro-batches; "
    with pytest.raises(ConfigError, match=message + r"nearest: 4 or 6, or train\.global_batch=20$"):
        describe_split(options(global_batch=24, micro_batch=5), 2)
    # what it names does divide
    for fits in (options(global_batch=24, micro_batch=4), options(global_batch=20, micro_batch=5)):
        describe_split(fits, 2)


def test_a_dry_run_refuses_it_before_anything_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="train\\.global_batch: 3 processes cannot share 16 rows"):
        describe(tiny_config("train.processes=3", "data.shards=nowhere"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="= 8 rows of a rank, / 3 rows"):
        describe(tiny_config("train.micro_batch=3", "data.shards=nowhere"))
