"""Hybrid generative–contrastive learning: its two halves alone, what a decoder may see, tokens of every modality."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.exactness import RAW, TOWERS, VOCABULARY, pick_rows
from support.objective_cases import rows_for
from support.objectives import batch_for, build_objective
from torch import Tensor

from mmcl import losses
from mmcl.distributed import Comm, contrastive
from mmcl.encoders.build import build_encoder
from mmcl.encoders.causal import CausalAudioOptions, CausalTextOptions, CausalVideoOptions
from mmcl.media.patches import audio_patches, video_patches
from mmcl.objectives.generative.decoders import Bottleneck, Decoder
from mmcl.objectives.generative.options import CodesOptions, DecoderOptions, PaletteOptions
from mmcl.objectives.generative.targets import Codebook, Palette, build_targets
from mmcl.types import Batch, ConfigError, Embeddings, TextSpec, TowerInfo, ViewBatch

DECODER = {"width": 8, "layers": 1, "heads": 2, "hidden": 12}
CODES = {"name": "codes", "count": 5, "detail": 1, "samples": 2}


def make(tower: str = "text", **options: Any) -> Any:
    given = {"tower": tower, "decoder": DECODER, "targets": CODES, "hidden": 6, "out": 5, **options}
    return build_objective("generative_contrastive", RAW, **given)


def told(objective: Any) -> Any:
    """… whose head says something."""
    torch.nn.init.normal_(objective.decoder.head.weight)
    return objective


def seen(objective: Any, kind: str = "mixed") -> Embeddings:
    batch = batch_for(objective, kind, step=1)
    batch.groups.fill_(-1)
    return rows_for(objective, batch)


def layouts(**more: Any) -> Any:
    return pytest.mark.parametrize("layout", ["prefix", "cross"], **more)


@layouts()
def test_without_generation_it_is_info_nce_bit_for_bit(layout: str) -> None:
    objective = told(make(layout=layout, generation=0.0, temperature=0.2))
    embeddings = seen(objective)
    first, second = (objective.projector(embeddings.get(need, "pooled")) for need in objective.pair)
    present = embeddings.present(objective.pair[0].view)
    found = objective(embeddings, Comm())
    expected = contrastive(first, second, scale=1 / 0.2, comm=Comm(), present_a=present, present_b=present)
    assert torch.equal(found.loss, expected)
    a, b = first[present], second[present]
    by_hand = (losses.info_nce(a, b, temperature=0.2) + losses.info_nce(b, a, temperature=0.2)) / 2
    torch.testing.assert_close(found.loss, by_hand)
    assert float(found.metrics["generation"]) > 0


@layouts()
def test_without_contrast_it_is_the_language_model_loss(layout: str) -> None:
    """Bit for bit that of the likelihood alone, and the loop over rows, tokens and views written from the formula."""
    objective = told(make(layout=layout, contrast=0.0, generation=0.7))
    embeddings = seen(objective)
    term = objective(embeddings, Comm())
    assert torch.equal(term.loss.detach(), 0.7 * term.metrics["generation"])
    rows, nats, tokens = [], 0.0, 0
    for i in embeddings.present(objective.pair[0].view).nonzero()[:, 0].tolist():
        for need in objective.pair:
            view = embeddings.batch.views[need.view]
            length = int(view.mask[i].sum())
            ids, given = view.data[i : i + 1, :length], embeddings.get(need, "tokens")[i : i + 1, :length]
            real = torch.ones_like(ids, dtype=torch.bool)
            each = F.cross_entropy(objective.logits(ids, real, given, real)[0], ids[0], reduction="none")
            rows.append(each.mean())
            nats, tokens = nats + float(each.detach().sum()), tokens + length
    assert 0 < tokens < 8 * len(rows), "some rows are shorter than others"
    torch.testing.assert_close(term.loss, 0.7 * torch.stack(rows).mean())
    assert math.isclose(float(term.metrics["bits_per_dim"]), nats / tokens / math.log(2), rel_tol=1e-9)


@layouts()
def test_at_the_start_every_token_is_equally_likely(layout: str) -> None:
    term = make(layout=layout, contrast=0.0)(seen(make(layout=layout)), Comm())
    assert math.isclose(float(term.loss.detach()), math.log(VOCABULARY), rel_tol=1e-12)
    assert math.isclose(float(term.metrics["bits_per_dim"]), math.log2(VOCABULARY), rel_tol=1e-12)
    colours = make("video", targets={"name": "palette", "levels": 4, "pixels": 2}, layout=layout, contrast=0.0)
    term = colours(seen(colours), Comm())
    assert math.isclose(float(term.loss.detach()), math.log(4**3), rel_tol=1e-12)
    assert math.isclose(float(term.metrics["bits_per_dim"]), math.log2(4), rel_tol=1e-12), "a colour is three numbers"


CAUSAL = {
    "video": CausalVideoOptions(width=16, depth=2, size=16, patch=8, frames=2),
    "audio": CausalAudioOptions(width=16, depth=2, sample_rate_hz=1000, seconds=0.06, patch_samples=8, bands=4),
    "text": CausalTextOptions(width=16, depth=2),
}


@pytest.mark.parametrize("modality", CAUSAL)
def test_no_logit_feels_its_own_token_or_a_later_one(modality: str) -> None:
    """Layout prefix, through the tower itself: ∂logits_t/∂x_t' is zero for t' ≥ t, exactly, and is not for t' < t."""
    torch.manual_seed(0)
    tower = build_encoder(CAUSAL[modality]).double()
    decoder = Decoder(7, DecoderOptions(**DECODER), vectors=16).double()
    torch.nn.init.normal_(decoder.head.weight)
    if modality == "text":
        tower.front = torch.nn.Identity()  # embedded bytes, so that there is something to differentiate by
    width = 16 if modality == "text" else tower.front.in_features
    x = torch.randn(1, 6, width, dtype=torch.float64, requires_grad=True)
    mask = torch.ones(1, 6, dtype=torch.bool)
    logits = decoder.logits(tower.run(x, None, mask).tokens, mask)
    for t in range(6):
        (gradient,) = torch.autograd.grad(logits[0, t].square().sum(), x, retain_graph=True)
        felt = gradient[0].abs().sum(1) > 0
        assert felt.tolist() == [other < t for other in range(6)]


