"""Decoders that predict patches themselves: the Gaussian by torch's own, its density as bits, and that bits fall."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from support.exactness import RAW
from support.objective_cases import rows_for
from support.objectives import batch_for, build_objective
from torch import Tensor
from torch.distributions import Normal

from mmcl.distributed import Comm
from mmcl.objectives.generative.decoders import Likelihood, likelihood
from mmcl.objectives.generative.options import PatchValuesOptions
from mmcl.objectives.generative.targets import PatchValues, build_targets
from mmcl.types import AudioSpec, ConfigError, Embeddings, TowerInfo, VideoSpec, ViewBatch

DECODER = {"width": 8, "layers": 1, "heads": 2, "hidden": 12}
STEP, WAVE_STEP = 1 / 255, 2.0**-15


def make(name: str, tower: str, told: bool = True, **options: Any) -> Any:
    targets = {"name": "patches", "pixels": 2, "samples": 2, **options.pop("targets", {})}
    objective = build_objective(name, RAW, tower=tower, decoder=DECODER, targets=targets, **options)
    if told:
        torch.nn.init.normal_(objective.decoder.head.weight, std=0.3)
    return objective


def seen(objective: Any) -> Embeddings:
    batch = batch_for(objective, "mixed", step=1)
    batch.groups.fill_(-1)
    return rows_for(objective, batch)


def by_hand(said: Tensor, view: ViewBatch, row: int, deviation: float | None) -> Tensor:
    """−log p of one row's patches ``(L,)``, cut and measured by loops and torch's normal distribution."""
    data, nats = view.data[row], []
    if data.ndim == 1:
        parts, centre = [data[2 * i : 2 * i + 2].double() for i in range(len(data) // 2)], 0.0
    else:  # frames of one patch of 2 × 2
        parts, centre = [(frame.double() / 255).float().double().flatten() for frame in data], 0.5
    for number, part in enumerate(parts):
        mean, spread = said[number, : len(part)] + centre, said[number, len(part) :]
        start = math.log(0.25 / STEP)
        learned = STEP * (1 + (spread + math.log(math.exp(start) - 1)).exp())
        sigma = learned if deviation is None else torch.full_like(mean, deviation)
        nats.append(-Normal(mean, sigma).log_prob(part).sum())
    return torch.stack(nats)


@pytest.mark.parametrize("deviation", [None, 0.4], ids=["learned", "fixed"])
@pytest.mark.parametrize("tower", ["video", "audio"])
@pytest.mark.parametrize("layout", ["cross", "prefix"])
def test_generation_is_the_normal_log_density_summed_by_hand(layout: str, tower: str, deviation: float | None) -> None:
    targets = {} if deviation is None else {"deviation": deviation}
    objective = make(
        "generative_contrastive", tower, layout=layout, targets=targets, contrast=0.0, hidden=6, out=5, generation=0.7
    )
    embeddings = seen(objective)
    rows, nats, numbers = [], 0.0, 0
    for row in embeddings.present(objective.pair[0].view).nonzero()[:, 0].tolist():
        for need in objective.pair:
            view, tokens = embeddings.batch.views[need.view], embeddings.get(need, "tokens")[row : row + 1]
            values, real = objective.targets(view)
            said = objective.logits(values[row : row + 1], real[row : row + 1], tokens, real[row : row + 1])[0]
            each = by_hand(said, view, row, deviation)
            rows.append(each.mean())
            nats, numbers = nats + float(each.detach().sum()), numbers + view.data[row].numel()
    term = objective(embeddings, Comm())
    torch.testing.assert_close(term.loss, 0.7 * torch.stack(rows).mean())
    bits = nats / numbers / math.log(2) - math.log2(WAVE_STEP if tower == "audio" else STEP)
    assert math.isclose(float(term.metrics["bits_per_dim"]), bits, rel_tol=1e-9)


@pytest.mark.parametrize("tower", ["video", "audio"])
def test_reconstruction_of_a_latent_is_the_same_density(tower: str) -> None:
    objective = make("cmim", tower, latent=3, log_scale=(-30.0, -29.0))
    embeddings = seen(objective)
    view = embeddings.batch.views[objective.need.view]
    mean, _ = objective.posterior(embeddings.get(objective.need))
    values, real = objective.targets(view)
    present = view.present.nonzero()[:, 0].tolist()
    said = {
        row: objective.logits(values[row : row + 1], real[row : row + 1], mean[row : row + 1])[0] for row in present
    }
    rows = torch.stack([by_hand(said[row], view, row, None).sum() for row in present]).detach()
    found = objective(embeddings, Comm()).metrics
    torch.testing.assert_close(found["reconstruction"], rows.mean())
    step = WAVE_STEP if tower == "audio" else STEP
    bits = float(rows.sum()) / len(rows) / view.data[0].numel() / math.log(2) - math.log2(step)
    assert math.isclose(float(found["bits_per_dim"]), bits, rel_tol=1e-9)


def pixels(*options: tuple[str, Any], size: int = 1) -> PatchValues:
    targets = build_targets(
        PatchValuesOptions(**{"pixels": size, **dict(options)}),
        TowerInfo("video", VideoSpec(frames=1, size=size), 8, 4),
        "objectives.0",
    )
    assert isinstance(targets, PatchValues)
    return targets


def bits(targets: PatchValues, view: ViewBatch, said: Tensor) -> float:
    found: Likelihood = likelihood(targets, lambda values, real, said: said, view, view.present, 300, said)
    return float(found.bits_per_dim(Comm()))


def test_the_right_mean_and_a_small_deviation_cost_what_the_formula_says() -> None:
    """log2(σ √(2π) / step) bits of each number; σ = 1 step: 1.325."""
    video = torch.randint(0, 256, (5, 1, 3, 2, 2), dtype=torch.uint8)
    view = ViewBatch(video, torch.tensor([True, True, False, True, True]))
    for steps in (1.0, 3.0):
        targets = pixels(("deviation", steps * STEP), size=2)
        right = targets(view)[0].double() - 0.5
        found = bits(targets, view, right)
        assert found == pytest.approx(math.log2(steps * math.sqrt(2 * math.pi)), abs=1e-5)
        assert bits(targets, view, right + 2 * steps * STEP) == pytest.approx(found + 2 / math.log(2), abs=1e-4)
    learned = pixels(size=2)
    sharp = torch.cat([right, torch.full_like(right, -40)], -1)
    assert bits(learned, view, sharp) == pytest.approx(math.log2(math.sqrt(2 * math.pi)), abs=1e-5), "at its floor"


def test_bits_are_of_a_distribution_over_the_values_of_a_pixel() -> None:
    """The probabilities of all 256 add up to one, at the narrowest too: so many bits do write one down. Of even noise
    the best Gaussian makes 8.25 bits: the 8 of a discrete model and ½ log2(2πe / 12) for its shape.
    """
    every = torch.arange(256, dtype=torch.uint8).view(256, 1, 1, 1, 1).expand(-1, -1, 3, -1, -1)
    view = ViewBatch(every, torch.ones(256, dtype=torch.bool))
    for steps in (1.0, 10.0):
        targets = pixels(("deviation", steps * STEP))
        values = targets(view)[0].double()
        said = torch.full((256, 1, 3), 0.3 * STEP, dtype=torch.float64)
        each = torch.stack([(-targets.nats(said, values.roll(channel, 2))).exp() for channel in range(3)])
        total = (each.pow(1 / 3) * STEP).sum(1)  # all three channels of a row are alike
        torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-5)
    even = pixels(("deviation", float(values.std(correction=0))))
    found = bits(even, view, torch.zeros(256, 1, 3, dtype=torch.float64))
    assert found == pytest.approx(8 + 0.5 * math.log2(2 * math.pi * math.e / 12), abs=1e-3)


def test_a_decoder_that_has_learned_nothing_says_a_quarter_of_the_range() -> None:
    for tower, centre, step in (("video", 0.5, STEP), ("audio", 0.0, WAVE_STEP)):
        objective = make("cmim", tower, told=False)
        embeddings = seen(objective)
        view = embeddings.batch.views[objective.need.view]
        data = view.data[view.present].double() / (255 if tower == "video" else 1)
        expected = -Normal(centre, 0.25).log_prob(data).mean() / math.log(2) - math.log2(step)
        torch.testing.assert_close(objective(embeddings, Comm()).metrics["bits_per_dim"], expected, rtol=1e-6, atol=0)


def test_coarse_patches_are_those_that_codes_quantise() -> None:
    sound = TowerInfo("audio", AudioSpec(sample_rate_hz=64, seconds=1), 8, 4)
    for tower, data, options, dims in (
        (RAW["video"], torch.randint(0, 256, (2, 4, 3, 2, 2), dtype=torch.uint8), {"pixels": 2, "detail": 1}, 3),
        (sound, torch.rand(2, 64) - 0.5, {"samples": 32, "detail": 2}, 4),
    ):
        targets = build_targets(PatchValuesOptions(**options), tower, "objectives.0")
        values, real = targets(ViewBatch(data, torch.tensor([True, False])))
        assert targets.dims == values.shape[2] == dims and targets.step == STEP
        assert real.tolist() == [[True] * values.shape[1], [False] * values.shape[1]]
    assert values.min() >= 0 and values.max() <= 1


@pytest.mark.parametrize("name", ["generative_contrastive", "cmim"])
def test_a_few_steps_make_fewer_bits(name: str) -> None:
    """From what nothing costs to less than eight bits of a pixel, on pictures of one colour each that the tower saw."""
    torch.manual_seed(0)
    objective = make(name, "video", told=False, **({"contrast": 0.0} if name == "cmim" else {"hidden": 6, "out": 5}))
    embeddings = seen(objective)
    for need in objective.needs:
        view = embeddings.batch.views[need.view]
        colours = torch.linspace(20, 235, len(view.data)).byte()
        view.data.copy_(colours.view(-1, 1, 1, 1, 1).expand_as(view.data))
    optimizer = torch.optim.Adam(objective.parameters(), lr=0.01)
    found = []
    for _ in range(25):
        term = objective(embeddings, Comm())
        optimizer.zero_grad()
        term.loss.backward()
        optimizer.step()
        found.append(float(term.metrics["bits_per_dim"]))
    assert found[0] > 7.5 and found[-1] < 6


def test_deviations_that_are_finer_than_the_data_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"objectives\.0\.targets\.floor: 0\.001 is finer than the data.*0\.00392"):
        pixels(("floor", 0.001))
    with pytest.raises(ConfigError, match=r"objectives\.0\.targets\.deviation: 0\.001 is finer"):
        pixels(("deviation", 0.001))
    build_targets(PatchValuesOptions(deviation=0.001), TowerInfo("audio", AudioSpec(), 8, 4), "objectives.0")
    with pytest.raises(ConfigError, match=r"targets\.detail: 40 makes 1600 bands; a block of 640 samples has 321"):
        build_targets(PatchValuesOptions(detail=40), TowerInfo("audio", AudioSpec(), 8, 4), "objectives.0")
