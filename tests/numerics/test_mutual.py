"""Mutual learning: golden values, identities, queues, who is taught, what is refused."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
import torch
from loss_cases import golden, normed
from support.exactness import TOWERS
from support.objectives import FROZEN, batch_for, build_objective
from torch import Tensor

from mmcl import losses
from mmcl.distributed import Comm
from mmcl.types import ConfigError, Embeddings

A, B, C = golden()
TERMS = ("vcl", "icl", "soft_vcl", "soft_icl")


def cohort(**options: Any) -> Any:
    options = {"towers": ("video", "audio"), "queue": 0, "temperature": 0.1, **options}
    return build_objective("mutual", TOWERS, **options)


def run(objective: Any, queries: list[Tensor], keys: list[Tensor], absent: int | None = None) -> Any:
    """The term of these rows, one query and one key matrix per tower; ``absent``: a row that the first lacks."""
    batch = batch_for(objective, "full", rows=len(queries[0]))
    batch.groups.fill_(-1)
    if absent is not None:
        batch.views[objective.needs[0].view].present[absent] = False
    values: dict[Any, Tensor] = {}
    for needs, rows in ((objective.queries, queries), (objective.keys, keys)):
        for need, row in zip(needs.values(), rows, strict=True):
            values[need.tower, need.view, "joint", need.kind] = row
    return objective(Embeddings(values, batch), Comm())


def test_golden() -> None:
    metrics = run(cohort(), [A, C], [B, normed(A + B)]).metrics
    expected = {"vcl": 12.41871086, "soft_vcl": 28.58437977, "icl": 7.03498225, "soft_icl": 34.36510003}
    for name, value in expected.items():
        assert float(metrics[f"loss/{name}"]) == pytest.approx(value, abs=1e-6), name


def labelled(objective: Any, queries: list[Tensor], keys: list[Tensor], labels: Tensor) -> Any:
    """As ``run``, with labels and pooled rows of 10 numbers."""
    batch = batch_for(objective, "full", rows=len(labels))
    batch.groups.fill_(-1)
    batch.labels.copy_(labels)
    random = torch.Generator().manual_seed(0)
    values: dict[Any, Tensor] = {}
    for needs, rows in ((objective.queries, queries), (objective.keys, keys)):
        for need, row in zip(needs.values(), rows, strict=True):
            values[need.tower, need.view, "joint", need.kind] = row
            values[need.tower, need.view, "pooled", need.kind] = torch.randn(
                len(row), 10, generator=random, dtype=torch.float64
            )
    return objective(Embeddings(values, batch), Comm()), values


def test_with_labels_the_batch_is_its_formula() -> None:
    """Σ_a CE of the classifiers, and contrasts in which all keys of a class are positives."""
    labels = torch.tensor([0, 2, 0, 1])
    queries, keys = [A, C], [B, normed(A + B)]
    objective = cohort(classes=3)
    term, values = labelled(objective, queries, keys, labels)
    expected = {"classification": 0.0, "vcl": 0.0, "icl": 0.0}
    for a, name in enumerate(("video", "audio")):
        need = objective.queries[name]
        scores = objective.classifiers[name](values[name, need.view, "pooled", "online"])
        expected["classification"] += float(torch.nn.functional.cross_entropy(scores.detach(), labels))
        for b in range(2):
            logits = queries[a] @ keys[b].T / 0.1
            for i in range(4):
                mates = [j for j in range(4) if labels[j] == labels[i]]
                shares = [float(logits[i].logsumexp(0) - logits[i, j]) for j in mates]
                expected["vcl" if a == b else "icl"] += sum(shares) / len(mates) / 4
    for name, value in expected.items():
        assert float(term.metrics[f"loss/{name}"]) == pytest.approx(value), name
    soft = {name: float(term.metrics[f"loss/{name}"]) for name in ("soft_vcl", "soft_icl")}
    assert soft == pytest.approx({"soft_vcl": 28.58437977, "soft_icl": 34.36510003}, abs=1e-6), "as without labels"
    total = expected["classification"] + 0.1 * (expected["vcl"] + expected["icl"]) + sum(soft.values())
    assert float(term.loss) == pytest.approx(total)
    assert objective.labels_option == "classes" and cohort().labels_option is None


def test_the_ensemble_teaches_each_of_its_classifiers() -> None:
    labels = torch.tensor([0, -1, 2, 1])
    objective = cohort(classes=3, ensemble=0.7)
    term, values = labelled(objective, [A, C], [B, normed(A + B)], labels)
    plain, _ = labelled(cohort(classes=3), [A, C], [B, normed(A + B)], labels)
    kept = [0, 2, 3]
    logits = []
    for name, need in objective.queries.items():
        logits.append(objective.classifiers[name](values[name, need.view, "pooled", "online"])[kept])
    together = ((logits[0] + logits[1]) / 2 / 3.0).detach().log_softmax(1)
    expected = sum(9 * (together.exp() * (together - (own / 3.0).log_softmax(1))).sum(1).mean() for own in logits)
    torch.testing.assert_close(term.metrics["loss/ensemble"], expected.detach())
    torch.testing.assert_close(term.loss - plain.loss, 0.7 * expected)
    weights = [classifier.weight for classifier in objective.classifiers.values()]
    actual = torch.autograd.grad(term.loss, weights)
    # nothing else reaches the classifiers
    alone = sum(torch.nn.functional.cross_entropy(own, labels[kept]) for own in logits) + 0.7 * expected
    torch.testing.assert_close(actual, torch.autograd.grad(alone, weights))


def test_rows_without_a_label_take_no_part_and_one_class_is_finite() -> None:
    objective = cohort(classes=3)
    queries = [x.clone().requires_grad_() for x in (A, C)]
    term, _ = labelled(objective, queries, [B, normed(A + B)], torch.tensor([1, -1, 1, 1]))
    torch.autograd.backward(term.loss)
    kept = [0, 2, 3]
    assert all(q.grad is not None and not q.grad[1].any() and q.grad[kept].isfinite().all() for q in queries)
    assert int(term.metrics["rows"]) == 3
    term, _ = labelled(objective, [A, C], [B, C], torch.full((4,), -1))
    assert float(term.loss.detach()) == 0


def test_a_queue_holds_nobody_of_ones_class_against_one() -> None:
    objective = cohort(towers=("video",), classes=3, queue=8)
    objective.queue_video = torch.zeros(8, 3, dtype=torch.float64)
    labels = torch.tensor([0, 1, 2, 0])
    objective.commit(labelled(objective, [A], [B], labels)[0].pending)
    assert objective.queue_labels[:4].tolist() == labels.tolist()
    term, _ = labelled(objective, [A], [C], labels)
    each = []
    for i in range(4):
        others = [j for j in range(4) if labels[j] != labels[i]]
        each.append(float(losses.moco(A[i : i + 1], C[i : i + 1], B[others], temperature=0.1)))
    assert float(term.metrics["loss/vcl"]) == pytest.approx(sum(each) / 4)


def test_weights_weigh() -> None:
    weights = dict(zip(TERMS, (0.1, 2.0, 0.0, 0.5), strict=True))
    term = run(cohort(**weights), [A, C], [B, normed(A + B)])
    assert float(term.loss) == pytest.approx(sum(w * float(term.metrics[f"loss/{n}"]) for n, w in weights.items()))


def test_twins_have_nothing_to_tell_each_other() -> None:
    metrics = run(cohort(), [A, A], [B, B]).metrics
    assert metrics["loss/soft_vcl"] == pytest.approx(0, abs=1e-12)
    assert metrics["loss/soft_icl"] == pytest.approx(0, abs=1e-12)
    torch.testing.assert_close(metrics["loss/icl"], metrics["loss/vcl"])


def test_one_tower_alone_is_moco() -> None:
    objective = cohort(towers=("video",), queue=8)
    objective.queue_video = torch.zeros(8, 3, dtype=torch.float64)
    assert float(run(objective, [A], [B]).loss) == 0, "an empty queue has no negatives"
    objective.commit(run(objective, [A], [B]).pending)
    objective.commit(run(objective, [A], [C]).pending)
    queue = torch.cat([B, C])
    assert torch.equal(objective.queue_video, queue)
    torch.testing.assert_close(run(objective, [A], [B]).loss, losses.moco(A, B, queue, temperature=0.1))
    objective.commit(run(objective, [A], [A]).pending)
    assert torch.equal(objective.queue_video, torch.cat([A, C])) and int(objective.pointer) == 4


def test_a_queue_shorter_than_the_batch_keeps_the_newest() -> None:
    objective = cohort(towers=("video",), queue=3)
    objective.queue_video = torch.zeros(3, 3, dtype=torch.float64)
    for keys, ids in ((B[:1], [7]), (C, [1, 2, 3, 4])):
        objective.commit({"keys": {"video": keys}, "ids": torch.tensor(ids)})
    order = [1, 2, 0]  # the first took place 0
    assert torch.equal(objective.queue_video[order], C[1:]) and objective.queue_ids[order].tolist() == [2, 3, 4]
    assert int(objective.pointer) == 1 and int(objective.filled) == 3


def test_only_rows_of_the_whole_cohort_count_and_enter_the_queues() -> None:
    objective = cohort(queue=8)
    for name in ("video", "audio"):
        setattr(objective, f"queue_{name}", torch.zeros(8, 3, dtype=torch.float64))
    objective.commit(run(objective, [A, C], [B, C], absent=2).pending)
    kept = [0, 1, 3]
    assert torch.equal(objective.queue_video[:3], B[kept]) and torch.equal(objective.queue_audio[:3], C[kept])
    assert int(objective.filled) == 3
    queries = [x.clone().requires_grad_() for x in (A, C)]
    term = run(objective, queries, [B, C], absent=2)
    torch.autograd.backward(term.loss)
    assert all(q.grad is not None and not q.grad[2].any() and q.grad[kept].any(1).all() for q in queries)
    expected = losses.moco(A[kept], B[kept], B[kept], temperature=0.1) + losses.moco(
        C[kept], C[kept], C[kept], temperature=0.1
    )
    torch.testing.assert_close(term.metrics["loss/vcl"], expected)


@pytest.mark.parametrize("soft", ["soft_vcl", "soft_icl"])
def test_soft_targets_have_no_gradient(soft: str) -> None:
    """Of the two directions, each tower receives the one in which it is the student: its gradient is the same when the
    other tower's queries and keys come detached."""
    only = cohort(**{**dict.fromkeys(TERMS, 0.0), soft: 1.0})

    def gradient(detached: bool) -> Tensor:
        first, second = (x.clone().requires_grad_() for x in (A, C))
        term = run(only, [first, second.detach() if detached else second], [B, normed(A + B)])
        return torch.autograd.grad(term.loss, first)[0]

    torch.testing.assert_close(gradient(True), gradient(False))
    # and moving the teacher would change the loss: finite differences see what the gradient leaves out
    query = A.clone().requires_grad_()
    analytic = torch.autograd.grad(run(only, [query, C], [B, normed(A + B)]).loss, query)[0]
    moved = A.clone()
    moved[0, 0] += 1e-6
    numeric = (run(only, [moved, C], [B, normed(A + B)]).loss - run(only, [A, C], [B, normed(A + B)]).loss) / 1e-6
    assert abs(float(numeric) - float(analytic[0, 0])) > 1e-3