def test_a_decoder_of_its_own_sees_earlier_tokens_and_the_latents_alone() -> None:
    torch.manual_seed(0)
    decoder = Decoder(VOCABULARY, DecoderOptions(**DECODER), memory=3).double()
    torch.nn.init.normal_(decoder.head.weight)
    ids, real = torch.randint(0, VOCABULARY, (1, 6)), torch.ones(1, 6, dtype=torch.bool)
    memory = torch.randn(1, 2, 3, dtype=torch.float64)
    before = decoder.logits(ids, real, memory)
    for t in range(6):
        changed = ids.clone()
        changed[0, t] = (ids[0, t] + 1) % VOCABULARY
        same = (decoder.logits(changed, real, memory) == before).all(2)[0]
        assert same.tolist() == [other <= t for other in range(6)]
    assert not (decoder.logits(ids, real, memory + 1) == before).any()


@layouts()
def test_padding_is_skipped(layout: str) -> None:
    """Its tokens, what the tower says of them, and how much of it there is change nothing."""
    objective = told(make(layout=layout, contrast=0.0))
    embeddings = seen(objective)
    views, values = dict(embeddings.batch.views), dict(embeddings.values)
    for need in objective.pair:
        view = views[need.view]
        ids = F.pad(view.data.masked_fill(~view.mask, 3), (0, 2), value=5)
        views[need.view] = ViewBatch(ids, view.present, F.pad(view.mask, (0, 2)))
        key = (need.tower, need.view, "tokens", need.kind)
        values[key] = F.pad(values[key].masked_fill(~view.mask[..., None], 9.0), (0, 0, 0, 2), value=-4.0)
    old = embeddings.batch
    batch = Batch(views, old.keys, old.draws, old.groups, old.labels)
    found = objective(Embeddings(values, batch), Comm())
    expected = objective(embeddings, Comm())
    torch.testing.assert_close(found.loss, expected.loss)
    torch.testing.assert_close(found.metrics["bits_per_dim"], expected.metrics["bits_per_dim"])


