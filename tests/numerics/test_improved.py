"""The stronger CLIP and what is added to it: golden values, simpler losses that it becomes, who teaches whom."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from loss_cases import golden, normed
from support.exactness import TOWERS
from support.objectives import batch_for, build_objective, embed
from torch import Tensor, nn

from mmcl import losses
from mmcl.distributed import Comm
from mmcl.training.momentum import advance
from mmcl.types import ConfigError, Embeddings

A, B, C = golden()
LOCALS = {"video": [C, normed(A + C)], "text": [normed(B + C), B]}
WEAK = {"video": A, "text": B}


class Same(nn.Module):
    """A head that changes nothing."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return x


def make(method: str, **options: Any) -> Any:
    small = {"hidden": 6, "out": 3, "mask_false_negatives": False}
    return build_objective("improved", TOWERS, pair=("video", "text"), method=method, **{**small, **options})


def on_golden_rows(objective: Any) -> Embeddings:
    """Rows of the golden fixture for views whose heads are taken away; momentum copies give the other side's."""
    for heads in (objective.projectors, *(x for x in (getattr(objective, "predictors", None),) if x is not None)):
        for part in (heads, *(getattr(heads, name, ()) for name in ("weak", "strong"))):
            if isinstance(part, nn.ModuleList):
                for number in range(len(part)):
                    part[number] = Same()
    batch = batch_for(objective, "full", rows=4)
    values = {}
    for need in objective.needs:
        for level in need.levels:
            x = WEAK[need.tower] if need.view.copy == 0 else LOCALS[need.tower][need.view.copy - 1]
            values[need.tower, need.view, level, need.kind] = x
    scales = dict(zip(objective.scales, (torch.tensor(1 / 0.07), torch.tensor(10.0)), strict=False))
    return Embeddings(values, batch, scales)


def of_golden_rows(objective: Any) -> tuple[float, dict[str, Tensor]]:
    term = objective(on_golden_rows(objective), Comm())
    return float(term.loss.detach()), dict(term.metrics)


def test_golden_recipe() -> None:
    found, metrics = of_golden_rows(make("rocket"))
    assert found == pytest.approx(4.54508601, abs=2e-7)
    assert float(metrics["loss/global"]) == pytest.approx(4.75331084, abs=2e-7)


def test_without_strong_views_it_is_clip() -> None:
    objective = make("rocket", strong=0)
    assert len(objective.projectors) == 0 and objective.scales == ("video-text",)
    assert of_golden_rows(objective)[0] == pytest.approx(float(losses.clip(A, B, scale=1 / 0.07)), abs=2e-7)


def test_strong_views_count_k_times_whatever_their_pairs() -> None:
    """The mean over K² pairs weighs K, with smoothed targets only where the options say so."""
    found, metrics = of_golden_rows(make("rocket", smoothing=0.0))
    pairs = [float(losses.clip(a, b, scale=10.0)) for a in LOCALS["video"] for b in LOCALS["text"]]
    assert float(metrics["loss/local"]) == pytest.approx(sum(pairs) / 4, abs=1e-9)
    assert found == pytest.approx((float(metrics["loss/global"]) + 2 * sum(pairs) / 4) / 3, abs=1e-9)


def test_golden_prediction_of_the_other_side() -> None:
    _, metrics = of_golden_rows(make("siamlip", strong=0))
    assert float(metrics["loss/extra"]) == pytest.approx(1.56281515, abs=1e-8)
    found, metrics = of_golden_rows(make("siamlip", extra=0.5))
    pairs = [(A, B), *((a, b) for a in LOCALS["video"] for b in LOCALS["text"])]
    wanted = sum(2 - 2 * float((a * b).sum(1).mean()) for a, b in pairs) / 5
    assert float(metrics["loss/extra"]) == pytest.approx(wanted, abs=1e-9)
    assert found == pytest.approx(of_golden_rows(make("rocket"))[0] + 0.5 * wanted, abs=1e-6)


def test_targets_get_no_gradient() -> None:
    """With heads that change nothing each row learns from what it predicts, not from what predicts it: half."""
    objective = make("siamlip", strong=0)
    embeddings = on_golden_rows(objective)
    a, b = A.clone().requires_grad_(), B.clone().requires_grad_()
    loss = objective.extra([[a], [b]], torch.ones(4, dtype=torch.bool), embeddings, Comm())
    whole = (2 - 2 * torch.nn.functional.cosine_similarity(a, b)).mean()
    torch.testing.assert_close(loss, whole)
    for found, both in zip(torch.autograd.grad(loss, (a, b)), torch.autograd.grad(whole, (a, b)), strict=True):
        torch.testing.assert_close(found, both / 2)


