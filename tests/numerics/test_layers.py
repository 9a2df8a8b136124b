"""Heads, and the batch norm of all ranks' present rows: torch's own where that is defined, on any number of ranks."""

from __future__ import annotations

import pytest
import torch
from support.gloo import GlooPool
from torch import Tensor, nn

from mmcl.distributed import Comm
from mmcl.layers import MLPHead, RankBatchNorm, absent_rows


def rows(count: int = 12, width: int = 5, offset: float = 3.0) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(5), dtype=torch.float64) + offset


def test_is_torchs_batch_norm_where_that_is_defined() -> None:
    ours, theirs = RankBatchNorm(5).double(), nn.BatchNorm1d(5).double()
    for step in range(3):
        x, y = rows(offset=step).requires_grad_(), rows(offset=step).requires_grad_()
        a, b = ours(x), theirs(y)
        torch.testing.assert_close(a, b)
        (a**3).sum().backward()
        (b**3).sum().backward()
        torch.testing.assert_close(x.grad, y.grad)
        torch.testing.assert_close(ours.weight.grad, theirs.weight.grad)
    torch.testing.assert_close(ours.running_mean, theirs.running_mean)
    torch.testing.assert_close(ours.running_var, theirs.running_var)
    torch.testing.assert_close(ours.eval()(rows()), theirs.eval()(rows()))


@pytest.mark.parametrize("torchs", [nn.BatchNorm2d, nn.BatchNorm3d])
def test_feature_maps_are_normed_by_channel(torchs: type[nn.Module]) -> None:
    ours, theirs = RankBatchNorm(5).double(), torchs(5).double()
    shape = (6, 5, 3, 4) if torchs is nn.BatchNorm2d else (6, 5, 2, 3, 4)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 3
    y = x.clone().requires_grad_()
    x.requires_grad_()
    (ours(x) ** 3).sum().backward()
    (theirs(y) ** 3).sum().backward()
    torch.testing.assert_close(x.grad, y.grad)
    torch.testing.assert_close(ours.running_var, theirs.running_var)
    mask = torch.arange(6) < 4
    full, kept = RankBatchNorm(5).double(), RankBatchNorm(5).double()
    torch.testing.assert_close(full(x, mask)[:4], kept(x[:4]))
    torch.testing.assert_close(full.running_var, kept.running_var)


def test_a_row_for_show_counts_for_nothing() -> None:
    norm = RankBatchNorm(5)
    with absent_rows():
        out = norm(rows(1).float())
    assert out.equal(torch.zeros(1, 5)) and norm.running_mean.equal(torch.zeros(5))
    with absent_rows(False):
        norm(rows().float())
    assert not norm.running_mean.equal(torch.zeros(5)), "and only inside"


def test_absent_rows_equal_deleted_ones_and_become_zero() -> None:
    mask = torch.arange(12) % 3 != 1
    full, kept = RankBatchNorm(5).double(), RankBatchNorm(5).double()
    x = rows().masked_fill(~mask[:, None], torch.nan).requires_grad_()
    y = rows()[mask].requires_grad_()
    a, b = full(x, mask), kept(y)
    torch.testing.assert_close(a[mask], b)
    assert a[~mask].equal(torch.zeros(4, 5).double())
    (a**3).sum().backward()
    (b**3).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad[mask], y.grad)
    assert x.grad[~mask].equal(torch.zeros(4, 5).double())
    torch.testing.assert_close(full.running_var, kept.running_var)


@pytest.mark.parametrize("present", [0, 1])
def test_fewer_than_two_rows_define_nothing(present: int) -> None:
    norm = RankBatchNorm(5)
    nn.init.constant_(norm.bias, 0.5)
    x = rows().float().requires_grad_()
    out = norm(x, torch.arange(12) < present)
    out.sum().backward()
    assert x.grad is not None and x.grad.equal(torch.zeros(12, 5))
    assert out[:present].equal(torch.full((present, 5), 0.5)) and out[present:].equal(torch.zeros(12 - present, 5))
    assert norm.running_mean.equal(torch.zeros(5)) and norm.running_var.equal(torch.ones(5))


def test_a_large_mean_loses_no_digits_and_autocast_changes_nothing() -> None:
    norm = RankBatchNorm(5)
    x = rows(offset=1000.0)
    expected = RankBatchNorm(5).double()(x)
    torch.testing.assert_close(norm(x.float()), expected.float(), rtol=0, atol=1e-3)
    with torch.autocast("cpu", torch.bfloat16):
        assert norm(x.float()).dtype == torch.float32


def norm_on_ranks(rank: int, world: int) -> list[Tensor]:
    comm, norm, replies = Comm.current(), RankBatchNorm(5).double(), []
    number = torch.arange(12)
    for mask in (number >= 0, number % 5 != 2, number % 2 == 0, number % 3 != 2, number < 0, number == 4):
        own = slice(rank, None, world)
        x = rows()[own].requires_grad_()
        out = norm(x, mask[own])
        norm.zero_grad()
        (world * (out**3).sum()).backward()
        assert x.grad is not None and norm.weight.grad is not None
        replies += [comm.gather(out.detach()), comm.gather(x.grad) / world, comm.sum(norm.weight.grad) / world]
    return [*replies, norm.running_mean, norm.running_var]


@pytest.mark.parametrize("world", [2, 3])
def test_statistics_are_those_of_all_ranks(gloo: GlooPool, world: int) -> None:
    expected = norm_on_ranks(0, 1)
    for replies in gloo(world, norm_on_ranks):
        torch.testing.assert_close(replies, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("norm", ["none", "batch", "layer"])
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_heads(norm: str, layers: int) -> None:
    head = MLPHead(5, 7, 3, layers=layers, norm=norm)  # type: ignore[arg-type]
    x, mask = rows().float(), torch.arange(12) < 9
    out = head(x, mask)
    assert out.shape == (12, 3)
    out.sum().backward()
    assert all(p.grad is not None for p in head.parameters())
    expected = x
    for i, linear in enumerate(head.linears):
        expected = linear(expected)
        if i < layers - 1:
            normed = head.norms[i](expected, mask) if norm == "batch" else head.norms[i](expected)
            expected = nn.functional.gelu(normed)
    torch.testing.assert_close(out, expected)
    assert len(head.linears) == layers and sum(isinstance(m, RankBatchNorm) for m in head.modules()) == (
        layers - 1 if norm == "batch" else 0
    )


@pytest.mark.parametrize(("wrong", "message"), [({"layers": 0}, "at least one layer"), ({"norm": "group"}, "'group'")])
def test_wrong_heads_are_refused(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MLPHead(5, 7, 3, **wrong)  # type: ignore[arg-type]
