"""Every objective with every method is the same on 1, 2 and 3 processes, and with holes or without those rows."""

from __future__ import annotations

import functools

import pytest
from support.exactness import assert_exact
from support.gloo import GlooPool
from support.objective_cases import PARTS, everything


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("taught", [False, True], ids=["towers that learn", "a student and its teachers"])
def test_every_case_is_exact(gloo: GlooPool, taught: bool, part: int) -> None:
    """Many in one mix: each one's loss and the gradients of its own parts are compared by name."""
    record = assert_exact(gloo, functools.partial(everything, taught, part))
    names = [name for name in record.metrics[0] if "/" not in name and name != "negatives"]
    for name in names:
        assert abs(record.metrics[4][name]) > 1e-6, f"{name} says nothing of a batch where nothing is absent"
        assert record.metrics[-1][name] == 0, f"{name} says something of a batch where all is absent"
    assert not any(gradient.any() for gradient in record.gradients[-1].values())
