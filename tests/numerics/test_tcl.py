"""Triple contrastive learning: golden values, each term against its formula, hard negatives, needs, refusals."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from loss_cases import golden
from support.exactness import TOWERS
from support.objectives import FROZEN, batch_for, build_objective, embed
from support.tcl import OFF, SMALL, batch_of, tcl, value
from torch import Tensor

from mmcl import losses
from mmcl.distributed import Comm
from mmcl.encoders.library import OpenClipTokenizer
from mmcl.objectives.base import check_needs
from mmcl.types import ConfigError, Embeddings, Need, TextSpec

A, B, C = golden()


def run(objective: Any, values: dict[tuple[str, str, str], Tensor], scale: float = 2.0, **how: Any) -> Any:
    """The term of these tensors, by (tower, level, kind)."""
    rows = len(next(iter(values.values())))
    batch = batch_of(objective, rows, **how)
    given = {
        (need.tower, need.view, level, need.kind): values[need.tower, level, need.kind]
        for need in objective.needs
        for level in need.levels
    }
    return objective(Embeddings(given, batch, {name: torch.tensor(scale) for name in objective.scales}), Comm())


def joints(video: Tensor, text: Tensor, video_key: Tensor, text_key: Tensor) -> dict[tuple[str, str, str], Tensor]:
    sides = {("video", "online"): video, ("text", "online"): text}
    sides |= {("video", "momentum"): video_key, ("text", "momentum"): text_key}
    return {(tower, "joint", kind): x for (tower, kind), x in sides.items()}


def test_local_information_golden() -> None:
    """Both towers see the same, so the mean of both is the value of one."""
    objective = tcl(lmi={}, text_augmentation="worn")
    text = next(need.view for need in objective.needs if need.tower == "text" and need.kind == "momentum")
    locals_ = torch.stack([B, C], 1)
    values = {(tower, "joint", "online"): A for tower in ("video", "text")}
    values |= {(tower, "joint_tokens", "momentum"): locals_ for tower in ("video", "text")}
    some = torch.tensor([[True, True], [True, True], [True, False], [True, False]])
    given = {
        (need.tower, need.view, level, need.kind): values[need.tower, level, need.kind]
        for need in objective.needs
        for level in need.levels
    }
    expected = {}
    for name, mask in (("all", torch.ones_like(some)), ("some", some)):
        batch = batch_of(objective, 4)
        views = {**batch.views, text: dataclasses.replace(batch.views[text], mask=mask)}
        batch = dataclasses.replace(batch, views=views)
        embeddings = Embeddings(given, batch, {"video-text": torch.tensor(2.0)})
        expected[name] = value(objective(embeddings, Comm()), "lmi")
    assert expected["all"] == pytest.approx(2.30393838, abs=1e-6)
    assert expected["some"] == pytest.approx((2.30393838 + 1.64015056) / 2, abs=1e-6)


def test_local_information_at_equal_logits_is_log_seven() -> None:
    same = torch.ones(4, 2, 3, dtype=torch.float64) / math.sqrt(3)
    values = {(tower, "joint", "online"): same[:, 0] for tower in ("video", "text")}
    values |= {(tower, "joint_tokens", "momentum"): same for tower in ("video", "text")}
    assert value(run(tcl(lmi={}), values), "lmi") == pytest.approx(math.log(7), abs=1e-12)


def test_tokens_of_a_sample_of_the_same_group_are_no_negatives() -> None:
    same = torch.ones(4, 2, 3, dtype=torch.float64) / math.sqrt(3)
    values = {(tower, "joint", "online"): same[:, 0] for tower in ("video", "text")}
    values |= {(tower, "joint_tokens", "momentum"): same for tower in ("video", "text")}
    wanted = (2 * math.log(1 + 2 * 2) + 2 * math.log(1 + 3 * 2)) / 4  # two of the four see four tokens, two see six
    for masking, expected in ((True, wanted), (False, math.log(7))):
        term = run(tcl(lmi={}, mask_false_negatives=masking), values, groups=[5, 1, 5, 2])
        assert value(term, "lmi") == pytest.approx(expected, abs=1e-12)


def test_locals_of_pictures_are_pooled_and_those_of_texts_are_not() -> None:
    random = torch.Generator().manual_seed(1)
    tokens = torch.randn(4, 5, 3, generator=random, dtype=torch.float64)
    values = {(tower, "joint", "online"): A for tower in ("video", "text")}
    values |= {(tower, "joint_tokens", "momentum"): tokens for tower in ("video", "text")}
    pooled = torch.stack([tokens[:, :3].mean(1), tokens[:, 3:].mean(1)], 1)
    parts = [
        float(losses.local_mutual_information(A, x, torch.ones(x.shape[:2], dtype=torch.bool), temperature=0.5))
        for x in (pooled, tokens)
    ]
    assert value(run(tcl(lmi={"pool": 3}), values), "lmi") == pytest.approx(sum(parts) / 2, abs=1e-12)


def test_alignment_without_queue_and_soft_targets_is_clip_against_momentum() -> None:
    term = run(tcl(cma={"alpha": 0}, queue=0), joints(A, B, A, B), scale=1 / 0.07)
    assert value(term, "cma") == pytest.approx(4.75331084, abs=1e-6)
    assert float(term.loss) == pytest.approx(4.75331084 / 3, abs=1e-6)
    term = run(tcl(cma={"alpha": 0}, queue=0), joints(A, B, C, -A), scale=10.0)
    wanted = losses.info_nce(A, -A, temperature=0.1) + losses.info_nce(B, C, temperature=0.1)
    assert value(term, "cma") == pytest.approx(float(wanted) / 2, abs=1e-9)


@pytest.mark.parametrize("masking", [True, False])
def test_contrasts_against_loops(masking: bool) -> None:
    """With a queue, soft targets half way up the ramp, and rows of one group in batch and queue."""
    objective = tcl(cma={"alpha": 0.4}, imc={}, queue=6, ramp_batches=2, mask_false_negatives=masking)
    video, text = (torch.nn.functional.normalize(x) for x in (A + 2 * C, B - A))
    groups = [5, 6, 5, 7]
    width = objective.pairs["video-text"].queue.side(0).rows.shape[1]
    pad = torch.nn.functional.pad
    wide = [pad(x, (0, width - 3)) for x in (A, B, video, text)]
    first = run(objective, joints(wide[1], wide[0], wide[3], wide[2]), groups=groups)
    objective.commit(first.pending)
    second = run(objective, joints(*wide), groups=[5, 1, 2, 3])
    columns = {"video": torch.cat([video, text]), "text": torch.cat([text, video])}  # batch, then queue
    names = [5, 1, 2, 3, *groups]

    def loop(query: Tensor, teacher: Tensor, keys: Tensor, alpha: float) -> float:
        total = 0.0
        for i in range(4):
            seen = [j for j in range(8) if j == i or not masking or names[j] != names[i]]
            logits, soft = 2 * keys[seen] @ query[i], (2 * keys[seen] @ teacher[i]).softmax(0)
            target = (1 - alpha) * torch.tensor([float(j == i) for j in seen]) + alpha * soft
            total -= float((target * logits.log_softmax(0)).sum())
        return total / 4

    cma = (loop(A, video, columns["text"], 0.2) + loop(B, text, columns["video"], 0.2)) / 2
    imc = (loop(A, video, columns["video"], 0) + loop(B, text, columns["text"], 0)) / 2
    assert value(second, "cma") == pytest.approx(cma, abs=1e-6), "the ramp is float32"
    assert value(second, "imc") == pytest.approx(imc, abs=1e-9)


def test_alpha_rises_once_per_batch() -> None:
    objective = tcl(cma={"alpha": 0.5}, queue=0, ramp_batches=4)
    plain, full = (tcl(cma={"alpha": alpha}, queue=0, ramp_batches=0) for alpha in (0, 0.5))
    hard, soft = (value(run(o, joints(A, B, C, -A)), "cma") for o in (plain, full))
    for share in (0, 0.25, 0.5, 0.75, 1, 1):
        for _ in range(2):  # only commit moves it
            term = run(objective, joints(A, B, C, -A))
            assert value(term, "cma") == pytest.approx(hard + share * (soft - hard), abs=1e-7)
        objective.commit(term.pending)


def test_weights_weigh_and_defaults_are_the_authors() -> None:
    weights = {"cma": 0.1, "imc": 2.0, "lmi": 0.3, "itm": 0.4, "mlm": 0.5}
    authors = {"cma": 1 / 3, "imc": 1 / 3, "lmi": 1 / 3, "itm": 1.0, "mlm": 1.0}
    for chosen in (weights, authors):
        own = {name: {"weight": weight} if chosen is weights else {} for name, weight in chosen.items()}
        objective = tcl(**{**own, "mlm": {**own["mlm"], "augmentation": "masked"}})
        embeddings, _ = embed(objective, batch_of(objective, 6))
        term = objective(embeddings, Comm())
        assert float(term.loss.detach()) == pytest.approx(sum(w * value(term, n) for n, w in chosen.items()), rel=1e-6)


def test_padded_tokens_change_nothing() -> None:
    options = {name: {} for name in ("cma", "imc", "lmi", "itm")} | {"mlm": {"augmentation": "masked"}}
    objective = tcl(**options, text_augmentation="worn", ramp_batches=0)
    embeddings, _ = embed(objective, batch_for(objective, "full"))
    changed = dict(embeddings.values)
    count = 0
    for (tower, view, level, kind), x in embeddings.values.items():
        mask = embeddings.batch.views[view].mask
        if tower == "text" and level in ("tokens", "joint_tokens"):
            assert mask is not None
            count += int((~mask).sum())
            changed[tower, view, level, kind] = x.detach().masked_fill(~mask[..., None], 1e4)
    assert count > 20
    results = [objective(dataclasses.replace(embeddings, values=v), Comm()) for v in (embeddings.values, changed)]
    for name, wanted in results[0].metrics.items():
        torch.testing.assert_close(results[1].metrics[name], wanted, rtol=0, atol=1e-12, msg=name)


def test_chunks_change_nothing() -> None:
    results = []
    for chunk in (1, 5, 1000):
        objective = tcl(itm={}, mlm={"augmentation": "masked"}, fusion={**SMALL["fusion"], "chunk": chunk})
        embeddings, leaves = embed(objective, batch_for(objective))
        term = objective(embeddings, Comm())
        torch.autograd.backward(term.loss)
        gradients = [p.grad for p in objective.parameters() if p.requires_grad]
        results.append([term.loss.detach(), *gradients, *(x.grad for x in leaves.values() if x.grad is not None)])
    for other in results[1:]:
        torch.testing.assert_close(other, results[0])


@pytest.mark.parametrize(
    ("on", "online", "momentum"),
    [
        ({"cma": {}}, {"joint"}, {"joint"}),
        ({"lmi": {}}, {"joint"}, {"joint_tokens"}),
        ({"itm": {}}, {"joint", "tokens"}, set()),
        ({"mlm": {"augmentation": "masked"}}, {"tokens"}, {"tokens"}),
        ({"mlm": {"augmentation": "masked", "alpha": 0.0}}, {"tokens"}, set()),
    ],
)
def test_it_asks_for_what_is_on(on: dict[str, Any], online: set[str], momentum: set[str]) -> None:
    objective = tcl(**on)

    def levels(kind: str) -> set[str]:
        return {level for need in objective.needs if need.kind == kind for level in need.levels}

    assert levels("online") == online and levels("momentum") == momentum
    assert bool(objective.scales) == ("mlm" not in on)
    has = {name.split(".")[2] for name, _ in objective.named_parameters()}
    assert has >= {"itm": {"fusion", "matching"}, "mlm": {"fusion", "vocabulary_head"}}.get(next(iter(on)), set())
    assert ("queue" in {name.split(".")[2] for name in objective.state_dict() if "." in name}) == ("cma" in on)


def test_views() -> None:
    objective = tcl(cma={}, mlm={"augmentation": "masked"}, key_clip=0, augmentation="strong", text_augmentation="worn")
    views = {(need.tower, need.kind, need.view.augmentation): need.view for need in objective.needs}
    assert views["video", "online", "strong"].copy == 0 and views["video", "momentum", "strong"].copy == 1
    assert views["text", "online", "worn"] != views["text", "momentum", "worn"]
    assert views["text", "online", "masked"] == views["text", "momentum", "masked"]
    plain: list[Need] = list(tcl(cma={}).needs)
    assert {need.view.clip for need in plain if need.tower == "video"} == {0, 1}
    assert len({need.view for need in plain if need.tower == "text"}) == 1, "one text; dropout alone tells views apart"


def refused(message: str, towers: Any = TOWERS, **options: Any) -> None:
    with pytest.raises(ConfigError, match=message):
        check_needs(build_objective("tcl", towers, **{**SMALL, **options}).needs, towers, "objectives.4")


def with_tokenizer(change: Callable[[], Any]) -> Any:
    return {**TOWERS, "text": dataclasses.replace(TOWERS["text"], spec=TextSpec(change()))}


class Uncounted(OpenClipTokenizer):
    mask_id = 3


def test_refusals() -> None:
    refused(r"objectives\.4: every term is off; give one of cma, imc, lmi, itm, mlm", **OFF)
    refused(r"objectives\.4\.pairs\.1: unknown name 'vdeo'", pairs=(("video", "text"), ("vdeo", "text")))
    refused(r"objectives\.4\.pairs\.0: a pair needs two towers, got 'text' twice", pairs=(("text", "text"),))
    refused(r"pairs\.1: the pair 'text', 'video' is already", pairs=(("video", "text"), ("text", "video")))
    refused(r"objectives\.4\.mlm: no pair has a text tower \(video-audio\)", pairs=(("video", "audio"),))
    only = {**OFF, "mlm": {"augmentation": "masked"}}
    refused(r"pairs\.0: mlm.*video-audio has no", pairs=(("video", "audio"),), **only)
    refused(r"objectives\.4\.mlm: the tokenizer of 'text'.*has no mask token", with_tokenizer(OpenClipTokenizer))
    refused(r"objectives\.4\.mlm: the tokenizer of 'text'.*does not say how large", with_tokenizer(Uncounted))
    refused(r"objectives\.4: a momentum copy of tower 'audio' is needed, but that tower is frozen", FROZEN)
    refused(r"width 8 must be a multiple of heads, 3", fusion={**SMALL["fusion"], "heads": 3})
    wide = {**TOWERS, "audio": dataclasses.replace(TOWERS["audio"], joint_width=7)}
    refused(r"pairs\.0: 'video' and 'audio' lie in spaces of different width, 6 and 7", wide)
