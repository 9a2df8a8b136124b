"""Mixed rows find both samples in their shares: against the pure losses and against loops over what is there."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from loss_cases import golden
from support.exactness import TOWERS
from support.objectives import batch_for, build_objective, embed
from support.recipes import tiny_config
from torch import Tensor

from mmcl import losses
from mmcl.distributed import Comm
from mmcl.hashing import uniform
from mmcl.media.augmentation import Augmentation, VideoAugmentation
from mmcl.media.augmentation_draws import BETA_TRIES, beta_share, draw_params
from mmcl.media.mixing import GLOBAL, RANK
from mmcl.objectives.base import ObjectiveMix
from mmcl.recipe import build_model
from mmcl.types import Batch, ConfigError, Embeddings, VideoSpec, View, ViewBatch

A, B, C = golden()
BETA, PERMUTATION = torch.tensor([0.3, 1.0, 0.6, 1.0], dtype=torch.float64), torch.tensor([1, 0, 3, 2])
MIXED = {"inputs": {"video": "mixed", "audio": "mixed"}}


def mixed_rows(x: Tensor) -> Tensor:
    return BETA[:, None] * x + (1 - BETA)[:, None] * x[PERMUTATION]


def given(
    rows: Mapping[str, Tensor], options: Mapping[str, Any], scope: str = GLOBAL, met: Tensor = PERMUTATION
) -> Any:
    """(objective, embeddings) of these joint rows; views under ``mixed`` were mixed by BETA."""
    objective = build_objective("m3col", TOWERS, towers=tuple(rows), mask_false_negatives=False, **options)
    draws = torch.tensor([20, 21, 22, 23])
    views, values = {}, {}
    for need in objective.needs:
        x, params = rows[need.tower], {}
        if need.view.augmentation == "mixed":
            x, params = mixed_rows(x), {scope: 1 - BETA, "mix_draw": draws[met]}
        views[need.view] = ViewBatch(x, torch.ones(4, dtype=torch.bool), params=params)
        values[need.tower, need.view, "joint", "online"] = x
    batch = Batch(views, tuple("abcd"), draws, torch.full((4, 1), -1), torch.full((4,), -1))
    return objective, Embeddings(values, batch)


def value(objective: Any, embeddings: Embeddings, progress: float = 0.0) -> float:
    return float(objective(dataclasses.replace(embeddings, progress=progress), Comm()).loss)


@pytest.mark.parametrize("scope", [GLOBAL, RANK])
def test_golden_mix_of_inputs_in_both_directions(scope: str) -> None:
    objective, embeddings = given({"video": A, "audio": B}, MIXED, scope)
    there = losses.m3co(mixed_rows(A), B, BETA, PERMUTATION, temperature=0.1)
    assert float(there) == pytest.approx(2.18308255, abs=1e-7)
    back = losses.m3co(mixed_rows(B), A, BETA, PERMUTATION, temperature=0.1)
    assert value(objective, embeddings) == pytest.approx(float(there + back), abs=1e-12)


def test_who_meets_itself_keeps_its_weight() -> None:
    """With assigned targets, as in the authors' code, a row would keep β alone."""
    objective, embeddings = given({"video": A, "audio": B}, MIXED, met=torch.arange(4))
    forth, back = (losses.clip(mixed_rows(x), y, scale=10.0) for x, y in ((A, B), (B, A)))
    assert value(objective, embeddings) == pytest.approx(float(forth + back), abs=1e-12)


def test_three_modalities_go_round_and_unmixed_rows_are_clip() -> None:
    rows = {"video": A, "audio": B, "text": C}
    objective, embeddings = given(rows, {"mixed_rows": 0.0})
    assert objective.directions == [("video", "audio"), ("audio", "text"), ("text", "video")]
    wanted = sum(losses.clip(x, y, scale=10.0) for x, y in ((A, B), (B, C), (C, A)))
    assert value(objective, embeddings) == pytest.approx(float(wanted), abs=1e-12)


