"""Compositional distillation: its formula, who receives which gradient, what it refuses."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from support.exactness import TOWERS
from support.objectives import FROZEN, batch_for, build_objective, embed
from torch import Tensor

from mmcl import losses
from mmcl.distributed import Comm
from mmcl.types import ConfigError, RunError

NAME = "compositional_distillation"


def both_losses(objective: object, v: Tensor, teachers: dict[str, Tensor], labels: Tensor, weight: float):
    """(L_v, {teacher: L_u}) of rows that all have everything, straight from the formulas."""

    def similarity(f: Tensor, g: Tensor, temperature: float) -> Tensor:
        return losses.class_nce(f, g, labels, temperature=temperature) + losses.class_nce(
            g, f, labels, temperature=temperature
        )

    predicted = objective.classify(v)
    student = F.cross_entropy(predicted, labels)
    compositions = {}
    for name, t in teachers.items():
        part = objective.compositions[name]
        temperature = 0.5 if name == "audio" else 0.1
        u = t + part.mix(torch.cat([F.normalize(t, dim=1), F.normalize(v, dim=1)], 1))
        aligned = similarity(v, u, temperature) + losses.jeffreys(predicted, part.classify(u))
        student = student + weight * (aligned + similarity(v, t, temperature))
        compositions[name] = F.cross_entropy(part.classify(u), labels) + aligned + similarity(u, t, temperature)
    return student, compositions


@pytest.mark.parametrize(("teachers", "weight"), [(("audio",), 1.0), (("audio", "text"), 0.5)])
def test_it_is_its_formula_and_each_part_gets_its_own_gradient(teachers: tuple[str, ...], weight: float) -> None:
    objective = build_objective(NAME, teachers=teachers, classes=3)
    batch = batch_for(objective, "full")
    embeddings, leaves = embed(objective, batch)
    term = objective(embeddings, Comm())
    v = leaves["video", "pooled"]
    given = {name: leaves[name, "pooled"].detach() for name in teachers}
    student, compositions = both_losses(objective, v, given, batch.labels, weight)
    torch.testing.assert_close(term.loss, student + sum(compositions.values()))

    learned = [v, *objective.classify.parameters()]
    actual = torch.autograd.grad(term.loss, learned, retain_graph=True)
    torch.testing.assert_close(actual, torch.autograd.grad(student, learned, retain_graph=True))
    for name in teachers:
        weights = list(objective.compositions[name].parameters())
        actual = torch.autograd.grad(term.loss, weights, retain_graph=True)
        expected = torch.autograd.grad(student + compositions[name], weights, retain_graph=True)
        torch.testing.assert_close(actual, expected)
        assert torch.autograd.grad(term.loss, leaves[name, "pooled"], retain_graph=True, allow_unused=True) == (None,)


def test_without_weights_the_composition_is_the_teacher() -> None:
    part = build_objective(NAME, teachers=("audio",)).compositions["audio"]
    for parameter in part.parameters():
        torch.nn.init.zeros_(parameter)
    teacher, student = torch.randn(2, 5, 10, dtype=torch.float64)
    assert torch.equal(part(teacher, student)[1], teacher)


@pytest.mark.parametrize("classes", [3, None])
def test_rows_without_a_teacher_or_a_label_change_nothing(classes: int | None) -> None:
    objective = build_objective(NAME, teachers=("audio",), classes=classes)
    batch = batch_for(objective)
    embeddings, leaves = embed(objective, batch)
    term = objective(embeddings, Comm())
    gradient = torch.autograd.grad(term.loss, leaves["video", "pooled"])[0]
    video, audio = (batch.views[need.view].present for need in objective.needs)
    assert (video & ~audio).any()
    assert not gradient[~video].any()
    if classes is None:
        assert not gradient[~audio].any()
    assert gradient[video & audio].any(1).all()
    assert int(term.metrics["pairs/audio"]) == int((video & audio).sum())


@pytest.mark.parametrize("classes", [3, None])
def test_a_silent_batch_is_finite_and_an_empty_one_is_zero(classes: int | None) -> None:
    objective = build_objective(NAME, teachers=("audio",), classes=classes)
    for kind in ("no_audio", "all_absent"):
        embeddings, leaves = embed(objective, batch_for(objective, kind))
        with torch.autograd.set_detect_anomaly(True):
            term = objective(embeddings, Comm())
            term.loss.backward()
        assert term.metrics["loss/composition/audio"] == 0
        assert (term.loss == 0) == (kind == "all_absent" or classes is None)
        assert leaves["video", "pooled"].grad.isfinite().all()


def test_without_labels_samples_of_one_group_do_not_repel() -> None:
    """… and each sample has itself: with all features equal S is log n − log(1 − 1/n), with pairs of doubles less."""
    objective = build_objective(NAME, teachers=("audio",))
    batch = batch_for(objective, "full")
    batch.groups.fill_(-1)
    ones = {name: torch.ones(12, 10, dtype=torch.float64) for name in ("video", "audio")}
    part = objective.compositions["audio"].mix
    for parameter in part.parameters():
        torch.nn.init.zeros_(parameter)
    for others in (12, 11):
        loss = float(objective(embed(objective, batch, ones)[0], Comm()).loss.detach())
        n = torch.tensor(float(others), dtype=torch.float64)
        assert loss == pytest.approx(float(8 * (n.log() - (1 - 1 / n).log())), abs=1e-9)
        batch.groups[:, 0] = torch.arange(12) // 2  # each now has one that neither attracts nor repels


def test_a_teacher_of_another_width_is_projected() -> None:
    towers = {**FROZEN, "audio": TOWERS["audio"].__class__("audio", TOWERS["audio"].spec, 7, 6, False)}
    objective = build_objective(NAME, towers, teachers=("audio",))
    batch = batch_for(objective)
    audio = torch.randn(12, 7, dtype=torch.float64)
    embeddings, _ = embed(objective, batch, {"audio": audio})
    objective(embeddings, Comm()).loss.backward()
    assert all(p.grad.any() for p in objective.compositions["audio"].project.parameters())


def test_what_cannot_be_is_refused() -> None:
    wrong = {
        "objectives.4.teachers.0: unknown name 'audoi' (did you mean 'audio'?)": {"teachers": ("audoi",)},
        "objectives.4.student: unknown name 'vdeo'": {"student": "vdeo", "teachers": ("audio",)},
        "objectives.4.student: 'text' is frozen": {"student": "text", "teachers": ("audio",)},
        "objectives.4.teachers.0: 'video' is already named": {"teachers": ("video",)},
        "objectives.4.temperatures: unknown name 'text'": {"teachers": ("audio",), "temperatures": {"text": 0.1}},
        "teachers": {"teachers": ()},
    }
    for message, options in wrong.items():
        with pytest.raises(ConfigError, match=re.escape(message)):
            build_objective(NAME, **options)
    with pytest.raises(ConfigError, match=r"objectives\.4\.teachers\.0: the teacher 'audio' is not frozen; set model"):
        build_objective(NAME, TOWERS, teachers=("audio",))
    objective = build_objective(NAME, teachers=("audio",), classes=2)
    with pytest.raises(RunError, match="label 2, but the objective was given classes: 2"):
        objective(embed(objective, batch_for(objective))[0], Comm())