def test_samples_of_one_group_are_no_negatives() -> None:
    objective = cohort()
    batch = batch_for(objective, "full", rows=4)
    values = {}
    for need, rows in zip(objective.needs, (A, C, B, normed(A + B)), strict=True):
        values[need.tower, need.view, "joint", need.kind] = rows.clone().requires_grad_()
    batch.groups.fill_(5)
    with torch.autograd.set_detect_anomaly(True):
        term = objective(Embeddings(values, batch), Comm())
        torch.autograd.backward(term.loss)
    assert float(term.loss.detach()) == 0
    assert all(row.grad is not None and not row.grad.any() for row in values.values())


def test_cohorts_share_their_crops() -> None:
    same = {name: dataclasses.replace(TOWERS["video"], name=name) for name in ("small", "large")}
    objective = build_objective("mutual", same, queue=0, augmentation="strong", key_clip=0)
    assert len({need.view for need in objective.queries.values()}) == 1
    assert len({need.view for need in objective.needs}) == 2
    assert {need.kind for need in objective.keys.values()} == {"momentum"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"towers": ("video", "vdeo")}, "objectives.4.towers.1: unknown name 'vdeo' (did you mean 'video'?)"),
        ({"towers": ("video", "video")}, "objectives.4.towers.1: 'video' is already in the cohort"),
        ({"ensemble": 1.0}, "objectives.4.ensemble: 1.0, but it needs classes and two towers"),
        ({"ensemble": 1.0, "classes": 3, "towers": ("video",)}, "objectives.4.ensemble: 1.0, but it needs classes"),
        ({"keys": "online"}, "objectives.4.queue: needs keys: momentum"),
        ({"keys": "online", "queue": 0, "key_clip": 0}, "objectives.4.vcl: query and key are one view"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        build_objective("mutual", TOWERS, **options)
    with pytest.raises(ConfigError, match="'audio' is frozen"):
        build_objective("mutual", FROZEN)


def test_the_key_of_a_text_tower_is_the_same_caption() -> None:
    """A text has no other time; a second caption is something that not every sample has."""
    objective = build_objective("mutual", TOWERS)
    clips = {need.tower: need.view.clip for need in objective.needs if need.kind == "momentum"}
    assert clips == {"video": 1, "audio": 1, "text": 0}