def test_bits_are_of_data_without_augmentation() -> None:
    """Those of a third view, which the loss does not feel; without it they bear another name."""
    objective = told(make(augmentation="worn"))
    embeddings = seen(objective)
    term = objective(embeddings, Comm())
    view = objective.plain.view
    assert view.augmentation == "none" and {need.view.augmentation for need in objective.pair} == {"worn"}
    nats = objective.likelihood(embeddings, objective.plain, embeddings.present(view))
    expected = float(nats.nats.detach().sum() / nats.tokens.sum() / math.log(2))
    assert math.isclose(float(term.metrics["bits_per_dim"]), expected, rel_tol=1e-9)
    assert float(term.metrics["bits_per_dim_augmented"]) != pytest.approx(expected)
    leaf = embeddings.get(objective.plain)
    assert torch.autograd.grad(term.loss, leaf, allow_unused=True)[0] is None
    without = make(augmentation="worn", plain=False)
    assert "bits_per_dim" not in without(embeddings, Comm()).metrics and len(without.needs) == 2


def test_the_decoder_reconstructs_the_view_that_its_tower_saw() -> None:
    """Tokens of one view are predicted with that view's tower in sight, not with the other's."""
    objective = told(make(contrast=0.0))
    embeddings = seen(objective, "full")
    first, second = (embeddings.get(need, "tokens") for need in objective.pair)
    found = objective.likelihood(embeddings, objective.pair[0], embeddings.present(objective.pair[0].view)).nats.sum()
    gradients = torch.autograd.grad(found, [first, second], allow_unused=True)
    assert gradients[0].abs().sum() > 0 and gradients[1] is None


def test_chunks_change_nothing() -> None:
    whole, parts = (told(make(decoder={**DECODER, "chunk": chunk})) for chunk in (64, 3))
    parts.load_state_dict(whole.state_dict())
    embeddings = seen(whole)
    leaf = embeddings.get(whole.pair[0], "tokens")
    both = [(x.loss, torch.autograd.grad(x.loss, leaf)[0]) for x in (o(embeddings, Comm()) for o in (whole, parts))]
    torch.testing.assert_close(both[1], both[0], rtol=1e-10, atol=1e-12)


def test_a_bottleneck_has_so_many_vectors_and_skips_padding() -> None:
    bottleneck = Bottleneck(6, 8, 2, 3).double()
    tokens, real = torch.randn(2, 5, 6, dtype=torch.float64), torch.arange(5) < torch.tensor([[5], [2]])
    found = bottleneck(tokens, real)
    assert found.shape == (2, 3, 8)
    torch.testing.assert_close(found, bottleneck(tokens.masked_fill(~real[..., None], 7.0), real))
    assert bottleneck(tokens, torch.zeros_like(real)).isfinite().all()


def test_patches_come_in_order_and_hold_their_part_of_the_input() -> None:
    video = torch.zeros(1, 2, 3, 4, 4, dtype=torch.uint8)
    video[0, 1, 2, 2:, :2] = 255  # second frame, blue, lower left
    patches = video_patches(video, (1, 2, 2))
    assert patches.shape == (1, 8, 12) and patches[0, 6].tolist() == [0.0] * 8 + [1.0] * 4
    assert patches.sum() == 4 and video_patches(video, (2, 4, 4), 1).tolist() == [[[0, 0, 0.125]]]
    time = torch.arange(64)
    tone = torch.sin(2 * torch.pi * 12 * time / 64) * (time >= 32)
    levels = audio_patches(tone[None], 32, 4)
    assert levels.shape == (1, 2, 4) and not levels[0, 0].any(), "silence, then a tone of 6 periods in 32 samples"
    assert levels[0, 1].argmax() == 1 and 0.95 < levels[0, 1].max() <= 1
    assert (audio_patches(0.1 * tone[None], 32, 4) - levels)[0, 1, 1] == pytest.approx(-20 / 80, abs=1e-4)


def test_a_palette_is_rounding_by_hand() -> None:
    palette = Palette((1, 1, 1), levels=4)
    pixels = torch.tensor([[0, 63, 64], [255, 128, 191]], dtype=torch.uint8).view(1, 2, 3, 1, 1)
    ids, real = palette(ViewBatch(pixels, torch.ones(1, dtype=torch.bool)))
    assert ids.tolist() == [[0 + 0 * 4 + 1 * 16, 3 + 2 * 4 + 2 * 16]] and real.all()
    assert (palette.vocabulary, palette.dims) == (64, 3)


