"""The objective on pairs of overlapping clips, against the numbers of its sheet and a loop."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from loss_cases import golden
from support.exactness import TOWERS, pick_rows
from support.objectives import batch_for, build_objective, embed
from support.recipes import tiny_config
from torch import Tensor, nn

from mmcl.config import build
from mmcl.distributed import Comm
from mmcl.objectives.base import Objective
from mmcl.objectives.stor import STOROptions
from mmcl.recipe import build_model
from mmcl.types import ConfigError, Embeddings

A, B, C = golden()
SMALL = {"tower": "video", "hidden": 6, "out": 5, "predictor_hidden": 4, "head_hidden": 7}
LOSSES = ("loss/byol", "loss/overlap_space", "loss/overlap_time", "loss/speed", "loss/turns")


def stor(**options: object) -> Any:
    objective: Objective = build_objective("stor", TOWERS, **{**SMALL, **options})
    return objective


def figures(objective: Objective, **given: object) -> tuple[float, dict[str, float]]:
    embeddings, _ = embed(objective, batch_for(objective, "full"), **given)  # type: ignore[arg-type]
    term = objective(embeddings, Comm())
    return float(term.loss.detach()), {name: float(value) for name, value in term.metrics.items()}


class Same(nn.Module):
    """A head that changes nothing."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return x


def test_the_prediction_of_the_sheet() -> None:
    """p₁ = A, p₂ = B, ẑ₁ = C, ẑ₂ = norm(A + B); p = ẑ gives 0."""
    objective = stor(space=0, time=0, speed=0, rotation=0, byol=1.0)
    objective.projector, objective.predictor, objective.momentum_projector = Same(), Same(), Same()
    batch = pick_rows(batch_for(objective, "full"), torch.arange(4))
    for given, wanted in (((A, B, C, A + B), 2.96423807), ((A, B, B, A), 0.0)):
        values = {
            (need.tower, need.view, "pooled", need.kind): x for need, x in zip(objective.needs, given, strict=True)
        }
        term = objective(Embeddings(values, batch), Comm())
        assert float(term.loss) == pytest.approx(wanted, abs=1e-7)


def test_heads_that_know_nothing_give_the_logarithm_of_their_classes() -> None:
    objective = stor()
    for head in objective.heads.values():
        torch.nn.init.zeros_(head.linears[-1].weight)
        torch.nn.init.zeros_(head.linears[-1].bias)
    loss, metrics = figures(objective)
    assert metrics["loss/overlap_space"] == pytest.approx(math.log(5), abs=1e-12)
    assert metrics["loss/overlap_time"] == pytest.approx(math.log(5), abs=1e-12)
    assert metrics["loss/speed"] == pytest.approx(2 * math.log(4), abs=1e-12), "the sum over two clips"
    assert metrics["loss/turns"] == pytest.approx(2 * math.log(4), abs=1e-12)
    assert loss == pytest.approx(0.1 * metrics["loss/byol"] + 2 * math.log(5) + 4 * math.log(4), abs=1e-12)


def test_weights_and_heads_that_are_left_out() -> None:
    _, plain = figures(stor())
    loss, metrics = figures(stor(byol=0.5, space=2.0, time=3.0, speed=0.25, rotation=0.125))
    assert {name: metrics[name] for name in LOSSES} == {name: plain[name] for name in LOSSES}
    shares = (0.5, 2.0, 3.0, 0.25, 0.125)
    assert loss == pytest.approx(sum(w * metrics[name] for w, name in zip(shares, LOSSES, strict=True)), rel=1e-12)
    bare = stor(space=0, time=0, speed=0, rotation=0)
    loss, metrics = figures(bare)
    assert set(metrics) == {"rows", "loss/byol"} and loss == pytest.approx(0.1 * metrics["loss/byol"])
    assert not bare.needs[0].view.overlap.turned and stor().needs[0].view.overlap.turned


def test_the_whole_against_a_loop_with_missing_labels() -> None:
    objective = stor()
    batch = batch_for(objective, "mixed")
    embeddings, _ = embed(objective, batch)
    first, second = (embeddings.values[n.tower, n.view, "pooled", "online"] for n in objective.online.values())
    present = embeddings.present(*objective.views)
    params = [batch.views[view].params for view in objective.views]
    assert (params[0]["speed"][present] < 0).any(), "some clips are too short to have a speed"
    fresh = copy.deepcopy(objective)
    wanted = {}
    for name, pairs in {
        "overlap_space": [(torch.cat([first, second], 1), params[0]["overlap_space"])],
        "overlap_time": [(torch.cat([first, second], 1), params[0]["overlap_time"])],
        "speed": [(first, params[0]["speed"]), (second, params[1]["speed"])],
        "turns": [(first, params[0]["turns"]), (second, params[1]["turns"])],
    }.items():
        losses, right, count = [], 0.0, 0
        for rows, labels in pairs:
            kept = [i for i in range(12) if present[i] and labels[i] >= 0]
            logits: Tensor = fresh.heads[name](rows[kept])
            losses.append(-sum(logits[n].log_softmax(0)[labels[i]] for n, i in enumerate(kept)) / len(kept))
            right += sum(float(logits[n].argmax() == labels[i]) for n, i in enumerate(kept)) / len(kept)
            count += 1
        wanted[f"loss/{name}"], wanted[f"accuracy/{name}"] = float(sum(losses).detach()), right / count
    term = objective(embeddings, Comm())
    for name, value in wanted.items():
        assert float(term.metrics[name]) == pytest.approx(value, rel=1e-9, abs=1e-12), name
    parts = sum(wanted[name] for name in LOSSES[1:])
    assert float(term.loss.detach()) == pytest.approx(0.1 * float(term.metrics["loss/byol"]) + parts, rel=1e-9)


def test_labels_of_rows_that_are_absent_teach_nothing() -> None:
    objective = stor()
    batch = batch_for(objective, "mixed")
    absent = ~batch.views[objective.views[0]].present
    assert absent.any()
    losses = []
    for label in (0, 3):
        for view in objective.views:
            for name in ("overlap_time", "overlap_space", "speed", "turns"):
                batch.views[view].params[name][absent] = label
        losses.append(objective(embed(objective, batch)[0], Comm()).loss)
    assert torch.equal(*losses)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("tower: audio", r"objectives\.0\.tower: 'audio' does not read clips"),
        ("tower: depth", r"objectives\.0\.tower: unknown name 'depth'"),
        ("tower: video, rates: [1, 1]", "rates must be one or more different"),
        ("tower: video, speeds: []", "speeds must be one or more different"),
        ("tower: video, area: [0.5, 0.2]", r"area must be \[smallest, largest\]"),
    ],
)
def test_what_it_refuses(options: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_model(tiny_config(f"objectives=[{{name: stor, {options}}}]"))


def test_pictures_alone_are_refused() -> None:
    with pytest.raises(ConfigError, match="does not read clips of two frames"):
        build_model(tiny_config("objectives=[{name: stor, tower: video}]", "model.towers.video.frames=1"))


def test_defaults_are_those_of_the_paper() -> None:
    options = build(STOROptions, {"name": "stor", "tower": "video"})
    assert (options.byol, options.hidden, options.out, options.predictor_hidden) == (0.1, 4096, 512, 4096)
    assert options.rates == (1.0, 0.8, 0.6, 0.4, 0.2) and options.speeds == (1, 2, 4, 8)
