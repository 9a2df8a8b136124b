"""The objectives of distillation: golden values, what is trained, memory banks, what is refused."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

import pytest
import torch
from support.objectives import FROZEN, batch_for, build_objective, embed
from torch import Tensor

from mmcl import losses
from mmcl.distributed import Comm
from mmcl.hashing import text_hash
from mmcl.objectives.contrastive_distillation import noise_contrastive_rows
from mmcl.objectives.distillation import METHODS, _one_grid
from mmcl.types import ConfigError

TOKENS = ("tokens", "tokens")
CRD = "contrastive_distillation"


def distillation(method: str, **options: Any) -> Any:
    if method in ("flow", "kdsvd"):
        options.setdefault("levels", (TOKENS, TOKENS))
    if method == "knowledge_distillation":
        options.setdefault("classes", 3)
    return build_objective("distillation", method=method, teacher="audio", **options)


@pytest.mark.parametrize("method", METHODS)
def test_each_method_is_its_loss_on_the_rows_of_both(method: str) -> None:
    objective = distillation(method)
    batch = batch_for(objective)
    embeddings, leaves = embed(objective, batch)
    value = objective(embeddings, Comm()).metrics[f"loss/{method}"]
    both = embeddings.present(*[need.view for need in objective.needs])
    level = "tokens" if METHODS[method].reads in ("maps", "flow") else "pooled"
    student, teacher = (leaves[name, level][both] for name in ("video", "audio"))
    part = objective.parts[0] if objective.parts else None
    expected = {
        "knowledge_distillation": lambda: losses.knowledge_distillation(
            objective.classify(student), objective.probe(teacher), temperature=4.0
        ),
        "variational_information": lambda: losses.variational_information(part(student), part.scale, teacher),
        "relational": lambda: (
            25 * losses.relational_distance(student, teacher) + 50 * losses.relational_angle(student, teacher)
        ),
        "factor_transfer": lambda: part(student, teacher),
        "flow": lambda: losses.flow(student, student, teacher, teacher),
        "kdsvd": lambda: losses.kdsvd(student, student, teacher, teacher),
    }.get(method, lambda: getattr(losses, method)(part(student), teacher))
    torch.testing.assert_close(value, METHODS[method].strength * expected().detach())


@pytest.mark.parametrize("method", [*METHODS, CRD])
def test_only_rows_of_both_pull_and_nothing_reaches_the_teacher(method: str) -> None:
    objective = build_objective(CRD, teacher="audio", slots=50, negatives=20) if method == CRD else distillation(method)
    for kind in ("mixed", "no_audio", "all_absent"):
        batch = batch_for(objective, kind)
        embeddings, leaves = embed(objective, batch)
        with torch.autograd.set_detect_anomaly(True):
            term = objective(embeddings, Comm())
            torch.autograd.backward(term.loss)
        video, audio = (batch.views[need.view].present for need in objective.needs)
        for (tower, _), leaf in leaves.items():
            if tower == "audio":
                assert leaf.grad is None
                continue
            assert leaf.grad is not None and leaf.grad.isfinite().all()
            labelled = video & (batch.labels >= 0) if method == "knowledge_distillation" else video & audio
            assert not leaf.grad[~labelled].any()
            assert leaf.grad[video & audio].flatten(1).any(1).all()
        if kind == "all_absent":
            assert term.loss == 0


def test_the_probe_learns_from_labels_alone() -> None:
    """Else the teacher's predictions would come towards the student's."""
    objective = distillation("knowledge_distillation", classification_weight=0.0)
    batch = batch_for(objective)
    embeddings, leaves = embed(objective, batch)
    probe = list(objective.probe.parameters())
    actual = torch.autograd.grad(objective(embeddings, Comm()).loss, probe)
    heard = batch.views[objective.teacher.view].present & (batch.labels >= 0)
    logits = objective.probe(leaves["audio", "pooled"].detach()[heard])
    expected = torch.autograd.grad(torch.nn.functional.cross_entropy(logits, batch.labels[heard]), probe)
    torch.testing.assert_close(actual, expected)


def test_maps_of_two_stages_meet_on_the_smaller_grid() -> None:
    fine, coarse = torch.arange(32.0).view(1, 2, 4, 4, 1), torch.zeros(1, 2, 2, 2, 3)
    pooled, kept = _one_grid(fine, coarse)
    assert torch.equal(kept, coarse)
    assert torch.equal(pooled[0, 0, :, :, 0], torch.tensor([[2.5, 4.5], [10.5, 12.5]]))
    tokens = torch.zeros(1, 4, 1), torch.zeros(1, 2, 1)
    assert _one_grid(*tokens) == tokens


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "knowledge_distillation"}, "objectives.4.classes: knowledge_distillation compares class"),
        ({"method": "hint", "levels": (("stage:early", "pooled"),)}, "'video' offers hint no level 'stage:early'"),
        ({"method": "hint", "levels": (("tokens", "pooled"),)}, "only one of them has positions"),
        ({"method": "attention_transfer", "teacher": "text"}, "'text' offers attention_transfer no level 'tokens'"),
        ({"method": "similarity_preserving", "levels": (TOKENS,)}, "allowed: joint, pooled"),
        ({"method": "flow"}, "objectives.4.levels: flow takes two pairs, one after the other, got 0"),
        ({"method": "kdsvd", "levels": (TOKENS,)}, "kdsvd takes two pairs"),
        ({"method": "hint", "teacher": "video"}, "'video' is already named"),
        ({"method": "fitnet"}, "'fitnet'"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        build_objective("distillation", **{"teacher": "audio", **options})


def test_stages_of_other_widths_are_refused_by_flow() -> None:
    towers = {
        name: dataclasses.replace(tower, stages=(("early", 4 + (name == "audio")), ("late", 6)))
        for name, tower in FROZEN.items()
    }
    stages = (("stage:early", "stage:early"), ("stage:late", "stage:late"))
    with pytest.raises(ConfigError, match=r"levels\.0: flow needs equal channels, got 4 and 5"):
        build_objective("distillation", towers, method="flow", teacher="audio", levels=stages)
    with pytest.raises(ConfigError, match="not tokens with a stage"):
        build_objective("distillation", towers, method="flow", teacher="audio", levels=(TOKENS, stages[1]))


def test_maps_of_different_grids_are_refused_in_words() -> None:
    objective = distillation("attention_transfer")
    embeddings, _ = embed(objective, batch_for(objective), {"audio": torch.ones(12, 5, 10, dtype=torch.float64)})
    with pytest.raises(ConfigError, match=r"'video' and 'audio' have maps of different grids, \(4,\) and \(5,\)"):
        objective(embeddings, Comm())


def test_noise_contrastive_golden() -> None:
    """Constant banks and features: every x is 1/n. n = 6, K = 3."""
    row = noise_contrastive_rows(torch.full((1, 4), -math.log(6), dtype=torch.float64), slots=6, negatives=3)
    assert float(row) == pytest.approx(math.log(4) + 3 * math.log(4 / 3), abs=1e-9)
    assert float(row) == pytest.approx(2.24934, abs=1e-5)


def naive_rows(x: Tensor, c: float) -> Tensor:
    return -(x[:, 0] / (x[:, 0] + c)).log() - (c / (x[:, 1:] + c)).log().sum(1)


def test_noise_contrastive_is_its_formula_and_survives_extremes() -> None:
    log_x = torch.randn(5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        noise_contrastive_rows(log_x, slots=20, negatives=7), naive_rows(log_x.exp(), 7 / 20), rtol=0, atol=1e-12
    )
    far = torch.tensor([[-200.0, 200.0, -torch.inf]], requires_grad=True)
    torch.autograd.backward(noise_contrastive_rows(far, slots=20, negatives=2).sum())
    assert far.grad is not None and far.grad.isfinite().all() and far.grad[0, 2] == 0


def crd(**options: Any) -> Any:
    return build_objective(CRD, **{"teacher": "audio", "slots": 64, "negatives": 16, "width": 6, **options})


def test_contrastive_distillation_is_its_formula() -> None:
    objective = crd(other_classes=False)
    batch = batch_for(objective, "full")
    embeddings, leaves = embed(objective, batch)
    term = objective(embeddings, Comm())
    s, t = (
        torch.nn.functional.normalize(side(leaves[name, "pooled"]), dim=1)
        for side, name in ((objective.embed_student, "video"), (objective.embed_teacher, "audio"))
    )
    drawn, slots = objective._draw(torch.device("cpu")), [text_hash(key) % 64 for key in batch.keys]
    losses_of_sides = []
    for own, bank, other in ((s, objective.teacher_bank, t), (t, objective.student_bank, s)):
        rows = []
        for i, slot in enumerate(slots):
            kept = [int(k) for k in drawn if int(k) != slot]
            rows.append([(own[i] @ other[i] / 0.07).exp(), *((own[i] @ bank[k] / 0.07).exp() for k in kept)])
        z = 64 * torch.stack([x for row in rows for x in row]).mean()
        losses_of_sides.append(sum(naive_rows(torch.stack(row)[None] / z, 16 / 64) for row in rows) / 12)
    torch.testing.assert_close(term.loss, sum(losses_of_sides)[0])
    torch.testing.assert_close(term.pending["log_z"].exp()[1], z)


def test_banks_change_at_the_commit_alone_and_only_where_they_should() -> None:
    objective = crd()
    batch = batch_for(objective)
    embeddings, _ = embed(objective, batch)
    before = {name: value.clone() for name, value in objective.state_dict().items()}
    term = objective(embeddings, Comm())
    assert all(torch.equal(value, before[name]) for name, value in objective.state_dict().items())
    objective.commit(term.pending)
    both = embeddings.present(*[need.view for need in objective.needs])
    slots = {text_hash(key) % 64 for key, present in zip(batch.keys, both, strict=True) if present}
    others = [slot for slot in range(64) if slot not in slots]
    for name in ("student_bank", "teacher_bank"):
        bank = getattr(objective, name)
        torch.testing.assert_close(bank.norm(dim=1), torch.ones(64, dtype=torch.float64))
        assert torch.equal(bank[others], before[name][others])
        assert not torch.equal(bank, before[name])
    assert set((objective.slot_keys >= 0).nonzero()[:, 0].tolist()) == slots
    assert term.metrics["held"] == 0
    assert objective(embeddings, Comm()).metrics["held"] >= len(slots)


def test_a_sample_seen_again_moves_its_row_by_half_and_z_stays() -> None:
    objective = crd()
    batch = batch_for(objective, "full")
    keys = torch.tensor([text_hash(key) for key in batch.keys])
    rows = torch.nn.functional.normalize(torch.randn(2, 12, 6, dtype=torch.float64), dim=2)
    labels = torch.zeros(12, dtype=torch.int64)
    for number, values in enumerate(rows):
        pending = {
            "keys": keys,
            "labels": labels,
            "student": values,
            "teacher": values,
            "log_z": torch.ones(2) + number,
        }
        objective.commit(pending)
    alone = [i for i in range(12) if (keys % 64 == keys[i] % 64).sum() == 1]
    assert len(alone) > 6
    expected = torch.nn.functional.normalize(rows.mean(0), dim=1)
    torch.testing.assert_close(objective.student_bank[keys % 64][alone], expected[alone])
    assert objective.log_z.tolist() == [1, 1]
    assert int(objective.steps) == 2


def test_of_two_samples_in_one_slot_the_last_stays() -> None:
    objective = crd(slots=2, negatives=1)
    rows = torch.nn.functional.normalize(torch.randn(5, 6, dtype=torch.float64), dim=1)
    keys = torch.tensor([2, 4, 3, 6, 4])
    pending = {"keys": keys, "labels": keys, "student": rows, "teacher": rows, "log_z": torch.zeros(2)}
    objective.commit(pending)
    assert objective.slot_keys.tolist() == [4, 3]
    torch.testing.assert_close(objective.student_bank, rows[[4, 2]])


def test_draws_differ_by_step_and_own_class_is_no_negative() -> None:
    objective = crd()
    first = objective._draw(torch.device("cpu"))
    assert torch.equal(first, objective._draw(torch.device("cpu"))) and len(first) == 16
    objective.steps += 1
    assert not torch.equal(first, objective._draw(torch.device("cpu")))
    batch = batch_for(objective, "full")
    batch.labels.fill_(1)
    objective.slot_labels.fill_(1)
    term = objective(embed(objective, batch)[0], Comm())
    objective.student_bank.copy_(torch.nn.functional.normalize(torch.randn(64, 6, dtype=torch.float64), dim=1))
    objective.teacher_bank.copy_(objective.student_bank)
    assert objective(embed(objective, batch)[0], Comm()).loss == term.loss  # no slot is anyone's negative
    objective.slot_labels.fill_(2)
    assert objective(embed(objective, batch)[0], Comm()).loss != term.loss


def test_more_negatives_than_slots_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"objectives\.4\.negatives: at most the 8 slots, got 9"):
        crd(slots=8, negatives=9)
