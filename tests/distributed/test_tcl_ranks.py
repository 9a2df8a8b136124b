"""Triple contrastive learning is the same on 1, 2 and 3 processes, and with holes or without those rows."""

from __future__ import annotations

import functools
from typing import Any

import pytest
from support.exactness import Subject, assert_exact
from support.gloo import GlooPool
from support.tcl import make

from mmcl.objectives.base import ObjectiveMix


def subject(options: dict[str, Any]) -> Subject:
    return Subject(ObjectiveMix({"tcl": make(**options)}, {"tcl": 1.0}))


CASES: dict[str, dict[str, Any]] = {
    "all terms, queues of 7": {"pairs": (("video", "text"),)},
    "contrasts of three pairs": {"itm": None, "mlm": None, "ramp_batches": 0},
    "sound and picture, fused, batch alone": {
        "pairs": (("video", "audio"),),
        "mlm": None,
        "queue": 0,
        "mask_false_negatives": False,
    },
    "matching alone": {"cma": None, "imc": None, "lmi": None, "mlm": None, "pairs": (("text", "audio"),)},
    "masked tokens alone": {"cma": None, "imc": None, "lmi": None, "itm": None, "pairs": (("audio", "text"),)},
}


@pytest.mark.parametrize(
    "name", [name if number == 0 else pytest.param(name, marks=pytest.mark.slow) for number, name in enumerate(CASES)]
)
def test_exact(gloo: GlooPool, name: str) -> None:
    record = assert_exact(gloo, functools.partial(subject, CASES[name]))
    assert record.losses[-1] == 0 and not any(gradient.any() for gradient in record.gradients[-1].values())
    terms = {key.split("/")[2] for key in record.metrics[4] if key.startswith("tcl/loss/")}
    for term in terms:
        values = [value for key, value in record.metrics[4].items() if key.startswith(f"tcl/loss/{term}/")]
        assert min(values) > 1e-3, (term, values)
    silent = {key for key, gradient in record.gradients[4].items() if not gradient.any()}
    # matching alone reads similarities without a gradient
    assert all(terms == {"itm"} and (".pool." in key or ".joint." in key or "scales" in key) for key in silent), silent
    if CASES[name].get("queue", 1):
        assert all(int(value) == 7 for key, value in record.state.items() if key.endswith("filled"))
