"""Methods on views of one tower are the same on 1, 2 and 3 processes, and with holes or without those rows.

Several methods share a mix: the loss of each is compared by its name, and so are the gradients of its own head.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support.exactness import Subject, assert_exact
from support.gloo import GlooPool
from support.view_methods import make, subject

INTRA, RHO = "intra_modal", "persistency"


def pairs_of_views() -> Subject:
    return subject(
        simclr=make(INTRA, "simclr", {"layers": 2}),
        dcl=make(INTRA, "dcl", {"temperature": 0.3}),
        dclw=make(INTRA, "dclw"),
        through=make(INTRA, "dclw", {"detach_weight": False, "mask_false_negatives": False}, tower="audio"),
        barlow=make(INTRA, "barlow", {"layers": 2}),
        vicreg=make(INTRA, "vicreg", {"invariance": 1, "variance": 1, "covariance": 0.1}, tower="text"),
    )


def queries_and_targets() -> Subject:
    return subject(
        moco=make(INTRA, "moco", views=3),
        symmetric=make(INTRA, "moco", {"symmetric": True, "norm": "batch", "queue": 5}, tower="audio"),
        byol=make(INTRA, "byol"),
        simsiam=make(INTRA, "simsiam", reduction="sum"),
    )


def assignments() -> Subject:
    return subject(
        swav=make(INTRA, "swav", {"crops": 2}),
        queued=make(INTRA, "swav", {"queue": 6, "queue_after": 1, "frozen_batches": 0}, tower="audio"),
    )


def rho_contrast() -> Subject:
    return subject(
        simclr=make(RHO, "simclr", rho=3),
        mean=make(RHO, "simclr", rho=3, reduction="mean"),
        moco=make(RHO, "moco", rho=3),
        same_clip=make(RHO, "moco", rho=1, tower="audio"),
    )


def rho_prediction() -> Subject:
    return subject(
        byol=make(RHO, "byol", rho=3),
        swav=make(RHO, "swav", rho=3),
        queued=make(RHO, "swav", {"queue": 6}, rho=2, tower="audio", reduction="mean"),
    )


def more_views() -> Subject:
    return subject(
        simclr=make(INTRA, "simclr", views=3),
        barlow=make(INTRA, "barlow", views=3, reduction="sum"),
        byol=make(RHO, "byol", rho=4),
        moco=make(RHO, "moco", {"norm": "batch"}, rho=4, reduction="mean"),
        swav=make(RHO, "swav", {"queue": 6}, rho=4),
    )


def rho_across_towers() -> Subject:
    return subject(
        simclr=make(RHO, "simclr", rho=2, other="audio"),
        moco=make(RHO, "moco", rho=2, other="audio", own_clips=False),
        byol=make(RHO, "byol", rho=2, other="text"),
        swav=make(RHO, "swav", {"queue": 6}, rho=2, other="audio", reduction="mean"),
    )


@pytest.mark.parametrize(
    "build",
    [
        queries_and_targets,
        assignments,
        rho_contrast,
        pytest.param(pairs_of_views, marks=pytest.mark.slow),
        pytest.param(rho_prediction, marks=pytest.mark.slow),
        pytest.param(rho_across_towers, marks=pytest.mark.slow),
        pytest.param(more_views, marks=pytest.mark.slow),
    ],
)
def test_exact(gloo: GlooPool, build: Callable[[], Subject]) -> None:
    record = assert_exact(gloo, build)
    assert record.losses[-1] == 0, "all rows absent"
    names = [name for name in record.metrics[0] if name.count("/") == 0]
    for name in names:
        # the queue of MoCo is empty in the first batch; audio is absent everywhere in the fourth
        assert abs(record.metrics[4][name]) > 1e-3, name
    for name, value in record.state.items():
        if name.endswith(".filled"):
            assert value > 0, name
        if "prototypes.weight" in name:
            torch.testing.assert_close(value.norm(dim=1), torch.ones(len(value), dtype=value.dtype))


def test_gradients_reach_every_part(gloo: GlooPool) -> None:
    for build in (pairs_of_views, queries_and_targets, assignments, rho_contrast, rho_prediction):
        gradients = assert_finite(build())
        assert all(norm > 0 for norm in gradients.values()), gradients


def assert_finite(built: Subject) -> dict[str, float]:
    from support.exactness import make_batch

    built = built.double()
    views = list(dict.fromkeys(need.view for need in built.mix.needs))
    for step in range(3):
        term = built(make_batch(views, step, "full"))
        built.zero_grad()
        term.loss.backward()
        built.mix.commit(term.pending)
    return {name: float(p.grad.norm()) for name, p in built.named_parameters() if p.grad is not None}
