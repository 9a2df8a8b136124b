"""Learned fusion: it starts as the mean, objectives see the fused rows of items that have all members, and it learns
what no mean can say.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.contrastive_reference import form_reference
from support.exactness import TOWERS, learned_fusions, make_batch
from support.objectives import contrast_rows
from torch import Tensor, nn

from mmcl.config import build as build_options
from mmcl.distributed import Comm
from mmcl.encoders.fusion import Fusion, LearnedFusionOptions
from mmcl.objectives.cross_modal import CrossModal, CrossModalOptions, build
from mmcl.types import Embeddings

VIDEO_AUDIO = "video+audio"


def objective_of(*pairs: tuple[str, str], **options: Any) -> CrossModal:
    return build(build_options(CrossModalOptions, {"pairs": pairs, **options}), TOWERS)


@pytest.mark.parametrize("layers", [2, 3])
def test_a_fresh_fusion_is_the_unit_mean_in_float32_whatever_the_precision(layers: int) -> None:
    rows = [F.normalize(torch.randn(5, 16), dim=1) for _ in range(3)]
    fusion = Fusion(3, 16, LearnedFusionOptions(layers=layers, hidden=8))
    torch.testing.assert_close(fusion(rows), F.normalize(torch.stack(rows).mean(0), dim=1))
    fusion = Fusion(3, 6, LearnedFusionOptions(layers=layers, hidden=8))
    nn.init.normal_(fusion.mlp.linears[-1].weight)
    rows = [x[:, :6] for x in rows]
    exact = fusion(rows)
    assert not torch.allclose(exact, F.normalize(torch.stack(rows).mean(0), dim=1), atol=0.01), "it says something else"
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fusion([x.bfloat16().float() for x in rows]), fusion([x.bfloat16() for x in rows]))
        assert torch.equal(fusion(rows), exact) and exact.dtype == torch.float32
    assert fusion.double()([x.double() for x in rows]).dtype == torch.float64


def test_sets_are_named_in_the_order_of_the_model_and_have_their_temperature() -> None:
    objective = objective_of(("text", "video"), ("text", "audio + video"), ("audio+text", "video"))
    assert objective.scales == ("text-video", "text-video+audio", "audio+text-video")
    assert objective.fusions == (VIDEO_AUDIO, "audio+text")
    assert [need.tower for need in objective.needs] == ["video", "text", "audio"], "each view once"
    assert not objective_of(("text", "video")).fusions


@pytest.mark.parametrize("estimator", ["infonce", "siglip", "dcl", "dclw", "clip_label_smoothing"])
@pytest.mark.parametrize("unpaired", [True, False])
def test_a_set_is_the_fused_rows_of_the_items_that_have_all_its_members(estimator: str, unpaired: bool) -> None:
    sets = [("text", VIDEO_AUDIO), ("text+audio", "video")]
    objective = objective_of(*sets, estimator=estimator, captions=2, hard_quantile=0.7, unpaired_negatives=unpaired)
    batch = make_batch([need.view for need in objective.needs], 0, "mixed", rows=30)
    views = [need.view for need in objective.needs if need.tower == "text"]
    numbers = [torch.arange(30).roll(k) // 4 for k in range(2)]  # some of the captions of different samples are alike
    for view, number in zip(views, numbers, strict=True):
        batch.views[view].params["caption_number"] = number.masked_fill(~batch.views[view].present, -1)  # type: ignore[index]
    first, second = (batch.views[view].params["caption_number"] for view in views)
    groups = torch.cat([batch.groups, torch.stack([first, first, second, second], 1)], 1)
    groups_b = torch.cat([batch.groups, torch.stack([first, second, first, second], 1)], 1)
    embeddings = contrast_rows(objective, batch)
    term = objective(embeddings, Comm())
    by_tower: dict[str, list[Any]] = {}
    for need in objective.needs:
        by_tower.setdefault(need.tower, []).append((embeddings.get(need), batch.views[need.view].present))
    (video,), (audio,), texts = by_tower["video"], by_tower["audio"], by_tower["text"]
    both = learned_fusions([VIDEO_AUDIO])[VIDEO_AUDIO].double()
    heard = learned_fusions([*objective.fusions])["audio+text"].double()
    wanted = {
        "text-video+audio": ((both([video[0], audio[0]]), video[1] & audio[1]), texts),
        "audio+text-video": (video, [(heard([audio[0], text]), audio[1] & there) for text, there in texts]),
    }
    for name, (a, b) in wanted.items():
        expected = form_reference(
            a[0],
            torch.stack([rows for rows, _ in b], 1),
            embeddings.scales[objective.scale_of[name]],
            -10.0,
            form=objective.form,
            present_a=a[1],
            present_b=torch.stack([there for _, there in b], 1),
            groups=groups,
            groups_b=groups_b,
            unpaired_negatives=unpaired,
        )
        torch.testing.assert_close(term.metrics[f"loss/{name}"], expected.detach())
        assert expected > 0.01


def test_rows_that_lack_a_member_get_no_gradient() -> None:
    objective = objective_of(("text", VIDEO_AUDIO))
    batch = make_batch([need.view for need in objective.needs], 0, "mixed")
    embeddings = contrast_rows(objective, batch)
    objective(embeddings, Comm()).loss.backward()
    present = {need.tower: batch.views[need.view].present for need in objective.needs}
    whole = present["video"] & present["audio"] & present["text"]
    assert 2 <= whole.sum() < (present["video"] & present["text"]).sum()
    for need in objective.needs:
        moved = embeddings.get(need).grad.abs().sum(1)
        assert not moved[~whole].any() and (moved[whole] > 0).all(), need.tower
    both = present["video"] & present["audio"]
    needs = [next(need for need in objective.needs if need.tower == name) for name in ("video", "audio")]
    assert torch.equal(embeddings.fused(needs).any(1), both), "absent rows hold zeros, as those of towers do"
    fusion = embeddings.fusions[VIDEO_AUDIO]
    assert all(p.grad.abs().sum() > 0 for p in fusion.parameters())


COUNT = 4


def items_told_by_both(*, fused: bool, steps: int = 80) -> float:
    """Of items with each of ``COUNT`` pictures and ``COUNT`` sounds, whose word is (picture + sound) mod ``COUNT``, how
    many find their word first, after training all rows and the fusion; or the same with the mean in its place.
    """
    torch.manual_seed(0)
    objective = objective_of(("text", VIDEO_AUDIO))
    batch = make_batch([need.view for need in objective.needs], 0, "full", rows=COUNT**2)
    video, audio = torch.arange(COUNT**2) // COUNT, torch.arange(COUNT**2) % COUNT
    numbers = {"video": video, "audio": audio, "text": (video + audio) % COUNT}
    batch.groups.copy_(numbers["text"][:, None].expand_as(batch.groups))
    tables = nn.ModuleDict({name: nn.Embedding(COUNT, 16) for name in numbers})
    fusion = Fusion(2, 16, LearnedFusionOptions(hidden=64)).requires_grad_(fused)
    learning = [*tables.parameters(), *(p for p in fusion.parameters() if p.requires_grad)]
    optimizer = torch.optim.Adam(learning, lr=0.02)

    def rows(name: str) -> Tensor:
        return F.normalize(tables[name](numbers[name]), dim=1)

    for _ in range(steps):
        values = {(need.tower, need.view, "joint", "online"): rows(need.tower) for need in objective.needs}
        embeddings = Embeddings(values, batch, {"text-video+audio": torch.tensor(10.0)}, {VIDEO_AUDIO: fusion})
        optimizer.zero_grad()
        objective(embeddings, Comm()).loss.backward()
        optimizer.step()
    with torch.no_grad():
        words = F.normalize(tables["text"].weight, dim=1)
        found = (fusion([rows("video"), rows("audio")]) @ words.T).argmax(1)
    return float((found == numbers["text"]).float().mean())


def test_a_word_that_both_modalities_make_together_is_found_by_learned_fusion_alone() -> None:
    assert items_told_by_both(fused=True) == 1.0
    assert items_told_by_both(fused=False) <= 0.6