def test_golden_soft_contrast_after_its_share_of_the_run() -> None:
    objective, embeddings = given({"video": A, "text": B}, {"mixed_rows": 0.0, "fade": 0.2})
    soft = losses.soft_clip(A, B, temperature=0.125)
    assert float(soft) == pytest.approx(2.76254681, abs=1e-7)
    after = float(soft + losses.soft_clip(B, A, temperature=0.125))
    before = 2 * float(losses.clip(A, B, scale=10.0))
    assert value(objective, embeddings) == value(objective, embeddings, 0.33) == pytest.approx(before, abs=1e-12)
    assert value(objective, embeddings, 0.43) == pytest.approx((before + after) / 2, abs=1e-12)
    assert value(objective, embeddings, 0.53) == value(objective, embeddings, 1.0) == pytest.approx(after, abs=1e-12)
    never, _ = given({"video": A, "text": B}, {"mixed_share": 1.0})
    at_once, _ = given({"video": A, "text": B}, {})
    assert [at_once.soft_share(x) for x in (0.0, 0.32, 0.34)] == [0.0, 0.0, 1.0]
    assert never.soft_share(1.0) == 0.0


def test_the_mix_tells_how_far_the_run_is() -> None:
    objective, embeddings = given({"video": A, "text": B}, {"mixed_rows": 0.0})
    mix = ObjectiveMix({"m3col": objective}, {"m3col": 1.0}, steps=10)
    found = [float(mix(embeddings, Comm(), step=step).metrics["m3col/soft"]) for step in range(10)]
    assert found == [0.0] * 4 + [1.0] * 6, "the first third of the steps"


def test_missing_modalities_and_groups() -> None:
    """Sound is mixed as it comes, with a sample that may have no caption; its row then asks nothing."""
    objective = build_objective("m3col", TOWERS, towers=("audio", "text"), inputs={"audio": "mixed"}, temperature=0.4)
    lost = 0
    for step in range(4):
        batch = batch_for(objective, "mixed", step)
        embeddings, _ = embed(objective, batch, seed=step)
        clean = {name: torch.nn.functional.normalize(embeddings.get(need)) for name, need in objective.clean.items()}
        view = batch.views[objective.mixed["audio"].view]
        share = view.params[GLOBAL].tolist()
        met = [batch.draws.tolist().index(draw) for draw in view.params["mix_draw"].tolist()]
        rows = torch.nn.functional.normalize(embeddings.get(objective.mixed["audio"]))
        both = (view.present & batch.views[objective.clean["text"].view].present).tolist()
        asks = [both[i] and (both[met[i]] or share[i] == 0) for i in range(12)]
        lost += sum(both) - sum(asks)
        related = ((batch.groups[:, None] == batch.groups) & (batch.groups[:, None] >= 0)).any(2)

        def target(i: int, j: int, share: list[float] = share, met: list[int] = met) -> float:
            return (1 - share[i]) * (i == j) + share[i] * (met[i] == j)

        total = torch.zeros((), dtype=torch.float64)
        for i in (i for i in range(12) if asks[i]):
            near = [j for j in range(12) if both[j] and (target(i, j) or not related[i, j])]
            logits = rows[i] @ clean["text"][near].T / 0.4
            total -= (torch.tensor([target(i, j) for j in near]) * logits.log_softmax(0)).sum() / 2
        for j in (j for j in range(12) if both[j]):
            near = [i for i in range(12) if asks[i] and (target(i, j) or not related[i, j])]
            if near:
                logits = clean["text"][j] @ rows[near].T / 0.4
                total -= (torch.tensor([target(i, j) for i in near]) * logits.log_softmax(0)).sum() / 2
        forth = objective._mixed_contrast("audio", "text", embeddings, Comm())
        torch.testing.assert_close(forth, total / max(sum(asks), 1), rtol=1e-6, atol=1e-6)
    assert lost > 0, "some row met a sample without the other modality"


def test_embeddings_meet_others_by_seed_and_draw() -> None:
    def partners(seed: int, first: int) -> list[int]:
        objective, embeddings = given({"video": A, "text": B}, {"seed": seed})
        batch = dataclasses.replace(embeddings.batch, draws=first + torch.arange(4))
        found = objective._mix("video", torch.ones(4, dtype=torch.bool), Embeddings(embeddings.values, batch), Comm())
        wanted = torch.lerp(A, A[found.partners], found.share[:, None])
        torch.testing.assert_close(found.rows, wanted)
        assert sorted(found.partners.tolist()) == [0, 1, 2, 3] and all(found.partners != torch.arange(4))
        return [*found.partners.tolist(), *found.share.tolist()]

    assert partners(0, 8) == partners(0, 8)
    assert len({tuple(partners(seed, first)) for seed in (0, 1) for first in (8, 12, 16)}) > 3


