"""open_clip's ``ClipLoss`` beside ours on 2 processes: value, encoder gradient, temperature gradient to one process."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from support.gloo import GlooPool

sys.path.append(str(Path(__file__).parents[2] / "tools/bench"))
from clip_table import OURS, WAYS, table

pytest.importorskip("open_clip")


@pytest.mark.slow  # open_clip takes seconds to import
def test_only_ours_and_a_gather_with_gradient_are_exact(gloo: GlooPool) -> None:
    rows = gloo(2, table)[0]
    exact = {OURS, "open_clip, gather_with_grad", "open_clip, local_loss + gather_with_grad"}
    assert exact < set(rows) == {OURS, *WAYS}
    for way, row in rows.items():
        # the value and the temperature tell nothing: they are right in every row
        assert row["value_ratio"] == pytest.approx(1, abs=1e-9), way
        assert row["temperature_gradient_ratio"] == pytest.approx(1, abs=1e-9), way
        if way in exact:
            assert row["encoder_gradient_ratio"] == pytest.approx(1, abs=1e-9), way
            assert row["encoder_gradient_cosine"] == pytest.approx(1, abs=1e-9), way
    default, local = rows["open_clip, default flags"], rows["open_clip, local_loss"]
    assert default["encoder_gradient_ratio"] == pytest.approx(0.5, abs=1e-9)
    assert default["encoder_gradient_cosine"] == pytest.approx(1, abs=1e-9)
    assert 0.4 < local["encoder_gradient_ratio"] < 0.6 and local["encoder_gradient_cosine"] < 0.995
