"""Rules that the distilling and mutual objectives keep: order of rows, bfloat16 autocast, a batch of one row."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.exactness import TOWERS, pick_rows
from support.objectives import FROZEN, batch_for, build_objective, embed
from support.tcl import SMALL as TCL

from mmcl.distributed import Comm
from mmcl.types import Batch, Embeddings

TOKENS = ("tokens", "tokens")
DISTILLATION = {"name": "distillation", "teacher": "audio"}
CASES: list[dict[str, Any]] = [
    {"name": "compositional_distillation", "teachers": ("audio", "text"), "classes": 3},
    {"name": "compositional_distillation", "teachers": ("audio",), "temperatures": {"audio": 0.01}},
    {"name": "contrastive_distillation", "teacher": "audio", "slots": 64, "negatives": 32, "temperature": 0.01},
    {**DISTILLATION, "method": "knowledge_distillation", "classes": 3},
    {**DISTILLATION, "method": "relational"},
    {**DISTILLATION, "method": "correlation_congruence"},
    {**DISTILLATION, "method": "factor_transfer"},
    {**DISTILLATION, "method": "kdsvd", "levels": (TOKENS, TOKENS)},
    {"name": "mutual", "queue": 0, "temperature": 0.01},
    {"name": "mutual", "queue": 0, "temperature": 0.1, "classes": 3},
    {"name": "tcl", "pairs": (("video", "text"),), **TCL},
    {"name": "tcl", "pairs": (("audio", "video"),), **TCL, "mlm": None},
]
TRAINED = ("mutual", "tcl")
each = pytest.mark.parametrize("options", CASES, ids=lambda options: options.get("method", options["name"]))


def made(options: dict[str, Any]) -> Any:
    rest = {key: value for key, value in options.items() if key != "name"}
    return build_objective(options["name"], TOWERS if options["name"] in TRAINED else FROZEN, **rest)


def turned(embeddings: Embeddings, order: torch.Tensor) -> Embeddings:
    batch: Batch = pick_rows(embeddings.batch, order)
    return Embeddings({key: value[order] for key, value in embeddings.values.items()}, batch, embeddings.scales)


@each
def test_the_order_of_rows_does_not_matter(options: dict[str, Any]) -> None:
    objective = made(options)
    embeddings, _ = embed(objective, batch_for(objective))
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    loss = objective(embeddings, Comm()).loss
    torch.testing.assert_close(objective(turned(embeddings, order), Comm()).loss, loss, rtol=1e-10, atol=1e-10)


@each
def test_bfloat16_autocast_is_finite_and_float32_inside(options: dict[str, Any]) -> None:
    objective = made(options).float()
    embeddings, leaves = embed(objective, batch_for(objective, "full"))
    scales = {name: torch.tensor(100.0) for name in objective.scales}
    narrow = Embeddings({key: value.float() for key, value in embeddings.values.items()}, embeddings.batch, scales)
    exact = objective(narrow, Comm()).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = objective(narrow, Comm()).loss
    torch.autograd.backward(loss)
    assert loss.dtype == torch.float32
    assert abs(float(loss.detach()) - float(exact.detach())) < 0.1 * abs(float(exact.detach()))
    assert all(leaf.grad is None or leaf.grad.isfinite().all() for leaf in leaves.values())


@each
def test_one_row_and_one_class_are_finite(options: dict[str, Any]) -> None:
    objective = made(options)
    embeddings, leaves = embed(objective, batch_for(objective, "full"))
    embeddings.batch.labels.fill_(1)
    for rows in (torch.arange(12), torch.arange(1)):
        with torch.autograd.set_detect_anomaly(True):
            loss = objective(turned(embeddings, rows), Comm()).loss
            torch.autograd.backward(loss)
        assert loss.isfinite()
        assert all(leaf.grad is None or leaf.grad.isfinite().all() for leaf in leaves.values())
