"""Rules that every objective keeps with every method: the table of cases is complete, and each case keeps all rules."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.exactness import pick_rows
from support.objective_cases import CASES, Constants, leaves_of, rows_for, without_a_case
from support.objectives import batch_for
from torch import Tensor

from mmcl.distributed import Comm
from mmcl.objectives.base import Objective
from mmcl.training.momentum import advance
from mmcl.types import Embeddings

each = pytest.mark.parametrize("name", CASES)


def turned(embeddings: Embeddings, order: Tensor) -> Embeddings:
    batch = pick_rows(embeddings.batch, order)
    return replace(embeddings, values={key: value[order] for key, value in embeddings.values.items()}, batch=batch)


def advanced(objective: Objective, steps: int = 2) -> Objective:
    """After some optimizer steps, of its own parameters."""
    dtype = next((x.dtype for x in objective.state_dict().values() if x.is_floating_point()), torch.float64)
    learned = [p for p in objective.parameters() if p.requires_grad]
    for step in range(steps):
        term = objective(rows_for(objective, batch_for(objective, step=step), 20 + step, dtype), Comm())
        gradients = torch.autograd.grad(term.loss, learned, allow_unused=True) if learned else ()
        with torch.no_grad():
            for p, gradient in zip(learned, gradients, strict=True):
                p -= 0 if gradient is None else 0.01 * gradient / (1 + gradient.norm())
        objective.commit(term.pending)
        advance(objective.ema_pairs(), 0.9)
    return objective


def gradients_of(loss: Tensor, objective: Objective, embeddings: Embeddings) -> list[Tensor]:
    """Of online rows, temperatures and the objective's own parameters; not of what plays no part."""
    leaves = [*leaves_of(embeddings), *(p for p in objective.parameters() if p.requires_grad)]
    return [g for g in torch.autograd.grad(loss, leaves, allow_unused=True) if g is not None]


def test_every_objective_and_every_method_has_a_case() -> None:
    assert not without_a_case(), "give CASES of tests/support/objective_cases.py one of each"


@each
def test_the_order_of_rows_does_not_matter(name: str) -> None:
    objective = advanced(CASES[name].build().double())
    embeddings = rows_for(objective, batch_for(objective, step=3))
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    losses = [objective(x, Comm()).loss for x in (embeddings, turned(embeddings, order))]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-10, atol=1e-10)
    assert abs(float(losses[0].detach())) > 1e-6


@each
def test_all_rows_absent_is_zero_without_a_gradient(name: str) -> None:
    objective = advanced(CASES[name].build().double())
    embeddings = rows_for(objective, batch_for(objective, "all_absent"))
    loss = objective(embeddings, Comm()).loss
    gradients = gradients_of(loss, objective, embeddings)
    assert float(loss.detach()) == 0
    assert gradients and not any(g.any() for g in gradients), "NaN is not zero either"


@each
def test_bfloat16_at_temperature_0_01_is_finite_and_close(name: str) -> None:
    objective = CASES[name].build(**(CASES[name].cold or {}))
    for step, kind in enumerate(("full", "mixed", "one", "all_absent")):
        batch = batch_for(objective, "full" if kind == "one" else kind, step)
        embeddings = rows_for(objective, batch, dtype=torch.float32, scale=100.0)
        embeddings = turned(embeddings, torch.arange(1 if kind == "one" else 12))
        exact = float(objective(embeddings, Comm()).loss.detach())
        with torch.autocast("cpu", torch.bfloat16):
            term = objective(embeddings, Comm())
        assert term.loss.dtype == torch.float32 and term.loss.isfinite()
        assert kind == "one" or abs(float(term.loss.detach()) - exact) <= 0.1 * abs(exact)
        gradients = gradients_of(term.loss, objective, embeddings)
        assert gradients and all(g.isfinite().all() for g in gradients)
        objective.commit(term.pending)


@each
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    """Of online rows and temperatures, in the middle of a run; targets stay what they are, as they have no gradient."""
    case = CASES[name]
    objective = advanced(case.build(**(case.smooth or {})).double())
    constants = Constants()
    if case.detached_by:
        setattr(objective, case.detached_by, constants.targets(getattr(objective, case.detached_by)))
    embeddings = rows_for(objective, batch_for(objective, step=3, rows=6), scale=3.0)
    leaves = leaves_of(embeddings)

    def loss(*given: Tensor) -> Tensor:
        moved = dict(zip(map(id, leaves), given, strict=True))
        values = {key: moved.get(id(x), x) for key, x in embeddings.values.items()}
        scales = {key: moved.get(id(x), x) for key, x in embeddings.scales.items()}
        with constants.again():
            return objective(replace(embeddings, values=values, scales=scales), Comm()).loss

    assert torch.autograd.gradcheck(loss, leaves, fast_mode=True, atol=1e-6, rtol=1e-4)
    found = torch.autograd.grad(loss(*leaves), leaves, allow_unused=True)
    assert any(g is not None and g.abs().max() > 1e-9 for g in found)


@each
def test_a_saved_state_gives_the_same_next_loss(name: str) -> None:
    """Bit for bit, in the middle of a run."""
    objective, again = advanced(CASES[name].build()), CASES[name].build(seed=4)
    embeddings = rows_for(objective, batch_for(objective, step=3), dtype=torch.float32)
    alike = zip(objective.state_dict().values(), again.state_dict().values(), strict=True)
    stateless = all(torch.equal(x, y) for x, y in alike)
    assert stateless or not torch.equal(again(embeddings, Comm()).loss, objective(embeddings, Comm()).loss)
    again.load_state_dict(objective.state_dict())
    assert torch.equal(again(embeddings, Comm()).loss, objective(embeddings, Comm()).loss)


@each
def test_one_row_and_one_class_are_finite(name: str) -> None:
    objective = CASES[name].build().double()
    for fresh in (True, False):
        embeddings = rows_for(objective, batch_for(objective, "full"))
        embeddings.batch.labels.fill_(1)
        for rows in (torch.arange(12), torch.arange(1)):
            loss = objective(turned(embeddings, rows), Comm()).loss
            gradients = gradients_of(loss, objective, embeddings)
            assert loss.isfinite() and gradients and all(g.isfinite().all() for g in gradients)
        if fresh:
            advanced(objective)


@each
def test_forward_changes_no_state_and_commit_does(name: str) -> None:
    objective = CASES[name].build().double()
    embeddings = rows_for(objective, batch_for(objective))

    def state() -> dict[str, Tensor]:
        # running statistics of heads are for evaluation alone
        return {key: x.clone() for key, x in objective.state_dict().items() if ".running_" not in key}

    before = state()
    term = objective(embeddings, Comm())
    assert all(torch.equal(x, before[key]) for key, x in state().items())
    assert torch.equal(objective(embeddings, Comm()).loss, term.loss)
    objective.commit(term.pending)
    changed = [key for key, x in state().items() if not torch.equal(x, before[key])]
    assert bool(changed) == bool(term.pending or "swav" in name), changed
