"""Methods on views of one tower: golden values, what they need, what changes them and what does not, refusals."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from loss_cases import close, golden, normed
from support.exactness import TOWERS, make_batch
from support.view_methods import INTRA_MODAL, PERSISTENCY, make
from torch import Tensor, nn

from mmcl import losses
from mmcl.config import build as build_options
from mmcl.distributed import Comm
from mmcl.losses._math import log_sum_of_candidates, masked_logsumexp
from mmcl.objectives import OBJECTIVES
from mmcl.objectives.base import Objective, Term
from mmcl.objectives.intra_modal import IntraModalOptions
from mmcl.objectives.persistency import PersistencyOptions
from mmcl.objectives.views import KeyQueue
from mmcl.types import Batch, ConfigError, Embeddings, Need, View, ViewBatch

A, B, C = golden()
INTRA, RHO = "intra_modal", "persistency"
ALL = [(INTRA, method) for method in INTRA_MODAL] + [(RHO, method) for method in PERSISTENCY]
every = pytest.mark.parametrize(("name", "method"), ALL)


class Unchanged(nn.Module):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return x


def bare(objective: Objective) -> Objective:
    """Without heads, so that golden rows reach the loss."""
    for part in ("projector", "momentum_projector", "predictor"):
        for name in (part, f"other_{part}"):
            if getattr(objective, name, None) is not None:
                setattr(objective, name, Unchanged())
    return objective.double()


def given(objective: Objective, rows: dict[int, Tensor], groups: Tensor | None = None) -> Term:
    """The term where view i of every kind gave ``rows[i]``, all present."""
    views = list(objective.views)  # type: ignore[arg-type]
    count = len(rows[0])
    present = torch.ones(count, dtype=torch.bool)
    none = torch.full((count, 1), -1)
    batch = Batch(
        {view: ViewBatch(torch.zeros(count, 1), present) for view in views},
        tuple(map(str, range(count))),
        torch.arange(count),
        none if groups is None else groups,
        none[:, 0],
    )
    values: dict[Any, Tensor] = {
        (need.tower, need.view, "pooled", need.kind): rows[views.index(need.view)] for need in objective.needs
    }
    return objective(Embeddings(values, batch), Comm())


def embeddings_of(objective: Objective, batch: Batch, dtype: torch.dtype = torch.float64) -> Embeddings:
    random = torch.Generator().manual_seed(8)
    values: dict[Any, Tensor] = {}
    for need in objective.needs:
        x = torch.randn(12, 10, generator=random, dtype=torch.float64)[: len(batch)]
        values[need.tower, need.view, "pooled", need.kind] = (x * batch.views[need.view].present[:, None]).to(dtype)
    return Embeddings(values, batch)


def batch_for(objective: Objective, step: int = 0, kind: str = "mixed") -> Batch:
    return make_batch(objective.views, step, kind)  # type: ignore[arg-type]


def test_golden_values() -> None:
    rows = {0: A, 1: B}
    close(given(bare(make(INTRA, "simclr", {"temperature": 0.5})), rows).loss, 1.73688895)
    close(given(bare(make(INTRA, "dcl", {"temperature": 0.5})), rows).loss, 1.52896028)
    for detach in (True, False):
        dclw = bare(make(INTRA, "dclw", {"temperature": 0.5, "detach_weight": detach}))
        close(given(dclw, rows).loss, 1.60979865)
    wide = bare(make(INTRA, "dclw", {"temperature": 0.5, "sigma": 1e6}))
    close(given(wide, rows).loss, 1.52896028, 1e-6)
    close(given(bare(make(INTRA, "byol")), rows).loss, 1.56281515)
    close(given(bare(make(INTRA, "byol", reduction="sum")), rows).loss, 2 * 1.56281515)
    close(given(bare(make(INTRA, "simsiam")), rows).loss, 1.56281515 / 2 - 1)
    close(given(bare(make(INTRA, "barlow")), rows).loss, float(losses.barlow(A, B)))
    close(given(bare(make(INTRA, "vicreg")), rows).loss, float(losses.vicreg(A, B)))


@pytest.mark.parametrize("name", [INTRA, RHO])
def test_golden_swav(name: str) -> None:
    swav = make(name, "swav", {"prototypes": 3, "out": 3}, reduction="mean")
    swav.get_parameter("prototypes.weight").data = C[:3].clone()
    close(given(bare(swav), {0: A, 1: B}).loss, 3.46863074)


def test_golden_persistency() -> None:
    rows = {0: A, 1: B, 2: C}
    moco = bare(make(RHO, "moco", {"out": 3}, rho=3, reduction="sum"))
    queue = normed(B + C)[:2]
    moco.get_submodule("queue").push(queue)  # type: ignore[operator]
    others = [(A, [B, C]), (B, [A, C]), (C, [A, B])]
    each = [losses.persistency_moco(q, keys, queue, temperature=0.1) for q, keys in others]
    close(each[0], 3.83630733)
    close(given(moco, rows).loss, float(sum(each)))
    byol = bare(make(RHO, "byol", rho=3, reduction="sum"))
    each = [losses.persistency_byol(p, targets, temperature=0.5) for p, targets in others]
    close(each[0], -0.28577821)
    close(given(byol, rows).loss, float(sum(each)))
    simclr = bare(make(RHO, "simclr", rho=3))
    close(
        given(simclr, rows).loss, float(losses.nt_xent(A, B, temperature=0.1) + losses.nt_xent(B, C, temperature=0.1))
    )


def across(method: str, other: str = "audio", rho: int = 2, **more: Any) -> Objective:
    return make(RHO, method, {"out": 3} if method in ("moco", "swav") else {}, rho=rho, other=other, **more)


def test_which_clips_of_two_towers_attract_each_other() -> None:
    """Views 0 … ρ − 1 are the tower's, the rest the other's; clips of one time never meet across towers."""
    both: Any = across("simclr", rho=3).view_set
    assert [both.positives(i) for i in (0, 1, 4)] == [(1, 2, 4, 5), (0, 2, 3, 5), (0, 2, 3, 5)]
    assert both.neighbours() == [(0, 1), (0, 4), (1, 2), (1, 3), (1, 5), (2, 4), (3, 4), (4, 5)]
    only: Any = across("simclr", rho=3, own_clips=False).view_set
    assert [only.positives(i) for i in range(6)] == [(4, 5), (3, 5), (3, 4), (1, 2), (0, 2), (0, 1)]
    words: Any = across("simclr", other="text", rho=3, own_clips=False).view_set
    assert [words.positives(i) for i in range(4)] == [(3,), (3,), (3,), (0, 1, 2)]
    assert words.neighbours() == [(0, 3), (1, 3), (2, 3)]
    assert [(n.tower, n.view.clip) for n in across("byol", rho=2).needs[:4]] == [
        ("video", 0),
        ("video", 1),
        ("audio", 0),
        ("audio", 1),
    ]


def test_golden_persistency_across_towers() -> None:
    """Clips 0 and 1 of the tower are A and C, of the other B and A + B: sums of the pure losses over what attracts."""
    video, audio = [A, C], [B, normed(A + B)]
    rows = dict(enumerate((*video, *audio)))
    pairs = [(A, C), (A, audio[1]), (C, B), (B, audio[1])]
    simclr = given(bare(across("simclr")), rows)
    close(simclr.loss, float(sum(losses.nt_xent(x, y, temperature=0.1) for x, y in pairs)))
    partners = [(A, [C], [audio[1]]), (C, [A], [B]), (B, [audio[1]], [C]), (audio[1], [B], [A])]
    byol = given(bare(across("byol")), rows)
    close(byol.loss, float(sum(losses.persistency_byol(p, [*own, *across_]) for p, own, across_ in partners)))
    alone = given(bare(across("byol", own_clips=False)), rows)
    close(alone.loss, float(sum(losses.persistency_byol(p, across_) for p, _, across_ in partners)))
    moco = bare(across("moco"))
    queues = {"queue": normed(A + C), "other_queue": normed(B + C)[:2]}
    for name, queue in queues.items():
        moco.get_submodule(name).push(queue)  # type: ignore[operator]
    total = 0.0
    for number, (query, own, other) in enumerate(partners):
        first, second = list(queues.values()) if number < 2 else list(queues.values())[::-1]
        mine = losses.moco(query, own[0], first, temperature=0.1)
        total += float(mine + losses.moco(query, other[0], second, temperature=0.1)) / 2
    close(given(moco, rows).loss, total)
    swav = across("swav", reduction="mean", own_clips=False)
    swav.get_parameter("prototypes.weight").data = C.clone()[:4]
    codes = {i: losses.sinkhorn(row @ C.T) for i, row in rows.items()}
    logs = {i: (row @ C.T / 0.1).log_softmax(1) for i, row in rows.items()}
    crossed = [-(codes[i] * logs[j]).sum(1).mean() for i, j in ((0, 3), (1, 2), (2, 1), (3, 0))]
    close(given(bare(swav), rows).loss, float(sum(crossed) / 4))


def test_equal_keys_make_moco_independent_of_rho() -> None:
    figures = []
    for rho in (2, 3, 4):
        moco = bare(make(RHO, "moco", {"out": 3}, rho=rho, reduction="mean"))
        moco.get_submodule("queue").push(C)  # type: ignore[operator]
        figures.append(float(given(moco, dict.fromkeys(range(rho), A)).loss))
    assert figures == pytest.approx([figures[0]] * 3)


@pytest.mark.parametrize("method", PERSISTENCY)
@pytest.mark.parametrize("rho", [1, 2, 3, 4])
def test_sum_and_mean_over_clips(method: str, rho: int) -> None:
    torch.manual_seed(0)
    each = {}
    for reduction in ("sum", "mean"):
        torch.manual_seed(0)
        objective = make(RHO, method, rho=rho, reduction=reduction).double()
        if method == "moco":
            torch.manual_seed(1)
            objective.get_submodule("queue").push(torch.randn(9, 5))  # type: ignore[operator]
        each[reduction] = float(objective(embeddings_of(objective, batch_for(objective)), Comm()).loss.detach())
    clips = max(rho, 2)
    assert each["sum"] == pytest.approx((clips - 1 if method == "simclr" else clips) * each["mean"])


def test_constant_rows() -> None:
    """log(2N − 1) for NT-Xent, log(2N − 2) for DCL, log K for SwAV."""
    same = {0: torch.ones(4, 3).double(), 1: torch.ones(4, 3).double()}
    close(given(bare(make(INTRA, "simclr")), same).loss, math.log(7), 1e-9)
    close(given(bare(make(INTRA, "dcl")), same).loss, math.log(6), 1e-9)
    swav = bare(make(INTRA, "swav", {"prototypes": 5, "out": 3}))
    swav.get_parameter("prototypes.weight").data = torch.ones(5, 3).double()
    close(given(swav, same).loss, math.log(5), 1e-9)


def test_groups_are_not_each_others_negatives() -> None:
    groups = torch.tensor([[0, -1], [0, -1], [5, 7], [6, 7]])
    for method in ("simclr", "dcl"):
        term = given(bare(make(INTRA, method, {"temperature": 0.5})), {0: A, 1: B}, groups)
        kept = [[0, 2, 3], [1, 2, 3], [0, 1, 2], [0, 1, 3]]  # row i's own group mates are left out
        total = 0.0
        for i, rows in enumerate(kept):
            for x, y in ((A, B), (B, A)):
                names = [("x", j) for j in rows if j != i] + [("y", j) for j in rows if j != i]
                names += [("y", i)] if method == "simclr" else []
                pool = torch.stack([(x if which == "x" else y)[j] for which, j in names])
                total += float((x[i] @ pool.T / 0.5).logsumexp(0) - x[i] @ y[i] / 0.5) / 8
        close(term.loss, total, 1e-9)
        free = bare(make(INTRA, method, {"temperature": 0.5, "mask_false_negatives": False}))
        assert abs(float(given(free, {0: A, 1: B}, groups).loss) - total) > 1e-3


def test_tiles_change_nothing() -> None:
    a, b = (torch.randn(7, 3, generator=torch.Generator().manual_seed(s), dtype=torch.float64) for s in (1, 2))
    masked = torch.rand(7, 7, generator=torch.Generator().manual_seed(3)) < 0.3
    masked[2] = True
    results = []
    for tile in (2, 100):
        x, y = a.clone().requires_grad_(), b.clone().requires_grad_()
        out = log_sum_of_candidates(x, y, lambda rows: masked[rows], temperature=0.5, tile=tile)
        out.masked_fill(masked.all(1), 0).square().sum().backward()
        results.append((out.detach(), x.grad, y.grad))
    torch.testing.assert_close(*results)
    torch.testing.assert_close(results[0][0], masked_logsumexp(a @ b.T / 0.5, masked))


def test_a_queue_holds_the_newest_keys() -> None:
    queue = KeyQueue(4, 1)
    numbers = torch.arange(20.0)[:, None]
    taken = 0
    for count in (1, 0, 2, 3, 9, 4):
        queue.push(numbers[taken : taken + count])
        taken += count
        held = sorted(queue.rows[queue.mask()].flatten().tolist())
        assert held == list(map(float, range(max(0, taken - 4), taken)))


def test_prototypes_wait_and_keep_length_one() -> None:
    swav = make(INTRA, "swav", {"frozen_batches": 2})
    norms = []
    for step in range(4):
        term = swav(embeddings_of(swav, batch_for(swav, step), torch.float32), Comm())
        swav.zero_grad()
        term.loss.backward()
        weight = swav.get_parameter("prototypes.weight")
        norms.append(float(weight.grad.norm()))
        weight.data.mul_(1.7)
        swav.commit(term.pending)
        torch.testing.assert_close(weight.norm(dim=1), torch.ones(len(weight)))
    assert norms[:2] == [0, 0] and min(norms[2:]) > 0


def test_views_that_are_asked_for() -> None:
    video = TOWERS["video"]

    def seen(objective: Objective) -> list[tuple[int, str, int, str]]:
        return [(n.view.clip, n.view.augmentation, n.view.copy, n.kind) for n in objective.needs]

    assert seen(make(INTRA, "simclr", augmentation="strong")) == [
        (0, "strong", 0, "online"),
        (0, "strong", 1, "online"),
    ]
    assert seen(make(INTRA, "moco", windows="different")) == [(0, "none", 0, "online"), (1, "none", 0, "momentum")]
    assert len(seen(make(INTRA, "moco", {"symmetric": True}, views=3))) == 6
    assert seen(make(RHO, "simclr", rho=1)) == [(0, "none", 0, "online"), (0, "none", 1, "online")]
    assert seen(make(RHO, "simclr", rho=3)) == [(i, "none", 0, "online") for i in range(3)]
    small = dataclasses.replace(video.spec, size=32)
    crops = make(INTRA, "swav", {"crops": 2, "crop_augmentation": "crop", "crop_size": 32}).needs[2:]
    assert crops == tuple(Need("video", View(small, augmentation="crop", copy=i), ("pooled",)) for i in (2, 3))
    assert all(need.levels == ("pooled",) for need in make(RHO, "byol").needs)


@pytest.mark.parametrize(
    ("name", "more", "how", "message"),
    [
        (INTRA, {"tower": "vidoe"}, {}, r"objectives\.2\.tower: unknown name 'vidoe' \(did you mean 'video'\?\)"),
        (RHO, {"tower": "vidoe"}, {}, r"objectives\.2\.tower: unknown name 'vidoe'"),
        (INTRA, {"tower": "audio"}, {}, r"objectives\.2\.tower: tower 'audio' is frozen"),
        (RHO, {"tower": "text"}, {}, r"objectives\.2\.tower: 'text' is a text tower"),
        (RHO, {"other": "speech"}, {}, r"objectives\.2\.other: unknown name 'speech'"),
        (RHO, {"other": "audio"}, {}, r"objectives\.2\.other: tower 'audio' is frozen"),
        (RHO, {"other": "video"}, {}, r"objectives\.2\.other: 'video' is the tower itself"),
        (RHO, {"other": "sound", "rho": 1}, {}, r"objectives\.2\.rho: 1, but audio of another time needs"),
        (INTRA, {"tower": "text", "windows": "different"}, {}, r"objectives\.2\.windows: 'different' needs"),
        (INTRA, {"tower": "text"}, {"crop_size": 32}, r"objectives\.2\.method\.crop_size: 32, but 'text' is no video"),
    ],
)
def test_what_no_tower_gives_is_refused(name: str, more: dict[str, str], how: dict[str, int], message: str) -> None:
    towers = {**TOWERS, "audio": dataclasses.replace(TOWERS["audio"], trainable=False)}
    towers["sound"] = dataclasses.replace(TOWERS["audio"], name="sound")
    entry = OBJECTIVES[name]
    options = build_options(entry.options, {"name": name, "method": {"name": "swav", **how}, "tower": "video", **more})
    with pytest.raises(ConfigError, match=message):
        entry.build(options, towers, path="objectives.2")


@pytest.mark.parametrize(
    ("options", "change", "part"),
    [
        (IntraModalOptions, {"views": 1}, "views"),
        (IntraModalOptions, {"method": {"name": "mocco"}}, "did you mean 'moco'"),
        (IntraModalOptions, {"method": {"name": "byol", "queue": 3}}, "method.queue: unknown key"),
        (IntraModalOptions, {"method": {"name": "moco", "queue": 0}}, "method.queue"),
        (PersistencyOptions, {"rho": 5}, "rho"),
        (PersistencyOptions, {"method": {"name": "vicreg"}}, "allowed: simclr, moco, byol, swav"),
    ],
)
def test_wrong_options_are_named(options: type, change: dict[str, Any], part: str) -> None:
    with pytest.raises(ConfigError, match=part):
        build_options(options, {"tower": "video", "method": {"name": "moco"}, **change})
