"""The pool that the other tests stand on: real ranks, errors that come back, a hang that ends."""

from __future__ import annotations

import os
import time

import pytest
import torch
import torch.distributed as dist
from support.gloo import GlooPool, RankError

from mmcl.distributed import Comm


def sum_of_ranks(rank: int, world: int, start: int) -> tuple[int, str, int]:
    total = torch.tensor(start + rank)
    if world > 1:
        dist.all_reduce(total)
    return int(total), repr(Comm.current()), os.getpid()


def fails_on_rank_1(rank: int, world: int) -> None:
    dist.barrier()  # a rank that leaves before the other has joined is another error
    if rank == 1:
        raise ValueError("rank 1 is unhappy")
    dist.barrier()


def hangs(rank: int, world: int) -> None:
    time.sleep(60)


def test_worlds_of_one_two_and_three(gloo: GlooPool) -> None:
    for world in (3, 1, 2):
        replies = gloo(world, sum_of_ranks, 10)
        assert [r[0] for r in replies] == [10 * world + world * (world - 1) // 2] * world
        assert [r[1] for r in replies] == [f"Comm(rank={rank}, world_size={world})" for rank in range(world)]
        assert len({r[2] for r in replies} | {os.getpid()}) == world + 1


def test_an_error_comes_back_with_its_traceback_and_the_pool_goes_on(gloo: GlooPool) -> None:
    with pytest.raises(RankError, match=r"(?s)rank 1 of 2:.*fails_on_rank_1.*rank 1 is unhappy"):
        gloo(2, fails_on_rank_1)
    assert gloo(2, sum_of_ranks, 0)[0][0] == 1


def test_a_hang_ends_and_the_pool_starts_again() -> None:
    pool = GlooPool()
    try:
        with pytest.raises(TimeoutError, match=r"\[0, 1\] of 2"):
            pool(2, hangs, timeout_seconds=0.5)
        assert pool(1, sum_of_ranks, 4)[0][0] == 4
    finally:
        pool.close()