def test_momentum_copies_give_the_targets() -> None:
    objective = make("byolip", strong=1, predictor_hidden=4)
    embeddings, _ = embed(objective, batch_for(objective, "full"))
    for key, x in embeddings.values.items():
        embeddings.values[key] = x.detach() + (1.0 if key[3] == "momentum" else 0.0)  # type: ignore[index]
    for (online, copied), side in zip(objective.ema_pairs(), objective.sides, strict=True):
        assert all(torch.equal(p, q) for p, q in zip(online.parameters(), copied.parameters(), strict=True))
        with torch.no_grad():
            for parameter in online.parameters():
                parameter += torch.randn_like(parameter)  # from here on they differ
        assert side.momentum[1].view == side.strong[0].view
    everyone = torch.ones(12, dtype=torch.bool)
    weak, strong = ([embeddings.get(need[i]) for need in (s.views for s in objective.sides)] for i in (0, 1))
    online = [[a, head(b, everyone)] for a, b, head in zip(weak, strong, objective.projectors, strict=True)]
    predicted = objective.predictors(online, everyone)
    targets = []
    for side, head in zip(objective.sides, objective.momentum_projectors, strict=True):
        targets.append([embeddings.get(side.momentum[0]), head(embeddings.get(side.momentum[1]), everyone)])
    cosine = torch.nn.functional.cosine_similarity
    wanted = [
        2 - cosine(predicted[0][i], targets[1][i]) - cosine(predicted[1][i], targets[0][i]) for i in (0, 1)
    ]  # the weak views, then the one pair of strong ones
    found = objective(embeddings, Comm()).metrics["loss/extra"]
    torch.testing.assert_close(found, torch.stack(wanted).mean())
    advance(objective.ema_pairs(), 0.0)
    assert not torch.isclose(objective(embeddings, Comm()).metrics["loss/extra"], found)


def test_golden_correlation() -> None:
    objective = make("barlip", strong=0, layers=1, barlow_out=3)
    objective.wide.weak = nn.ModuleList([Same(), Same()])
    found, metrics = of_golden_rows(objective)
    clip = float(losses.clip(A, B, scale=1 / 0.07))
    assert 0.025 * float(metrics["loss/extra"]) == pytest.approx(0.02977556, abs=1e-7)
    assert found == pytest.approx(clip + 0.02977556, abs=2e-7)


def test_even_assignment_to_all_texts_is_predicted_from_the_other_view() -> None:
    found, metrics = of_golden_rows(make("swalip", swap_temperature=0.1))
    terms = []
    for texts in LOCALS["text"]:
        scores = [view @ texts.T for view in LOCALS["video"]]
        codes = [losses.sinkhorn(x) for x in scores]
        torch.testing.assert_close(codes[0].sum(1), torch.ones(4, dtype=torch.float64))
        for i, j in ((0, 1), (1, 0)):
            terms.append(-(codes[i] * (scores[j] / 0.1).log_softmax(1)).sum(1).mean())
    assert float(metrics["loss/extra"]) == pytest.approx(float(torch.stack(terms).mean()), abs=1e-9)
    plain = of_golden_rows(make("rocket", smoothing=0.0))[0]
    assert found == pytest.approx(plain + 0.2 * float(metrics["loss/extra"]), abs=1e-9)


def test_assignment_to_prototypes_is_predicted_from_the_other_side() -> None:
    objective = make("swalip", prototypes=3, strong=1)
    with torch.no_grad():
        objective.prototypes.copy_(7 * C[:3])  # their length does not matter
    _, metrics = of_golden_rows(objective)
    a, b = (LOCALS[name][0] @ C[:3].T for name in ("video", "text"))
    terms = [-(losses.sinkhorn(x) * (10 * y).log_softmax(1)).sum(1).mean() for x, y in ((a, b), (b, a))]
    assert float(metrics["loss/extra"]) == pytest.approx(float(torch.stack(terms).mean()), abs=1e-9)


def test_views_levels_and_temperatures() -> None:
    objective = make("byolip", strong_augmentation={"video": "hard"}, weak_augmentation={"video": "soft"})
    found = [
        (x.tower, x.view.augmentation, x.view.copy, x.levels[0], x.kind)
        for x in objective.needs
        if (x.tower, x.kind) in (("video", "online"), ("text", "momentum"))
    ]
    assert found == [
        ("video", "soft", 0, "joint", "online"),
        ("video", "hard", 1, "pooled", "online"),
        ("video", "hard", 2, "pooled", "online"),
        ("text", "none", 0, "joint", "momentum"),
        ("text", "none", 1, "pooled", "momentum"),
        ("text", "none", 2, "pooled", "momentum"),
    ]
    assert objective.scales == ("video-text", "video-text-local")
    assert objective.start_temperatures == {"video-text-local": 0.1}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": "rocket", "epsilon": 0.1}, "epsilon belongs to method swalip, this one is rocket"),
        ({"method": "rocket", "extra": 0.1}, "rocket adds nothing"),
        ({"method": "swalip", "strong": 1}, r"objectives\.4\.strong: 1, but swalip compares 2 at least"),
        ({"method": "swalip", "strong": 0, "prototypes": 3}, r"objectives\.4\.strong: 0, but swalip compares 1"),
        ({"method": "rocket", "strong_augmentation": {"audio": "x"}}, "'audio' is not in the pair video, text"),
    ],
)
def test_refuses(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make(**options)
