"""The cross-modal objective is the same on 1, 2 and 3 processes, and with holes or without those rows."""

from __future__ import annotations

import pytest
from support.exactness import TOWERS, Subject, assert_exact
from support.gloo import GlooPool

from mmcl.objectives.base import ObjectiveMix
from mmcl.objectives.cross_modal import CrossModalOptions, build


def plain() -> Subject:
    return Subject(ObjectiveMix({"cross_modal": build(CrossModalOptions(), TOWERS)}, {"cross_modal": 1.0}))


def unpaired_and_mixed() -> Subject:
    both = {
        "cross_modal": build(CrossModalOptions(unpaired_negatives=True), TOWERS),
        "again": build(CrossModalOptions(mask_false_negatives=False, pairs=(("text", "video"),)), TOWERS),
    }
    return Subject(ObjectiveMix(both, {"cross_modal": 0.5, "again": 2.0}))


@pytest.mark.parametrize("subject", [plain, unpaired_and_mixed])
def test_exact(gloo: GlooPool, subject: object) -> None:
    record = assert_exact(gloo, subject)  # type: ignore[arg-type]
    assert record.losses[0] > 0.1 and record.losses[-1] == 0
    assert record.metrics[3]["cross_modal/pairs/video-audio"] == 0 < record.metrics[3]["cross_modal/pairs/video-text"]
    assert any(name.startswith("log_scales") and float(g.norm()) > 1e-3 for name, g in record.gradients[0].items())
