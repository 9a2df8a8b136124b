"""The contrastive loss on 2 and 3 processes is the one-process loss: value, every row's gradient, and the scale's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.gloo import GlooPool
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mmcl.distributed import Comm, Form, Pair, contrastive, contrastive_pairs, few, view_contrastive

ROWS = 12
WAYS = {"each computes all": few.FEW_ROWS, "the work is shared": 0}
"""how many rows are few"""
CASES = ("full", "uneven", "rank_1_of_2_empty", "rank_2_of_3_empty", "no_b", "groups", "unpaired", "unpaired_groups")


def global_case(case: str) -> tuple[Tensor, Tensor, dict[str, Any]]:
    random = torch.Generator().manual_seed(CASES.index(case))
    a, b = torch.randn(2, ROWS, 5, generator=random, dtype=torch.float64)
    number = torch.arange(ROWS)
    options: dict[str, Any] = {}
    if case != "full":
        options = {"present_a": number % 5 != 1, "present_b": number % 7 != 3}
    if case == "rank_1_of_2_empty":
        options["present_a"] &= number % 2 == 0
    if case == "rank_2_of_3_empty":
        options["present_b"] &= number % 3 != 2
    if case == "no_b":
        options["present_b"] = torch.zeros(ROWS, dtype=torch.bool)
    if "groups" in case:
        options["groups"] = torch.randint(-1, 5, (ROWS, 2), generator=random)
    if "unpaired" in case:
        options["unpaired_negatives"] = True
    return a, b, options


def of_rank(case: str, rank: int, world: int) -> tuple[Tensor, Tensor, dict[str, Any]]:
    a, b, options = global_case(case)
    own = slice(rank, None, world)
    return a[own], b[own], {name: x[own] if isinstance(x, Tensor) else x for name, x in options.items()}


def all_cases(rank: int, world: int, few_rows: int = 0) -> dict[str, list[Tensor]]:
    """Loss, gradients of all rows by averaging over ranks, and of the scale."""
    comm, replies, few.FEW_ROWS = Comm.current(), {}, few_rows
    tile = None if few_rows else 5  # one block, or several
    for case in CASES:
        a, b, options = of_rank(case, rank, world)
        leaves = [a.requires_grad_(), b.requires_grad_(), torch.tensor(9.0, dtype=torch.float64, requires_grad=True)]
        loss = contrastive(leaves[0], leaves[1], scale=leaves[2], comm=comm, tile=tile, **options)
        d_a, d_b, d_scale = torch.autograd.grad(loss, leaves)
        replies[case] = [loss.detach(), comm.gather(d_a) / world, comm.gather(d_b) / world, comm.sum(d_scale) / world]
    return replies


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("way", WAYS)
def test_equals_one_process(gloo: GlooPool, world: int, way: str) -> None:
    expected = all_cases(0, 1)
    assert all(float(values[0]) > 0 for case, values in expected.items() if case != "no_b")
    for replies in gloo(world, all_cases, WAYS[way]):
        for case, values in replies.items():
            torch.testing.assert_close(
                values, expected[case], rtol=1e-11, atol=1e-12, msg=lambda m, c=case: f"{c}: {m}"
            )


FORMS = (
    Form("infonce", hard_quantile=0.3),
    Form("siglip"),
    Form("siglip", hard_quantile=0.3),
    Form("dcl", hard_quantile=0.6),
    Form("dclw"),
    Form("dclw", detach_weight=False),
    Form("clip_label_smoothing", hard_quantile=0.6),
    Form("clip_label_smoothing"),
)
"""what a rank's tile alone cannot say: the hardest share, the weight, the number of candidates"""


