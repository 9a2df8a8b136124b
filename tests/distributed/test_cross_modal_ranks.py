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


def siglip_and_shared() -> Subject:
    mix = {
        "siglip": build(CrossModalOptions(estimator="siglip", hard_quantile=0.5), TOWERS),
        "shared": build(CrossModalOptions(shared_temperature=True, captions=2, unpaired_negatives=True), TOWERS),
    }
    return Subject(ObjectiveMix(mix, {"siglip": 0.5, "shared": 1.0}))


def decoupled_and_smoothed() -> Subject:
    mix = {
        "dcl": build(CrossModalOptions(estimator="dcl", hard_quantile=0.4), TOWERS),
        "dclw": build(CrossModalOptions(estimator="dclw", detach_weight=False), TOWERS),
        "smoothed": build(CrossModalOptions(estimator="clip_label_smoothing", captions=2), TOWERS),
    }
    return Subject(ObjectiveMix(mix, dict.fromkeys(mix, 1.0)))


@pytest.mark.slow
@pytest.mark.parametrize("subject", [siglip_and_shared, decoupled_and_smoothed])
def test_every_estimator_is_exact(gloo: GlooPool, subject: object) -> None:
    record = assert_exact(gloo, subject)  # type: ignore[arg-type]
    assert record.losses[0] != 0 == record.losses[-1]
    learned = [n for n in record.gradients[0] if n.startswith(("log_scales", "mix.objectives.siglip.biases"))]
    assert len(learned) == (7 if "siglip" in subject.__name__ else 3)  # type: ignore[attr-defined]
    assert all(float(record.gradients[0][name].norm()) > 1e-4 for name in learned)


@pytest.mark.parametrize("subject", [plain, unpaired_and_mixed])
def test_exact(gloo: GlooPool, subject: object) -> None:
    record = assert_exact(gloo, subject)  # type: ignore[arg-type]
    assert record.losses[0] > 0.1 and record.losses[-1] == 0
    assert record.metrics[3]["cross_modal/pairs/video-audio"] == 0 < record.metrics[3]["cross_modal/pairs/video-text"]
    assert any(name.startswith("log_scales") and float(g.norm()) > 1e-3 for name, g in record.gradients[0].items())
