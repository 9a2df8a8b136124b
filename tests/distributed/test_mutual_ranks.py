"""Mutual learning is the same on 1, 2 and 3 processes, and with holes or without those rows."""

from __future__ import annotations

import functools
from typing import Any

import pytest
from support.exactness import TOWERS, Subject, assert_exact
from support.gloo import GlooPool

from mmcl.objectives.base import ObjectiveMix
from mmcl.objectives.mutual import MutualOptions, build


def subject(options: dict[str, Any]) -> Subject:
    return Subject(ObjectiveMix({"mutual": build(MutualOptions(temperature=0.3, **options), TOWERS)}, {"mutual": 1.0}))


@pytest.mark.parametrize(
    "options",
    [
        {"queue": 7},
        {"keys": "online", "queue": 0, "towers": ("video", "text")},
        pytest.param({"queue": 7, "classes": 3, "towers": ("video", "audio")}, marks=pytest.mark.slow),
        pytest.param({"queue": 0, "classes": 3, "towers": ("video", "text")}, marks=pytest.mark.slow),
    ],
    ids=["three towers and queues of 7", "online keys in the batch", "labels and queues", "labels in the batch"],
)
def test_exact(gloo: GlooPool, options: dict[str, Any]) -> None:
    record = assert_exact(gloo, functools.partial(subject, options))
    assert record.losses[1] > 0.1 and record.losses[-1] == 0
    assert all(record.metrics[1][f"mutual/loss/{name}"] > 1e-3 for name in ("vcl", "icl", "soft_vcl", "soft_icl"))
    if "towers" not in options:
        assert record.losses[3] == 0, "no audio: the cohort is never whole"
        assert int(record.state["mix.objectives.mutual.filled"]) == 7
    assert not any(gradient.any() for gradient in record.gradients[-1].values())
