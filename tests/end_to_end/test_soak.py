"""Decoding leaves nothing behind: memory of the worker and of the process that reads from it stays flat."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "tools" / "bench"


@pytest.mark.slow
@pytest.mark.parametrize("decoder", ["decord", "pyav"])
def test_memory_is_flat_over_many_samples(tmp_path, monkeypatch, decoder):
    """Sound and damaged ones; a clip (0.3 MB) kept of each would grow the worker by a tenth."""
    monkeypatch.setattr(sys, "path", [str(BENCH), *sys.path])
    from soak import soak, write_shards

    write_shards(tmp_path, clips=2, samples=32, seconds=3.0)
    # small batches: what a worker holds for a moment, for the one that it makes, hides no growth
    report = soak(tmp_path, samples=400, warm_up=160, decoder=decoder, batch=2, every=4, part=3)
    assert report["damaged"] >= 25, report
    assert report["worker"]["growth"] < 0.05 and report["trainer"]["growth"] < 0.05, report
