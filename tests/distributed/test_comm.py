"""``Comm``: draw order, gradients that average to the one-process gradient, the identity when alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.gloo import GlooPool
from torch import Tensor

from mmcl.distributed import Comm
from mmcl.distributed.comm import DIRECT_BYTES, SMALL_BYTES, reduce_scatter, reduce_scatter_together


def rows_of(rank: int, world: int, rows: int = 12) -> Tensor:
    return torch.arange(rank, rows, world)


def gathers(rank: int, world: int) -> dict[str, Any]:
    comm, own = Comm.current(), rows_of(rank, world)
    long = torch.ones(len(own), rank + 1, 2) * (own[:, None, None] + 1)
    return {
        "index": comm.index(len(own)),
        "own": own,
        "int": comm.gather(own),
        "bool": comm.gather(own % 3 == 0),
        "padded": comm.gather(long, pad=True),
        "sum": comm.sum(own.sum()),
        "max": comm.max(own.max()),
        "min": comm.min(own.min()),
    }


@pytest.mark.parametrize("world", [1, 2, 3])
def test_rows_come_in_draw_order(gloo: GlooPool, world: int) -> None:
    for reply in gloo(world, gathers):
        assert reply["index"].equal(reply["own"])
        assert reply["int"].equal(torch.arange(12))
        assert reply["bool"].equal(torch.arange(12) % 3 == 0)
        length = torch.arange(12) % world + 1
        expected = (torch.arange(world) < length[:, None]) * (torch.arange(12)[:, None] + 1.0)
        assert reply["padded"].equal(expected[..., None].expand(-1, -1, 2))
        assert (int(reply["sum"]), int(reply["max"]), int(reply["min"])) == (66, 11, 0)


def gradients(rank: int, world: int) -> Tensor:
    """A loss that uses own rows × all rows, a sum and a mean: gradients of own rows of x."""
    comm, own = Comm.current(), rows_of(rank, world)
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(12, 4, dtype=torch.float64, generator=generator)[own].requires_grad_()
    mask = (torch.arange(12) % 5 != 1)[own] & (own % 3 != 2)
    everyone = comm.gather(x)
    centre = comm.sum((x * mask[:, None]).sum(0))
    values = (x @ everyone.T).logsumexp(1) + (x * centre).sum(1)
    loss = comm.mean(values, mask)
    loss.backward()
    assert x.grad is not None
    return torch.cat([comm.gather(x.grad) / world, loss.detach().expand(1, 4)])


def test_average_of_gradients_is_the_one_process_gradient(gloo: GlooPool) -> None:
    expected = gradients(0, 1)
    for world in (2, 3):
        for reply in gloo(world, gradients):
            torch.testing.assert_close(reply, expected, rtol=1e-12, atol=1e-12)


def test_mean_of_nothing_is_zero_with_zero_gradient() -> None:
    x = torch.tensor([1.0, torch.nan], requires_grad=True)
    loss = Comm().mean(x, torch.tensor([False, False]))
    loss.backward()
    assert float(loss.detach()) == 0 and x.grad is not None and x.grad.equal(torch.zeros(2))


def together(rank: int, world: int) -> None:
    """Several in one exchange are what each is alone, whatever their shapes and dtypes, small or not."""
    comm, generator = Comm.current(), torch.Generator().manual_seed(rank)
    numbers = [torch.randint(-9, 2**40, (4, 2), generator=generator), torch.tensor([True, False, rank == 0])]
    numbers.append(torch.zeros(0, 3, dtype=torch.bool))
    floats = [torch.randn(2, 3, generator=generator), torch.randn(5, generator=generator, dtype=torch.float64)]
    large = [torch.full((2, SMALL_BYTES // 2), rank, dtype=torch.uint8), torch.full((1,), rank, dtype=torch.uint8)]
    for several in (numbers, floats, large, numbers[:1]):
        for found, x in zip(comm.gather_together(several), several, strict=True):
            assert found.dtype == x.dtype and found.equal(comm.gather_by_rank(x))
    several = [torch.randn(2 * world, 3, generator=generator), torch.randn(world, generator=generator).double()]
    alone = [reduce_scatter(x.clone(), comm) for x in several]
    for found, expected in zip(reduce_scatter_together(several, comm), alone, strict=True):
        assert found.dtype == expected.dtype
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_several_travel_together(gloo: GlooPool, world: int) -> None:
    gloo(world, together)


def whole_numbers(rank: int, world: int, size: int) -> Tensor:
    random = torch.Generator().manual_seed(rank)
    return torch.randint(-99, 99, (world, size), generator=random, dtype=torch.int32)


def of_size(rank: int, world: int, size: int) -> list[Tensor]:
    """The first columns of what ranks make of their numbers."""
    comm, x = Comm.current(), whole_numbers(rank, world, size)
    made = [comm.gather_by_rank(x), comm.sum(x), comm.max(x), comm.min(x), reduce_scatter(x, comm)]
    return [y[:, :5].clone() for y in made]


@pytest.mark.parametrize("size", [5, DIRECT_BYTES // 4, SMALL_BYTES // 4])
@pytest.mark.parametrize("world", [2, 3])
def test_any_number_of_bytes_travels(gloo: GlooPool, world: int, size: int) -> None:
    """From each rank to each at once, in rings, in place."""
    every = torch.stack([whole_numbers(rank, world, size)[:, :5] for rank in range(world)])
    total = every.sum(0, dtype=torch.int32)
    for rank, found in enumerate(gloo(world, of_size, size)):
        wanted = [every.flatten(0, 1), total, every.amax(0), every.amin(0), total[rank : rank + 1]]
        assert all(a.dtype == torch.int32 and a.equal(b) for a, b in zip(found, wanted, strict=True))


def means(rank: int, world: int) -> list[Tensor]:
    comm, own = Comm.current(), rows_of(rank, world)
    masks = own > 20, own % 4 == 1, own >= 0
    return [comm.mean(own.to(dtype) / 7, mask) for dtype in (torch.float32, torch.float64) for mask in masks]


def test_means_keep_their_dtype_and_digits(gloo: GlooPool) -> None:
    for reply in gloo(3, means):
        for found, value in zip(reply, 2 * [0.0, 5 / 7, 5.5 / 7], strict=True):
            assert float(found) == pytest.approx(value, rel=1e-15 if found.dtype == torch.float64 else 1e-7)
        assert [x.dtype for x in reply] == 3 * [torch.float32] + 3 * [torch.float64]


def host_values(rank: int, world: int) -> tuple[Any, ...]:
    comm = Comm.current()
    comm.barrier()
    return (
        comm.all_agree(True),
        comm.all_agree(rank != world - 1),
        comm.any(rank == world - 1),
        comm.any(False),
        comm.gather_objects({"rank": rank, "text": "é" * rank, "none": None}),
    )


@pytest.mark.parametrize("world", [1, 2, 3])
def test_host_values(gloo: GlooPool, world: int) -> None:
    objects = [{"rank": rank, "text": "é" * rank, "none": None} for rank in range(world)]
    assert gloo(world, host_values) == [(True, False, True, False, objects)] * world


def test_a_rank_lies_in_its_world() -> None:
    with pytest.raises(ValueError, match="rank 2"):
        Comm(2, 2)
