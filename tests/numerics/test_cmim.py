"""cMIM: the sheet's numbers, a contrast that does not feel the batch size, noise by draw, informative embeddings."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from support.exactness import RAW, pick_rows
from support.objective_cases import rows_for
from support.objectives import batch_for, build_objective
from torch import Tensor
from torch.distributions import Normal

from mmcl import losses
from mmcl.distributed import Comm
from mmcl.hashing import uniform
from mmcl.losses.cmim import cmim_contrast_rows, mim_latent
from mmcl.media.device_hash import device_normal
from mmcl.types import ConfigError, Embeddings

DECODER = {"width": 8, "layers": 1, "heads": 2, "hidden": 12}
CODES = {"name": "codes", "count": 5, "detail": 1, "samples": 2}


def make(tower: str = "text", **options: Any) -> Any:
    given = {"tower": tower, "decoder": DECODER, "targets": CODES, "latent": 4, **options}
    objective = build_objective("cmim", RAW, **given)
    torch.nn.init.normal_(objective.decoder.head.weight)
    return objective


def seen(objective: Any, kind: str = "mixed") -> Embeddings:
    batch = batch_for(objective, kind, step=1)
    batch.groups.fill_(-1)
    return rows_for(objective, batch)


def test_the_latent_term_of_the_sheet() -> None:
    z, mean = torch.tensor([[0.5, -1.0]]).double(), torch.tensor([[0.0, -0.5]]).double()
    deviation = torch.tensor([[1.0, 0.5]]).double()
    found = mim_latent(z, mean, deviation.log())
    assert abs(float(found) - 2.11630348) < 1e-8
    by_torch = -0.5 * (Normal(mean, deviation).log_prob(z) + Normal(0.0, 1.0).log_prob(z)).sum(1)
    torch.testing.assert_close(found, by_torch)
    sharper = mim_latent(mean, mean, deviation.log() + 1) - mim_latent(mean, mean, deviation.log())
    assert abs(float(sharper) - 1.0) < 1e-12, "half of two units of log q: a wide posterior is penalised"


def test_the_contrast_of_the_sheet() -> None:
    i = torch.arange(1, 5).double()
    a = torch.stack([i.sin(), (2 * i).cos(), (3 * i + 0.5).sin()], 1)
    b = torch.stack([i.cos(), (2 * i + 0.3).sin(), (3 * i).cos()], 1)
    assert abs(float(losses.cmim_contrast(a, b)) - 2.49852525) < 1e-8
    others = ~torch.eye(4, dtype=torch.bool)
    rows = cmim_contrast_rows(a, b, torch.arange(4), others, temperature=0.1)
    assert abs(float(rows.mean()) - 2.49852525) < 1e-8
    cold = cmim_contrast_rows(a, b, torch.arange(4), others, temperature=1e9)
    torch.testing.assert_close(cold, torch.full((4,), math.log(2)).double(), rtol=0, atol=1e-8)


@pytest.mark.parametrize("critic", ["cosine", "dot"])
def test_the_contrast_does_not_feel_the_batch_size(critic: Any) -> None:
    """log 2 where all are equal, for any B, where InfoNCE says log B; each negative k times is no other loss."""
    for size in (2, 4, 64):
        same, others = torch.ones(size, 3).double(), ~torch.eye(size, dtype=torch.bool)
        found = cmim_contrast_rows(same, same, torch.arange(size), others, temperature=0.1, critic=critic)
        torch.testing.assert_close(found, torch.full((size,), math.log(2)).double())
        assert abs(float(losses.info_nce(same, same, temperature=0.1)) - math.log(size)) < 1e-12
    random = torch.Generator().manual_seed(0)
    a, b = (torch.randn(5, 3, generator=random, dtype=torch.float64) for _ in range(2))
    itself, others = torch.arange(5), ~torch.eye(5, dtype=torch.bool)
    once = cmim_contrast_rows(a, b, itself, others, temperature=0.3, critic=critic)
    again = torch.cat([torch.eye(5, dtype=torch.bool), *[torch.zeros(5, 5, dtype=torch.bool)] * 2], 1)
    many = ~again & others.repeat(1, 3)
    torch.testing.assert_close(
        cmim_contrast_rows(a, b.repeat(3, 1), itself, many, temperature=0.3, critic=critic), once
    )
    assert not cmim_contrast_rows(a, b, itself, torch.zeros_like(others), temperature=0.3, critic=critic).any()


@pytest.mark.parametrize("alike", [0.0, 1.0])
def test_the_same_rows_in_small_batches_or_in_one_make_the_same_contrast(alike: float) -> None:
    """512 pairs, unrelated or alike, in batches of 8, of 64 and of all: InfoNCE rises with the logarithm."""
    random = torch.Generator().manual_seed(0)
    a, noise = (torch.randn(512, 16, generator=random, dtype=torch.float64) for _ in range(2))
    b = alike * a + noise

    def mean(loss: Any, size: int) -> float:
        parts = zip(a.split(size), b.split(size), strict=True)
        return float(torch.stack([loss(x, y, temperature=0.5) for x, y in parts]).mean())

    contrasts, ordinary = (
        [mean(loss, size) for size in (8, 64, 512)] for loss in (losses.cmim_contrast, losses.info_nce)
    )
    assert max(contrasts) - min(contrasts) < 0.02 * contrasts[0]
    assert ordinary[1] > ordinary[0] + 1.5 and ordinary[2] > ordinary[1] + 1.8, "of log 8 each, 2.08"


def test_the_contrast_of_the_objective_does_not_feel_it_either() -> None:
    """A batch where all samples look alike, of 4 rows and of 12."""
    objective = make(other="mean", log_scale=(-30.0, -29.0))
    for rows in (4, 12):
        batch = batch_for(objective, "full", rows=rows)
        batch.groups.fill_(-1)
        embeddings = rows_for(objective, batch)
        values = {key: torch.ones_like(x) for key, x in embeddings.values.items()}
        found = objective(Embeddings(values, batch), Comm()).metrics["contrast"]
        assert abs(float(found) - math.log(2)) < 1e-9


@pytest.mark.parametrize("other", ["draw", "mean"])
def test_the_loss_is_the_formula(other: str) -> None:
    objective = make(other=other, contrast=0.6, temperature=0.4, log_scale=(-0.1, 0.2))
    embeddings = seen(objective)
    present = embeddings.present(objective.need.view)
    mean, log_scale = objective.posterior(embeddings.get(objective.need)[present])
    assert log_scale.min() == -0.1 and log_scale.max() == 0.2, "both bounds are reached"
    draws = embeddings.batch.draws[present]
    z = mean + log_scale.exp() * objective.noise(draws, 0)
    second = mean if other == "mean" else mean + log_scale.exp() * objective.noise(draws, 1)
    view = embeddings.batch.views[objective.need.view]
    log_p = []
    for row, (ids, real) in enumerate(zip(view.data[present], view.mask[present], strict=True)):
        ids, ones = ids[None, : real.sum()], torch.ones(1, int(real.sum()), dtype=torch.bool)
        chances = objective.logits(ids, ones, z[row : row + 1]).log_softmax(2)
        log_p.append(chances[0].gather(1, ids[0, :, None]).sum())
    half = 0.5 * (Normal(mean, log_scale.exp()).log_prob(z) + Normal(0.0, 1.0).log_prob(z)).sum(1)
    expected = (-torch.stack(log_p) - half).mean() + 0.6 * losses.cmim_contrast(z, second, temperature=0.4)
    term = objective(embeddings, Comm())
    torch.testing.assert_close(term.loss, expected)
    tokens = int((view.mask & present[:, None]).sum())
    bits = float(-torch.stack(log_p).sum().detach()) / tokens / math.log(2)
    assert math.isclose(float(term.metrics["bits_per_dim"]), bits, rel_tol=1e-9)
    per_token = make(other=other, likelihood="mean", log_scale=(-0.1, 0.2))
    per_token.load_state_dict(objective.state_dict())
    found = per_token(embeddings, Comm()).metrics["reconstruction"]
    lengths = view.mask[present].sum(1)
    torch.testing.assert_close(found, (-torch.stack(log_p) / lengths).mean().detach())


def test_noise_is_normal_and_hangs_on_seed_draw_and_place_alone() -> None:
    draws = torch.arange(4000)
    objective = make(latent=3)
    noise = objective.noise(draws, 0)
    assert noise.shape == (4000, 3) and noise.dtype == torch.float64
    assert noise.mean().abs() < 0.03 and (noise.std() - 1).abs() < 0.03
    assert abs(float((noise.abs() > 1.959964).double().mean()) - 0.05) < 0.01
    order = torch.randperm(4000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(objective.noise(draws[order], 0), noise[order])
    for another in (
        objective.noise(draws, 1),
        make(latent=3, seed=1).noise(draws, 0),
        objective.noise(draws + 4000, 0),
    ):
        assert torch.corrcoef(torch.stack([another.flatten(), noise.flatten()]))[0, 1].abs() < 0.05
    torch.manual_seed(99)
    assert torch.equal(objective.noise(draws, 0), noise)
    u, v = uniform(1, 2, [3, 4], 0), uniform(1, 2, [3, 4], 1)
    by_hand = torch.from_numpy(np.sqrt(-2 * np.log(1 - u)) * np.cos(2 * np.pi * v))
    golden = torch.tensor([0.024308645721, -1.045748390590], dtype=torch.float64)
    for expected in (by_hand, golden):
        torch.testing.assert_close(device_normal(1, 2, torch.tensor([3, 4])), expected, rtol=0, atol=1e-11)


def test_rows_of_a_group_are_no_negatives() -> None:
    objective = make()
    embeddings = seen(objective, "full")
    embeddings.batch.groups[:, 0] = 5
    assert float(objective(embeddings, Comm()).metrics["contrast"]) == 0
    everyone = make(mask_false_negatives=False)
    assert float(everyone(embeddings, Comm()).metrics["contrast"]) > 0.1


def test_informative_embeddings_are_the_decoders_states_averaged_over_tokens() -> None:
    objective = make()
    embeddings = seen(objective)
    view, pooled = embeddings.batch.views[objective.need.view], embeddings.get(objective.need)
    found = objective.informative(pooled, view)
    assert found.shape == (12, 8) and not found.requires_grad
    states: list[Tensor] = []
    objective.decoder.head.register_forward_hook(lambda module, given, out: states.append(given[0]))
    for i in view.present.nonzero()[:, 0].tolist():
        ids = view.data[i : i + 1, : view.mask[i].sum()]
        z = objective.posterior(pooled[i : i + 1])[0]
        objective.logits(ids, torch.ones_like(ids, dtype=torch.bool), z)
        torch.testing.assert_close(found[i], states[-1][0].mean(0))
    assert states and not found[~view.present].any()
    turned = torch.arange(11, -1, -1)
    again = objective.informative(pooled[turned], pick_rows(embeddings.batch, turned).views[objective.need.view])
    torch.testing.assert_close(again[turned], found)


def test_options_that_cannot_be() -> None:
    with pytest.raises(ConfigError, match="log_scale must be a lower and a higher bound"):
        make(log_scale=(1.0, 0.0))
    with pytest.raises(ConfigError, match=r"objectives\.4\.tower"):
        make("motion")