def test_codes_follow_by_moving_averages_and_unused_ones_start_again() -> None:
    codebook = Codebook((1, 1, 1), CodesOptions(count=3, detail=1, momentum=0.75)).double()
    codebook.codes.copy_(torch.tensor([[0.0, 0, 0], [1, 1, 1], [9, 9, 9]]))
    colours = torch.tensor([[0, 0, 51], [0, 0, 102], [255, 255, 255], [255, 204, 204]], dtype=torch.uint8)
    view = ViewBatch(colours.view(4, 1, 3, 1, 1), torch.tensor([True, True, True, False]))
    ids, real = codebook(view)
    assert ids[:, 0].tolist() == [0, 0, 1, 1] and real[:, 0].tolist() == [True, True, True, False]
    codebook.commit(codebook.pending([view], view.present, Comm()))
    expected = torch.tensor([[0.0, 0, 0.3], [1, 1, 1], [0, 0, 0.4]])  # the third is the present patch that fitted worst
    torch.testing.assert_close(codebook.codes, expected.double(), rtol=0, atol=1e-7)
    torch.testing.assert_close(codebook.counts, torch.tensor([0.5, 0.25, 0.25]).double())
    only = pick(view, [2])
    codebook.commit(codebook.pending([only], only.present, Comm()))
    torch.testing.assert_close(codebook.counts[1], torch.tensor(0.75 * 0.25 + 0.25).double())
    torch.testing.assert_close(codebook.sums[1], torch.full((3,), 0.4375).double())


def test_codes_learn_the_patches_that_there_are() -> None:
    """The error falls on repeated draws of eight colours, to nothing: none shares its code for long."""
    torch.manual_seed(0)
    codebook = Codebook((1, 1, 1), CodesOptions(count=16, detail=1, momentum=0.5))
    colours = torch.randint(0, 256, (8, 3), dtype=torch.uint8)
    errors = []
    for _ in range(20):
        view = ViewBatch(colours[torch.randint(0, 8, (64,))].view(8, 8, 3, 1, 1), torch.ones(8, dtype=torch.bool))
        features, ids = codebook.features(view), codebook(view)[0]
        errors.append(float((features - codebook.codes[ids]).square().sum(2).mean()))
        codebook.commit(codebook.pending([view], view.present, Comm()))
    assert errors[-1] < 1e-6 < 0.005 < errors[0]


def pick(view: ViewBatch, rows: list[int]) -> ViewBatch:
    return view.map(lambda x: x[torch.tensor(rows)])


def test_each_row_counts_once_whatever_the_others_are() -> None:
    objective = told(make(contrast=0.0))
    embeddings = seen(objective, "full")

    def loss(rows: Tensor) -> Tensor:
        values = {key: x[rows] for key, x in embeddings.values.items()}
        found: Tensor = objective(Embeddings(values, pick_rows(embeddings.batch, rows)), Comm()).loss
        return found

    each = torch.stack([loss(torch.tensor([i])) for i in range(12)])
    torch.testing.assert_close(loss(torch.arange(12)), each.mean())


def test_options_that_cannot_be() -> None:
    with pytest.raises(ConfigError, match=r"objectives\.4\.layout: prefix needs a causal tower .*causal: none here"):
        build_objective("generative_contrastive", TOWERS, tower="text", layout="prefix")
    with pytest.raises(ConfigError, match="contrast and generation are both 0"):
        make(contrast=0, generation=0)
    with pytest.raises(ConfigError, match=r"objectives\.4\.tower.*'txt'"):
        make("txt")
    with pytest.raises(ConfigError, match=r"targets\.pixels: patches of 48 do not divide the tower's 64 pixels"):
        build_objective("generative_contrastive", TOWERS, tower="video", targets={**CODES, "pixels": 48})
    with pytest.raises(ConfigError, match=r"targets\.detail: 4 makes 16 bands; a block of 8 samples has 5"):
        build_targets(CodesOptions(samples=8), TOWERS["audio"], "objectives.0")

    class Wordless:
        def __call__(self, texts: Any) -> Any:
            raise NotImplementedError

    with pytest.raises(ConfigError, match="does not say how large it is"):
        build_targets(PaletteOptions(), TowerInfo("text", TextSpec(Wordless()), 8, 4), "objectives.0")
