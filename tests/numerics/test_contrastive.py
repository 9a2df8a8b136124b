"""The tiled contrastive loss on one process.

Against the formula in float64; gradcheck; permutation of rows changes nothing; absent rows equal deleted ones, whatever
they hold; float32 inside autocast; robust at scale 100; the N × N logits never exist.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.contrastive_reference import LargestTensor, contrastive_reference, robust_rows
from torch import Tensor

from mmcl.distributed import Comm, contrastive


def inputs(
    rows: int, width: int = 5, seed: int = 0, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(rows, width, generator=random, dtype=dtype) for _ in range(2))
    return a.requires_grad_(), b.requires_grad_(), torch.tensor(7.0, dtype=dtype, requires_grad=True)


def value_and_gradients(loss: Callable[..., Tensor], *leaves: Tensor, **options: Any) -> list[Tensor]:
    value = loss(*leaves, **options)
    return [value.detach(), *torch.autograd.grad(value, leaves)]


def ours(a: Tensor, b: Tensor, scale: Tensor, **options: Any) -> Tensor:
    return contrastive(a, b, scale=scale, comm=Comm(), **options)


@settings(max_examples=60)
@given(
    rows=st.integers(1, 9),
    tile=st.integers(1, 10),
    seed=st.integers(0, 10**6),
    masks=st.booleans(),
    groups=st.sampled_from([None, 1, 2]),
    unpaired=st.booleans(),
)
def test_equals_the_formula(rows: int, tile: int, seed: int, masks: bool, groups: int | None, unpaired: bool) -> None:
    leaves = inputs(rows, seed=seed)
    random = torch.Generator().manual_seed(seed + 1)
    options: dict[str, Any] = {"unpaired_negatives": unpaired}
    if masks:
        options["present_a"], options["present_b"] = torch.rand(2, rows, generator=random) < 0.7
    if groups is not None:
        shape = (rows,) if groups == 1 else (rows, groups)
        options["groups"] = torch.randint(-1, 4, shape, generator=random)
    found = value_and_gradients(ours, *leaves, tile=tile, **options)
    expected = value_and_gradients(contrastive_reference, *leaves, **options)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)


def test_known_value() -> None:
    """The golden fixture: symmetric CLIP at scale 1/0.07 is 4.75331084."""
    i = torch.arange(1.0, 5.0, dtype=torch.float64)
    a = torch.stack([i.sin(), (2 * i).cos(), (3 * i + 0.5).sin()], 1)
    b = torch.stack([i.cos(), (2 * i + 0.3).sin(), (3 * i).cos()], 1)
    assert abs(float(ours(a, b, torch.tensor(1 / 0.07, dtype=torch.float64))) - 4.75331084) < 1e-8


def test_gradcheck() -> None:
    a, b, scale = inputs(6)
    present = torch.tensor([True, True, False, True, True, True])
    groups = torch.tensor([0, 1, 2, 1, -1, -1])
    for unpaired in (False, True):
        assert torch.autograd.gradcheck(
            lambda *x, u=unpaired: ours(*x, present_a=present, groups=groups, tile=4, unpaired_negatives=u),
            (a, b, scale),
        )


def test_permutation_changes_nothing() -> None:
    a, b, scale = inputs(9)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(2))
    present, groups = torch.arange(9) % 4 != 1, torch.arange(9) // 2
    loss, d_a, d_b, d_scale = value_and_gradients(ours, a, b, scale, present_b=present, groups=groups, tile=4)
    turned = value_and_gradients(
        ours, a[order], b[order], scale, present_b=present[order], groups=groups[order], tile=4
    )
    torch.testing.assert_close(turned, [loss, d_a[order], d_b[order], d_scale], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("garbage", [0.0, 1e30, torch.nan, torch.inf])
def test_absent_rows_equal_deleted_ones(garbage: float) -> None:
    a, b, scale = inputs(8)
    present = torch.tensor([1, 0, 1, 1, 0, 1, 1, 0], dtype=torch.bool)
    expected = value_and_gradients(
        ours, a.detach()[present].requires_grad_(), b.detach()[present].requires_grad_(), scale
    )
    a, b = (x.detach().masked_fill(~present[:, None], garbage).requires_grad_() for x in (a, b))
    loss, d_a, d_b, d_scale = value_and_gradients(ours, a, b, scale, present_a=present, present_b=present)
    torch.testing.assert_close([loss, d_a[present], d_b[present], d_scale], expected, rtol=1e-12, atol=1e-13)
    assert d_a[~present].equal(torch.zeros(3, 5, dtype=d_a.dtype)) and d_b[~present].equal(torch.zeros(3, 5).double())


@pytest.mark.parametrize("unpaired", [False, True])
def test_no_pair_gives_zero_with_zero_gradients(unpaired: bool) -> None:
    a, b, scale = inputs(4)
    present = torch.tensor([True, False, True, False])
    for x in value_and_gradients(ours, a, b, scale, present_a=present, present_b=~present, unpaired_negatives=unpaired):
        assert x.equal(torch.zeros_like(x))


def test_one_pair_and_one_group_have_nothing_to_tell_apart() -> None:
    a, b, scale = inputs(5)
    for options in ({"present_a": torch.arange(5) == 2}, {"groups": torch.zeros(5, dtype=torch.int64)}):
        for x in value_and_gradients(ours, a, b, scale, **options):
            torch.testing.assert_close(x, torch.zeros_like(x), rtol=0, atol=1e-14)


def test_float32_inside_autocast() -> None:
    a, b, scale = inputs(64, width=32, dtype=torch.float32)
    with torch.no_grad():
        scale.fill_(100.0)
    expected = value_and_gradients(ours, a, b, scale)

    def in_autocast(*leaves: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return ours(*leaves)

    found = value_and_gradients(in_autocast, a, b, scale)
    assert found[0].dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    with torch.autocast("cpu", torch.bfloat16):  # backward in it too
        torch.testing.assert_close(value_and_gradients(ours, a, b, scale), expected, rtol=0, atol=0)


def test_bfloat16_rows_at_temperature_0_01_stay_finite() -> None:
    a, b, _ = inputs(64, width=32, dtype=torch.bfloat16)
    scale = torch.tensor(100.0, requires_grad=True)
    found = value_and_gradients(ours, a, b, scale)
    assert [x.dtype for x in found] == [torch.float32, torch.bfloat16, torch.bfloat16, torch.float32]
    assert all(x.isfinite().all() for x in found)


@pytest.mark.parametrize("case", ["near -1", "near +1", "spread"])
def test_scale_100_equals_float64(case: str) -> None:
    a, b = robust_rows(case)
    scale = torch.tensor(100.0, dtype=torch.float64)
    expected = value_and_gradients(contrastive_reference, *(x.clone().requires_grad_() for x in (a, b, scale)))
    found = value_and_gradients(ours, *(x.float().requires_grad_() for x in (a, b, scale)), tile=40)
    assert abs(float(found[0]) / float(expected[0]) - 1) < 1e-4
    for x, y in zip(found[1:3], expected[1:3], strict=True):
        assert float((x - y).norm() / y.norm()) < 1e-4
    # by the scale, terms of size 1 cancel; what is left is held against them
    assert abs(float(found[3]) - float(expected[3])) < 1e-4 * max(abs(float(expected[3])), 1e-1)


def test_no_tensor_of_n_by_n_elements() -> None:
    rows, width, tile = 256, 8, 32
    a, b, scale = inputs(rows, width, dtype=torch.float32)
    groups = torch.arange(rows) // 2
    with LargestTensor() as watch:
        value_and_gradients(ours, a, b, scale, groups=groups, tile=tile, unpaired_negatives=True)
    assert watch.largest <= max(rows * width, tile * tile)


def test_inputs_are_left_as_they_were_and_a_float_scale_works() -> None:
    a, b, scale = inputs(6)
    before = a.detach().clone()
    assert float(ours(a, b, scale).detach()) == float(contrastive(a, b, scale=7.0, comm=Comm()).detach())
    assert a.equal(before)


def test_a_constant_side_gets_no_gradient() -> None:
    a, b, scale = inputs(6)
    expected = value_and_gradients(ours, a, b, scale)
    loss, d_b = value_and_gradients(lambda x: ours(a.detach(), x, scale), b)
    torch.testing.assert_close([loss, d_b], [expected[0], expected[2]])
    loss, d_a = value_and_gradients(lambda x: ours(x, b.detach(), 7.0), a)
    torch.testing.assert_close([loss, d_a], expected[:2])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"b": torch.ones(3, 5)}, r"4, 5, -1, 3, 5, -1"),
        ({"b": torch.ones(4, 6)}, r"4, 5, -1, 4, 6, -1"),
        ({"a": torch.ones(4), "b": torch.ones(4)}, r"4, -1, -1, 4, -1, -1"),
        ({"a": torch.ones(4, 5, 1), "b": torch.ones(4, 5, 1)}, r"must be \(B, D\)"),
        ({"present_a": torch.ones(3, dtype=torch.bool)}, r"present_a"),
        ({"groups": torch.ones(3, dtype=torch.int64)}, r"groups"),
    ],
)
def test_wrong_shapes_are_refused(wrong: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        contrastive(**{"a": torch.ones(4, 5), "b": torch.ones(4, 5), **wrong}, scale=1.0, comm=Comm())