def all_forms(rank: int, world: int, few_rows: int = 0) -> dict[str, list[Tensor]]:
    """Loss and gradients of every form: a sample has up to three rows on one side, some none; and of two views."""
    comm, replies, few.FEW_ROWS = Comm.current(), {}, few_rows
    tile = None if few_rows else 5  # one block, or several
    for form in FORMS:
        for case in ("full", "unpaired_groups", "rank_1_of_2_empty", "no_b"):
            random = torch.Generator().manual_seed(5)
            captions = torch.randn(ROWS, 3, 5, generator=random, dtype=torch.float64)[rank::world]
            fewer = (torch.rand(ROWS, 3, generator=random) < 0.6)[rank::world]
            numbers = torch.randint(-1, 6, (ROWS, 2), generator=random)[rank::world]
            a, b, options = of_rank(case, rank, world)
            options["present_b"] = fewer & options.get("present_b", torch.ones(len(b), dtype=torch.bool))[:, None]
            if "groups" in options:
                options["groups_b"] = numbers
            learned = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (9.0, -3.0)]
            leaves = [a.requires_grad_(), captions.requires_grad_(), *learned]
            loss = contrastive(
                a, captions, scale=learned[0], bias=learned[1], comm=comm, tile=tile, form=form, **options
            )
            replies[f"{form} {case}"] = averaged(loss, leaves, comm)
            if form.name not in ("siglip", "clip_label_smoothing"):
                present = options.get("present_a", fewer[:, 0]) & fewer[:, 0]
                loss = view_contrastive(
                    a, b.requires_grad_(), scale=learned[0], comm=comm, tile=tile, form=form,
                    present=present, groups=options.get("groups"),
                )  # fmt: skip
                replies[f"views {form} {case}"] = averaged(loss, [a, b, learned[0]], comm)
    return replies


def averaged(loss: Tensor, leaves: list[Tensor], comm: Comm) -> list[Tensor]:
    """The loss and what averaging over ranks makes of the gradients; those of rows in draw order."""
    found = torch.autograd.grad(loss, leaves, allow_unused=True)
    gradients = [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, found, strict=True)]
    return [loss.detach(), *((comm.gather(g) if g.ndim else comm.sum(g)) / comm.world_size for g in gradients)]


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("way", WAYS)
def test_every_form_equals_one_process(gloo: GlooPool, world: int, way: str) -> None:
    expected = all_forms(0, 1)
    assert all(float(v[1].norm()) > 1e-3 for case, v in expected.items() if "no_b" not in case)
    for replies in gloo(world, all_forms, WAYS[way]):
        for case, values in replies.items():
            torch.testing.assert_close(
                values, expected[case], rtol=1e-10, atol=1e-12, msg=lambda m, c=case: f"{c}: {m}"
            )


class TwoTowers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.log_scale = nn.Linear(5, 4), nn.Linear(5, 4), nn.Parameter(torch.tensor(2.0))

    def forward(self, a: Tensor, b: Tensor, options: dict[str, Any]) -> Tensor:
        return contrastive(self.a(a), self.b(b), scale=self.log_scale.exp(), comm=Comm.current(), **options)


def with_ddp(rank: int, world: int) -> list[Tensor]:
    torch.manual_seed(0)
    model = TwoTowers().double()
    module = DistributedDataParallel(model) if world > 1 else model
    for case in ("uneven", "rank_1_of_2_empty", "no_b"):
        module(*of_rank(case, rank, world)).backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("world", [2, 3])
def test_ddp_averages_to_the_one_process_gradient(gloo: GlooPool, world: int) -> None:
    expected = with_ddp(0, 1)
    assert len(expected) == 5
    for gradients in gloo(world, with_ddp):
        torch.testing.assert_close(gradients, expected, rtol=1e-11, atol=1e-12)


def refused(rank: int, world: int, case: str) -> str:
    rows = 4 + (case == "rows" and rank == 1)
    a = torch.randn(rows, 5)
    groups = torch.zeros(rows, dtype=torch.int64) if case == "groups" and rank == 0 else None
    try:
        contrastive(
            a.double() if case == "dtype" and rank == 0 else a,
            a.clone() if case == "same" and rank == 0 else a,
            scale=1.0,
            comm=Comm.current(),
            present_a=torch.ones(rows, dtype=torch.bool) if case == "mask" and rank == 0 else None,
            groups=groups,
            unpaired_negatives=case == "mode" and rank == 0,
            form=Form(hard_quantile=0.5 if case == "form" and rank == 0 else 1.0),
        )
    except ValueError as error:
        return str(error)
    return "went through"