def test_heads_name_what_is_there() -> None:
    objective = build_objective("m3col", TOWERS, classes=3, hidden=5)
    batch = batch_for(objective, "mixed", 1)
    embeddings, _ = embed(objective, batch)
    term = objective(embeddings, Comm())
    contrast = term.metrics["loss/contrast"]
    pooled = {name: embeddings.get(need, "pooled") for name, need in objective.clean.items()}
    here = {name: embeddings.present(need.view) for name, need in objective.clean.items()}
    each = []
    for name, rows in pooled.items():
        known = here[name] & (batch.labels >= 0)
        assert 0 < known.sum() < 12
        each.append(torch.nn.functional.cross_entropy(objective.heads[f"of_{name}"](rows)[known], batch.labels[known]))
    known = torch.stack(list(here.values())).any(0) & (batch.labels >= 0)
    fused = objective.heads["fused"](torch.cat(list(pooled.values()), 1))[known]
    each.append(torch.nn.functional.cross_entropy(fused, batch.labels[known]))
    torch.testing.assert_close(term.loss, 0.1 * contrast + torch.stack(each).sum())
    batch.labels.fill_(-1)
    torch.testing.assert_close(objective(embeddings, Comm()).loss, 0.1 * contrast)


@pytest.mark.parametrize("concentration", [0.15, 1.0])
def test_shares_are_of_a_beta_distribution(concentration: float) -> None:
    u = uniform(7, np.arange(20_000)[:, None], np.arange(2 * BETA_TRIES)).reshape(-1, 2, BETA_TRIES).swapaxes(0, 1)
    share = beta_share(concentration, u)
    assert share.shape == (20_000,) and share.min() >= 0 and share.max() <= 1
    assert share.mean() == pytest.approx(0.5, abs=0.01)
    assert share.var() == pytest.approx(1 / (4 * (2 * concentration + 1)), abs=0.004)
    grid = torch.linspace(0, 1, 9, dtype=torch.float64)[1:-1]
    reference = torch.distributions.Beta(*torch.tensor([concentration] * 2)).sample((200_000,))
    wanted = [float((reference < x).float().mean()) for x in grid]
    assert [(share < float(x)).mean() for x in grid] == pytest.approx(wanted, abs=0.015)


def test_an_augmentation_draws_shares_from_it() -> None:
    chosen = Augmentation(video=VideoAugmentation(mix={"share": [0.0, 1.0], "beta": 0.15, "probability": 0.5}))
    view = View(VideoSpec(), augmentation="mixed")
    shares = np.array([draw_params(chosen, view, (0, 0, key))[RANK] for key in range(1500)])
    assert (shares == 0).mean() == pytest.approx(0.5, abs=0.06), "half of the rows stay"
    # of Beta(0.15, 0.15) three quarters lie within 0.1 of an end, of a uniform share a fifth
    mixed = shares[shares > 0]
    assert ((mixed < 0.1) | (mixed > 0.9)).mean() == pytest.approx(0.76, abs=0.06)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"towers": ("video", "sound")}, r"4\.towers\.1: .*'sound'"),
        ({"towers": ("video", "video")}, r"4\.towers\.1: 'video' is already"),
        ({"inputs": {"sound": "x"}}, r"4\.inputs: .*'sound'"),
        ({"inputs": {"text": "x"}}, r"4\.inputs\.text: only inputs of video and audio"),
    ],
)
def test_refuses(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=r"objectives\." + words):
        build_objective("m3col", TOWERS, **options)


def test_refuses_an_augmentation_that_does_not_mix() -> None:
    def config(text: str) -> Any:
        term = "objectives=[{name: m3col, inputs: {video: laid}}]"
        return tiny_config(term, f"data.augmentations={{laid: {{{text}}}}}")

    build_model(config("video: {mix: {beta: 0.15}}"))
    with pytest.raises(ConfigError, match=r"^objectives\.0\.inputs\.video: 'laid' mixes no video; give data\.augm"):
        build_model(config("video: {flip: 0.5}"))
