"""The cross-modal objective: its needs, its terms, what it refuses."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from support.contrastive_reference import contrastive_reference, form_reference
from support.exactness import TOWERS, make_batch
from support.objectives import contrast_rows

from mmcl.config import build as build_options
from mmcl.distributed import Comm
from mmcl.model import ModelOptions, MultimodalModel
from mmcl.objectives import OBJECTIVES
from mmcl.objectives.base import ObjectiveMix, Term
from mmcl.objectives.cross_modal import CrossModal, CrossModalOptions, build
from mmcl.types import ConfigError, Embeddings

PAIRS = ("video-audio", "video-text", "audio-text")


def run(objective: CrossModal, kind: str = "mixed") -> tuple[Term, Embeddings]:
    embeddings = contrast_rows(objective, make_batch([need.view for need in objective.needs], 0, kind))
    return objective(embeddings, Comm()), embeddings


def test_every_pair_by_default_each_with_its_temperature() -> None:
    objective = build(CrossModalOptions(), TOWERS)
    assert objective.scales == PAIRS
    assert [(need.tower, need.view.spec, need.view.clip, need.levels, need.kind) for need in objective.needs] == [
        (name, tower.spec, 0, ("joint",), "online") for name, tower in TOWERS.items()
    ]
    assert not list(objective.parameters())


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("unpaired", [True, False])
def test_is_the_mean_over_pairs(masked: bool, unpaired: bool) -> None:
    objective = build(CrossModalOptions(mask_false_negatives=masked, unpaired_negatives=unpaired), TOWERS)
    term, embeddings = run(objective)
    losses = []
    for name, (((a,),), ((b,),)) in objective.pairs.items():
        present_a, present_b = embeddings.present(a.view), embeddings.present(b.view)
        loss = contrastive_reference(
            embeddings.get(a),
            embeddings.get(b),
            embeddings.scales[name],
            present_a,
            present_b,
            embeddings.batch.groups if masked else None,
            unpaired,
        )
        losses.append(loss.detach())
        torch.testing.assert_close(term.metrics[f"loss/{name}"], losses[-1])
        assert int(term.metrics[f"pairs/{name}"]) == int((present_a & present_b).sum()) > 1
    torch.testing.assert_close(term.loss.detach(), torch.stack(losses).mean())
    assert not any(value.requires_grad for value in term.metrics.values()) and not term.pending


def test_groups_and_unpaired_rows_matter() -> None:
    options = [CrossModalOptions(mask_false_negatives=m, unpaired_negatives=u) for m in (0, 1) for u in (0, 1)]
    assert len({float(run(build(o, TOWERS))[0].loss.detach()) for o in options}) == 4


def test_what_is_absent_everywhere_gives_zero_and_zero_gradients() -> None:
    objective = build(CrossModalOptions(pairs=(("video", "audio"),)), TOWERS)
    term, embeddings = run(objective, "no_audio")
    term.loss.backward()
    assert float(term.loss.detach()) == 0 and int(term.metrics["pairs/video-audio"]) == 0
    for value in embeddings.values.values():
        assert value.grad is not None and value.grad.equal(torch.zeros_like(value))


@pytest.mark.parametrize("estimator", ["infonce", "siglip", "dcl", "dclw", "clip_label_smoothing"])
def test_every_estimator_takes_several_captions(estimator: Any) -> None:
    objective = build(CrossModalOptions(estimator=estimator, captions=2, hard_quantile=0.5), TOWERS).double()
    views = [need.view for need in objective.needs]
    assert [(view.modality, view.clip) for view in views] == [("video", 0), ("audio", 0), ("text", 0), ("text", 1)]
    batch = make_batch(views, 0, "mixed")
    random = torch.Generator().manual_seed(1)
    numbers = torch.randint(0, 5, (2, len(batch)), generator=random)
    few = torch.rand(len(batch), generator=random) < 0.5
    for view, number, here in zip(views[2:], numbers, (True, few), strict=True):
        batch.views[view].params["caption_number"] = number.masked_fill(~batch.views[view].present, -1)  # type: ignore[index]
        batch.views[view].present.logical_and_(torch.as_tensor(here))
    term = objective(contrast_rows(objective, batch), Comm())
    embeddings = contrast_rows(objective, batch)
    for name, (((a,),), captions) in objective.pairs.items():
        b = [need for (need,) in captions]
        groups, groups_b = batch.groups, None
        if len(b) > 1:
            first, second = (batch.views[need.view].params["caption_number"] for need in b)
            groups_b = torch.cat([groups, torch.stack([first, second, first, second], 1)], 1)
            groups = torch.cat([groups, torch.stack([first, first, second, second], 1)], 1)
        scale = embeddings.scales[objective.scale_of[name]]
        expected = form_reference(
            embeddings.get(a),
            torch.stack([embeddings.get(need) for need in b], 1),
            scale,
            -10.0,
            form=objective.form,
            present_a=embeddings.present(a.view),
            present_b=torch.stack([embeddings.present(need.view) for need in b], 1),
            groups=groups,
            groups_b=groups_b,
        )
        torch.testing.assert_close(term.metrics[f"loss/{name}"], expected.detach())


def test_temperatures_and_biases() -> None:
    softmax, sigmoid = build(CrossModalOptions(), TOWERS), build(CrossModalOptions(estimator="siglip"), TOWERS)
    assert sigmoid.scales == tuple(f"{pair}-siglip" for pair in PAIRS) and set(sigmoid.biases) == set(sigmoid.scales)
    assert {float(bias.detach()) for bias in sigmoid.biases.values()} == {-10.0}
    assert sigmoid.start_temperatures == dict.fromkeys(sigmoid.scales, 0.1) and not softmax.start_temperatures
    shared = build(CrossModalOptions(shared_temperature=True, start_temperature=0.2), TOWERS)
    assert shared.scales == ("shared",) and shared.start_temperatures == {"shared": 0.2}
    mix = ObjectiveMix({"a": softmax, "b": sigmoid, "c": shared}, dict.fromkeys("abc", 1.0))
    options = {"towers": {"text": {"name": "tiny_text"}, "audio": {"name": "tiny_audio"}}, "temperature": 0.05}
    model = MultimodalModel(build_options(ModelOptions, options))
    model.add_scales(mix.scales, mix.start_temperatures)
    found = {name: round(float(scale.detach().reciprocal()), 6) for name, scale in model.scales().items()}
    assert found == {**dict.fromkeys(PAIRS, 0.05), **dict.fromkeys(sigmoid.scales, 0.1), "shared": 0.2}


def test_options_of_another_estimator_are_refused() -> None:
    for wrong in ({"sigma": 0.3}, {"start_bias": -5}, {"estimator": "dcl", "smoothing": 0.2}):
        with pytest.raises(ConfigError, match="belongs to estimator"):
            build_options(CrossModalOptions, wrong)
    build_options(CrossModalOptions, CrossModalOptions().model_dump())
    with pytest.raises(ConfigError, match=r"objectives\.0\.captions: 3, but no pair"):
        build(CrossModalOptions(captions=3, pairs=(("video", "audio"),)), TOWERS)


def test_yaml_form_of_the_options() -> None:
    options = build_options(CrossModalOptions, {"name": "cross_modal", "pairs": [["text", "video"]]})
    assert OBJECTIVES["cross_modal"].options is CrossModalOptions
    assert OBJECTIVES["cross_modal"].build(options, TOWERS).scales == ("text-video",)


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        (
            [("video", "text"), ("vido", "text")],
            r"objectives\.2\.pairs\.1: unknown name 'vido' \(did you mean 'video'\?\)",
        ),
        ([("video", "vidoe")], r"allowed: audio, text, video"),
        ([("text", "text")], r"objectives\.2\.pairs\.0: a pair needs two towers, got 'text' twice"),
        ([("video", "text"), ("text", "video")], r"objectives\.2\.pairs\.1: .*already"),
        ([("text", "video+sound")], r"objectives\.2\.pairs\.0: unknown name 'sound'; allowed: audio, text, video"),
        ([("text+video", "video+audio")], r"pairs\.0: 'video\+text' and 'video\+audio' both have 'video'"),
        ([("text+video", "video+text")], r"pairs\.0: a pair needs two towers, got 'video' twice"),
        ([("text", "video+video")], r"pairs\.0: 'video\+video': a set has 'video' once"),
        ([("text", "video+")], r"pairs\.0: 'video\+': a set needs two towers, such as video\+audio"),
        (
            [("text", "video+audio"), ("audio + video", "text")],
            r"pairs\.1: the pair 'video\+audio', 'text' is already in the list",
        ),
    ],
)
def test_wrong_pairs_are_refused(pairs: list[tuple[str, str]], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(CrossModalOptions(pairs=tuple(pairs)), TOWERS, path="objectives.2")


def test_towers_that_cannot_meet_are_refused() -> None:
    with pytest.raises(ConfigError, match="needs two towers, the model has video"):
        build(CrossModalOptions(), {"video": TOWERS["video"]})
    narrow = {**TOWERS, "text": dataclasses.replace(TOWERS["text"], joint_width=2)}
    with pytest.raises(ConfigError, match=r"objectives\.0\.pairs\.1: 'video' and 'text'.*6 and 2"):
        build(CrossModalOptions(), narrow)
    for empty in ({"pairs": []}, {"pairs": [["video"]]}, {"pair": None}, {"weight": -1.0}):
        with pytest.raises(ConfigError):
            build_options(CrossModalOptions, empty)
