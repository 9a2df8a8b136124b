"""Background erasing as an option of objectives: what is erased, and what negatives of another time do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.exactness import TOWERS
from support.objectives import batch_for, build_objective, embed
from support.recipes import tiny_config
from support.view_methods import EXTRAS, SMALL
from torch import Tensor

from mmcl.distributed import Comm
from mmcl.objectives.base import Objective
from mmcl.recipe import build_model
from mmcl.training.soundness import remarks
from mmcl.types import ConfigError, Embeddings, Erase, Need


def make(method: str, how: dict[str, Any] | None = None, name: str = "intra_modal", **more: Any) -> Any:
    chosen = {"name": method, **SMALL, **EXTRAS.get(method, {}), **(how or {})}
    return build_objective(name, TOWERS, tower="video", method=chosen, **more)


def each_its_own(objective: Objective, kind: str = "full", groups: int | None = -1) -> Embeddings:
    """Random rows that differ from need to need, all with gradients."""
    batch = batch_for(objective, kind)
    if groups is not None:
        batch.groups.fill_(groups)
    values = {}
    for number, need in enumerate(objective.needs):
        x, _ = embed(objective, batch, seed=40 + number)
        values[need.tower, need.view, "pooled", need.kind] = x.get(need).detach().clone().requires_grad_()
    return Embeddings(values, batch)


def unit(rows: Tensor) -> Tensor:
    return F.normalize(rows, dim=1)


def test_only_what_asks_is_erased() -> None:
    erase = Erase((0.1, 0.2), "batch")
    how = {"strength": [0.1, 0.2], "per": "batch"}

    def seen(objective: Objective) -> list[tuple[str, str, int, int, Erase | None]]:
        return [(n.tower, n.kind, n.view.clip, n.view.copy, n.view.erase) for n in objective.needs]

    assert seen(make("moco", erase=how)) == [("video", "online", 0, 0, erase), ("video", "momentum", 0, 1, None)]
    both = {**how, "views": "all"}
    assert seen(make("moco", {"symmetric": True}, erase=both)) == [
        ("video", kind, 0, copy, erase if kind == "online" else None)
        for kind in ("online", "momentum")
        for copy in (0, 1)
    ]
    assert [e for *_, e in seen(make("simclr", erase=how))] == [erase, None]
    assert [e for *_, e in seen(make("swav", {"crops": 1}, erase=both))] == [erase] * 3
    across = seen(make("moco", name="persistency", erase=both, other="audio"))
    assert {(tower, kind): e for tower, kind, _, _, e in across} == {
        ("video", "online"): erase, ("audio", "online"): None, ("video", "momentum"): None, ("audio", "momentum"): None
    }  # fmt: skip
    hard = make("moco", {"hard_negative": True}, erase=how).needs[-1]
    assert (hard.kind, hard.view.clip, hard.view.erase) == ("online", 1, None)


def test_moco_with_a_hard_negative_is_the_formula_of_the_sheet() -> None:
    """CE([⟨q,k⟩, ⟨q,Q⟩, ⟨q,n⟩] / τ, 0), where n is another time; its gradient reaches n."""
    objective = make("moco", {"hard_negative": True, "temperature": 0.07}, erase={})
    objective.queue.push(unit(torch.randn(9, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))))
    embeddings = each_its_own(objective)
    query, _, hard = objective.needs
    rows = [embeddings.get(need) for need in objective.needs]
    q, n = (unit(objective.projector(x)) for x in (rows[0], rows[2]))
    k = unit(objective.momentum_projector(rows[1]))
    views = embeddings.batch.views
    starts = views[hard.view].params["start_seconds"] - views[query.view].params["start_seconds"]
    apart = starts.abs() >= 2.0
    assert 2 < apart.sum() < 12, "a clip is two seconds long"
    losses = []
    for i in range(12):
        scores = [q[i] @ k[i], *(q[i] @ row for row in objective.queue.rows[:9]), *([q[i] @ n[i]] if apart[i] else [])]
        losses.append(-(torch.stack(scores) / 0.07).log_softmax(0)[0])
    term = objective(embeddings, Comm())
    assert float(term.loss.detach()) == pytest.approx(float(torch.stack(losses).mean().detach()), rel=1e-10)
    assert int(term.metrics["hard_negatives"]) == int(apart.sum())
    (gradient,) = torch.autograd.grad(term.loss, rows[2])
    assert torch.equal(gradient.abs().sum(1) > 0, apart)


def test_triplets_against_a_loop() -> None:
    objective = make("triplet", {"margin": 0.5}, erase={})
    embeddings = each_its_own(objective, "mixed", groups=None)
    q, p, n = (unit(objective.projector(embeddings.get(need))) for need in objective.needs)
    batch, here = embeddings.batch, embeddings.present(objective.needs[0].view)
    starts = batch.views[objective.needs[2].view].params["start_seconds"]
    rows, groups = here.nonzero()[:, 0].tolist(), batch.groups
    own, across = [], []
    for i in rows:
        near = (q[i] - p[i]).norm() + 0.5
        if starts[i] >= 2.0:
            own.append((near - (q[i] - n[i]).norm()).relu())
        strangers = [j for j in rows if j != i and not ((groups[i] == groups[j]) & (groups[i] >= 0)).any()]
        if strangers:
            across.append(torch.stack([(near - (q[i] - n[j]).norm()).relu() for j in strangers]).mean())
    assert 0 < len(own) < len(rows) and len(across) > 3
    wanted = torch.stack(own).mean() + torch.stack(across).mean()
    assert float(objective(embeddings, Comm()).loss.detach()) == pytest.approx(float(wanted.detach()), rel=1e-9)


def test_the_simple_form_is_the_mean_square() -> None:
    objective = make("mse", erase={})
    embeddings = each_its_own(objective)
    a, b = (objective.projector(embeddings.get(need)) for need in objective.needs)
    assert float(objective(embeddings, Comm()).loss.detach()) == pytest.approx(
        float(F.mse_loss(a, b).detach()), rel=1e-12
    )


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        (
            "name: intra_modal, tower: audio, method: {name: simclr}, erase: {}",
            r"0\.erase: tower 'audio' reads no clips",
        ),
        ("name: persistency, tower: audio, method: {name: moco}, erase: {}", r"0\.erase: tower 'audio' reads no clips"),
        ("name: intra_modal, tower: text, method: {name: triplet}", r"0\.method: a negative of another time"),
        (
            "name: intra_modal, tower: video, windows: different, method: {name: moco, hard_negative: true}",
            r"0\.windows: 'different', but another time",
        ),
        (
            "name: intra_modal, tower: video, method: {name: moco}, erase: {strength: [0.3, 0.1]}",
            r"erase\.strength.*must be \[smallest, largest\]",
        ),
    ],
)
def test_what_is_refused(objective: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_model(tiny_config(f"objectives=[{{{objective}}}]"))


def test_a_clip_and_itself_erased_are_no_equal_views() -> None:
    def said(erase: str) -> list[str]:
        config = tiny_config(f"objectives=[{{name: intra_modal, tower: video, method: {{name: mse}}, erase: {erase}}}]")
        return [line for line in remarks(config, *build_model(config)) if "are equal" in line]

    assert not said("{}") and said("null") and said("{views: all}")


def test_needs_are_what_presence_is_read_from() -> None:
    objective = make("moco", erase={"views": "all"})
    assert all(isinstance(need, Need) and need.view in batch_for(objective).views for need in objective.needs)
    assert float(objective(each_its_own(objective), Comm()).metrics["rows"]) == 12