@pytest.mark.parametrize("case", ["rows", "groups", "mask", "same", "dtype", "mode", "form"])
def test_ranks_that_differ_are_refused_on_all_ranks(gloo: GlooPool, case: str) -> None:
    replies = gloo(2, refused, case, timeout_seconds=20.0)
    assert replies[0] == replies[1] and "all equal on all ranks" in replies[0]
    if case == "rows":
        assert "[4, 5, -1, 4" in replies[0] and "[5, 5, -1, 5" in replies[0]


def one_rank_holds_constants(rank: int, world: int, few_rows: int) -> list[Tensor]:
    few.FEW_ROWS = few_rows
    a, b, options = of_rank("uneven", rank, world)
    leaves = [x.requires_grad_(rank == 0) for x in (a, b)]
    contrastive(*leaves, scale=5.0, comm=Comm.current(), **options).backward()
    return [x.grad for x in leaves if x.grad is not None]


@pytest.mark.parametrize("way", WAYS)
def test_a_rank_whose_inputs_are_constants_comes_to_backward_too(gloo: GlooPool, way: str) -> None:
    mine, other = gloo(2, one_rank_holds_constants, WAYS[way], timeout_seconds=20.0)
    assert len(mine) == 2 and not other


def exchanges(rank: int, world: int, pairs: int, few_rows: int) -> tuple[int, list[float], list[float]]:
    """How often ranks meet in a forward and a backward of several pairs; their losses together and one by one."""
    few.FEW_ROWS = few_rows
    generator = torch.Generator().manual_seed(5)
    sides = [torch.randn(12, 8, generator=generator)[rank::world].requires_grad_() for _ in range(pairs + 1)]
    groups = (torch.arange(12) // 2)[rank::world]
    masks = [torch.rand(12, generator=generator)[rank::world] > 0.3 for _ in sides]
    given = [Pair(sides[k], sides[k + 1], 5.0, masks[k], masks[k + 1], groups if k < 2 else None) for k in range(pairs)]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        found = contrastive_pairs(given, comm=Comm.current())
        torch.stack([loss for loss, _ in found]).sum().backward()
    alone = [
        contrastive(
            x.a, x.b, scale=x.scale, comm=Comm.current(), present_a=x.present_a, present_b=x.present_b, groups=x.groups
        )
        for x in given
    ]
    count = sum(event.name.startswith("gloo:") for event in profile.events() or [])
    return count, [float(loss.detach()) for loss, _ in found], [float(x.detach()) for x in alone]


@pytest.mark.parametrize("way", WAYS)
def test_several_pairs_meet_no_more_often_than_one(gloo: GlooPool, way: str) -> None:
    counts = []
    for pairs in (1, 3):
        for count, together, alone in gloo(2, exchanges, pairs, WAYS[way]):
            assert together == pytest.approx(alone, rel=1e-6) and min(alone) > 0.1
            counts.append(count)
    # facts, and all rows; or facts, masks with groups, columns, sums of columns, loss, and both ways back
    assert counts == [2 if WAYS[way] else 7] * 4


def around_the_limit(rank: int, world: int) -> list[list[Tensor]]:
    """A block that is few by a row, and the same one that is not."""
    comm, found = Comm.current(), []
    for few_rows in (ROWS, ROWS - 1):
        few.FEW_ROWS = few_rows
        random = torch.Generator().manual_seed(3)
        a, b = (torch.randn(ROWS, 6, generator=random)[rank::world].requires_grad_() for _ in "ab")
        scale = torch.tensor(7.0, requires_grad=True)
        found.append(averaged(contrastive(a, b, scale=scale, comm=comm), [a, b, scale], comm))
    return found


def test_both_ways_agree_at_the_limit(gloo: GlooPool) -> None:
    for world in (2, 3):
        for all_of_it, shared in gloo(world, around_the_limit):
            torch.testing.assert_close(all_of_it, shared, rtol=1e-5, atol=1e-7)
