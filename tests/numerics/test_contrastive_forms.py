"""Every form of the tiled contrastive loss, and the one of two views, on one process.

Against the formula in float64 and against the pure losses; gradcheck; absent rows equal deleted ones; permutation of
rows changes nothing; robust at scale 100; float32 inside autocast; the N × N logits never exist.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.contrastive_reference import LargestTensor, form_reference, robust_rows
from torch import Tensor

from mmcl import losses
from mmcl.distributed import Comm, Form, contrastive, view_contrastive

FORMS = [
    Form("infonce"),
    Form("siglip"),
    Form("dcl"),
    Form("dclw"),
    Form("dclw", detach_weight=False),
    Form("clip_label_smoothing"),
]
VIEW_FORMS = FORMS[:1] + FORMS[2:5]


def leaves_of(rows: int, captions: int = 0, width: int = 5, seed: int = 0) -> list[Tensor]:
    random = torch.Generator().manual_seed(seed)
    a = torch.randn(rows, width, generator=random, dtype=torch.float64)
    b = torch.randn(rows, *([captions] if captions else []), width, generator=random, dtype=torch.float64)
    scale, bias = torch.tensor(6.0, dtype=torch.float64), torch.tensor(-2.0, dtype=torch.float64)
    return [x.requires_grad_() for x in (a, b, scale, bias)]


def ours(a: Tensor, b: Tensor, scale: Tensor, bias: Tensor, **options: Any) -> Tensor:
    return contrastive(a, b, scale=scale, bias=bias, comm=Comm(), **options)


def ours_of_views(a: Tensor, b: Tensor, scale: Tensor, **options: Any) -> Tensor:
    return view_contrastive(a, b, scale=scale, comm=Comm(), **options)


def found_and_gradients(loss: Callable[..., Tensor], leaves: list[Tensor], **options: Any) -> list[Tensor]:
    value = loss(*leaves, **options)
    gradients = torch.autograd.grad(value, leaves, allow_unused=True)
    return [value.detach(), *(torch.zeros_like(x) if g is None else g for x, g in zip(leaves, gradients, strict=True))]


@settings(max_examples=80)
@given(
    form=st.sampled_from(FORMS),
    rows=st.integers(1, 8),
    captions=st.integers(0, 3),
    tile=st.integers(1, 9),
    seed=st.integers(0, 10**6),
    masks=st.booleans(),
    groups=st.sampled_from([0, 1, 2, 3]),
    unpaired=st.booleans(),
    hard=st.sampled_from([1.0, 1.0, 0.5, 0.2, 0.01]),
)
def test_equals_the_formula(
    form: Form,
    rows: int,
    captions: int,
    tile: int,
    seed: int,
    masks: bool,
    groups: int,
    unpaired: bool,
    hard: float,
) -> None:
    leaves = leaves_of(rows, captions, seed=seed)
    random = torch.Generator().manual_seed(seed + 1)
    options: dict[str, Any] = {"unpaired_negatives": unpaired, "form": with_share(form, hard)}
    if masks:
        options["present_a"] = torch.rand(rows, generator=random) < 0.7
        options["present_b"] = torch.rand(leaves[1].shape[:-1], generator=random) < 0.7
    if groups:
        options["groups"] = torch.randint(-1, 4, (rows, groups), generator=random)
    if groups == 3:
        options["groups_b"] = torch.randint(-1, 4, (rows, groups), generator=random)
    found = found_and_gradients(ours, leaves, tile=tile, **options)
    expected = found_and_gradients(form_reference, leaves, **options)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-11)


def with_share(form: Form, share: float) -> Form:
    return Form(form.name, detach_weight=form.detach_weight, hard_quantile=share)


@settings(max_examples=40)
@given(
    form=st.sampled_from(VIEW_FORMS),
    rows=st.integers(1, 8),
    tile=st.integers(1, 17),
    seed=st.integers(0, 10**6),
    masks=st.booleans(),
    groups=st.sampled_from([0, 1, 2]),
    hard=st.sampled_from([1.0, 1.0, 0.5, 0.2]),
)
def test_views_equal_the_formula(
    form: Form, rows: int, tile: int, seed: int, masks: bool, groups: int, hard: float
) -> None:
    leaves = leaves_of(rows, seed=seed)[:3]
    random = torch.Generator().manual_seed(seed + 1)
    present = torch.rand(rows, generator=random) < (0.7 if masks else 2)
    numbers = torch.randint(-1, 4, (rows, groups), generator=random) if groups else None
    shared: dict[str, Any] = {"form": with_share(form, hard), "groups": numbers}
    found = found_and_gradients(ours_of_views, leaves, tile=tile, present=present, **shared)
    expected = found_and_gradients(form_reference, leaves, present_a=present, present_b=present, views=True, **shared)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-11)


def test_equals_the_pure_losses() -> None:
    a, b, scale, bias = leaves_of(9)
    pairs = {
        "infonce": losses.clip(a, b, scale=scale),
        "siglip": losses.siglip(a, b, scale=scale, bias=bias),
    }
    views = {
        "infonce": losses.nt_xent(a, b, temperature=1 / scale),
        "dcl": losses.dcl(a, b, temperature=1 / scale),
        "dclw": losses.dcl(a, b, temperature=1 / scale, sigma=0.5),
    }
    for name, expected in pairs.items():
        torch.testing.assert_close(ours(a, b, scale, bias, form=Form(name), tile=4), expected)  # type: ignore[arg-type]
    for name, expected in views.items():
        torch.testing.assert_close(ours_of_views(a, b, scale, form=Form(name), tile=4), expected)  # type: ignore[arg-type]


def test_known_values() -> None:
    """The golden fixture."""
    i = torch.arange(1.0, 5.0, dtype=torch.float64)
    a = torch.stack([i.sin(), (2 * i).cos(), (3 * i + 0.5).sin()], 1)
    b = torch.stack([i.cos(), (2 * i + 0.3).sin(), (3 * i).cos()], 1)
    bias = torch.tensor(-10.0, dtype=torch.float64)
    found = [
        float(ours(a, b, 10.0, bias, form=Form("siglip"))),  # type: ignore[arg-type]
        float(ours(a, b, 0.0, bias, form=Form("siglip"))),  # type: ignore[arg-type]
        float(ours_of_views(a, b, 2.0)),  # type: ignore[arg-type]
        float(ours_of_views(a, b, 2.0, form=Form("dcl"))),  # type: ignore[arg-type]
        float(ours_of_views(a, b, 2.0, form=Form("dclw"))),  # type: ignore[arg-type]
    ]
    assert found == pytest.approx([7.85065268, 10.00018160, 1.73688895, 1.52896028, 1.60979865], abs=1e-8)


def test_several_captions_are_the_mean_over_one_at_a_time() -> None:
    """From the clip's side, where no caption of its own is a negative."""
    a, b, scale, _ = leaves_of(6, captions=3)
    together = ours(a, b, scale, torch.tensor(0.0))
    rows, columns = torch.nn.functional.normalize(a, dim=1), torch.nn.functional.normalize(b, dim=2)
    logits = scale * torch.einsum("id,jkd->ijk", rows, columns)
    values = []
    for i in range(6):
        others = [j for j in range(6) if j != i]
        for k in range(3):
            of_clip = torch.cat([logits[i, i, k][None], logits[i, others].flatten()])
            of_text = torch.cat([logits[i, i, k][None], logits[others, i, k]])
            values += [-of_clip.log_softmax(0)[0], -of_text.log_softmax(0)[0]]
    torch.testing.assert_close(together, torch.stack(values).mean())


@pytest.mark.parametrize("form", FORMS[:4] + FORMS[5:], ids=lambda f: f.name)
def test_gradcheck(form: Form) -> None:
    if form.name == "dclw":  # a detached weight is no derivative
        form = FORMS[4]
    leaves = leaves_of(5, captions=2)
    present = torch.tensor([[1, 1], [1, 0], [0, 0], [1, 1], [0, 1]], dtype=torch.bool)
    groups = torch.tensor([0, 1, 2, 1, -1])
    for share in (1.0, 0.5):
        kind = with_share(form, share)
        assert torch.autograd.gradcheck(
            lambda *x, f=kind: ours(*x, present_b=present, groups=groups, tile=3, form=f), leaves, fast_mode=True
        )
    if form.name in ("infonce", "dcl", "dclw"):
        a, b, scale, _ = leaves_of(5)
        assert torch.autograd.gradcheck(
            lambda *x: ours_of_views(*x, present=present[:, 0], groups=groups, tile=3, form=form),
            (a, b, scale),
            fast_mode=True,
        )


@pytest.mark.parametrize("form", FORMS, ids=lambda f: f.name)
@pytest.mark.parametrize("garbage", [1e30, torch.nan])
def test_absent_rows_equal_deleted_ones(form: Form, garbage: float) -> None:
    here = torch.tensor([1, 0, 1, 1, 0, 1, 1], dtype=torch.bool)
    a, b, scale, bias = leaves_of(7, captions=2)
    texts = here[:, None] & torch.tensor([[1, 1], [1, 1], [0, 1], [1, 1], [1, 1], [1, 1], [1, 0]], dtype=torch.bool)
    kept = [x.detach()[here].requires_grad_() for x in (a, b)]
    expected = found_and_gradients(ours, [*kept, scale, bias], form=form, present_b=texts[here])
    spoilt = [x.detach().masked_fill(~m[..., None], garbage).requires_grad_() for x, m in ((a, here), (b, texts))]
    loss, d_a, d_b, *rest = found_and_gradients(
        ours, [*spoilt, scale, bias], form=form, present_a=here, present_b=texts
    )
    torch.testing.assert_close([loss, d_a[here], d_b[here], *rest], expected, rtol=1e-11, atol=1e-12)
    assert not d_a[~here].any() and not d_b[~here].any()


@pytest.mark.parametrize("form", FORMS, ids=lambda f: f.name)
def test_order_of_rows_and_of_captions_changes_nothing(form: Form) -> None:
    a, b, scale, bias = leaves_of(8, captions=2)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(2))
    groups = torch.arange(8) // 2
    options: dict[str, Any] = {"form": with_share(form, 0.7), "tile": 5}
    loss, d_a, d_b, *rest = found_and_gradients(ours, [a, b, scale, bias], groups=groups, **options)
    turned = [a.detach()[order].requires_grad_(), b.detach()[order].flip(1).requires_grad_(), scale, bias]
    found = found_and_gradients(ours, turned, groups=groups[order], **options)
    torch.testing.assert_close(found, [loss, d_a[order], d_b[order].flip(1), *rest], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("form", FORMS, ids=lambda f: f.name)
def test_nothing_present_and_a_batch_of_one(form: Form) -> None:
    leaves = leaves_of(4)
    nothing = torch.zeros(4, dtype=torch.bool)
    for unpaired in (False, True):
        for x in found_and_gradients(ours, leaves, form=form, present_a=nothing, unpaired_negatives=unpaired):
            assert x.equal(torch.zeros_like(x))
    alone = found_and_gradients(ours, leaves_of(1), form=form)
    assert all(x.isfinite().all() for x in alone)
    assert form.name == "siglip" or not any(x.abs().max() > 1e-14 for x in alone)
    if form in VIEW_FORMS:
        for x in found_and_gradients(ours_of_views, leaves[:3], form=form, present=nothing):
            assert x.equal(torch.zeros_like(x))
        assert not any(x.abs().max() > 1e-14 for x in found_and_gradients(ours_of_views, leaves_of(1)[:3], form=form))


@pytest.mark.parametrize("form", FORMS, ids=lambda f: f.name)
@pytest.mark.parametrize("case", ["near -1", "near +1", "spread"])
def test_scale_100_equals_float64(case: str, form: Form) -> None:
    rows = [*robust_rows(case), torch.tensor(100.0, dtype=torch.float64), torch.tensor(-10.0, dtype=torch.float64)]
    checks: list[tuple[Any, int, dict[str, Any]]] = [(ours, 4, {})]
    if form in VIEW_FORMS:
        checks.append((ours_of_views, 3, {"views": True}))
    for function, number, options in checks:
        leaves = [x.clone().requires_grad_() for x in rows[:number]]
        expected = found_and_gradients(form_reference, leaves, form=form, **options)
        leaves = [x.float().requires_grad_() for x in rows[:number]]
        found = found_and_gradients(function, leaves, form=form, tile=40)
        assert abs(float(found[0]) - float(expected[0])) < 1e-4 * max(abs(float(expected[0])), 1e-2)
        whole = torch.cat([x.flatten() for x in expected[1:3]]).norm()
        for x, y in zip(found[1:3], expected[1:3], strict=True):
            assert float((x - y).norm()) < 1e-4 * max(float(y.norm()), 1e-3 * float(whole))
        for x, y in zip(found[3:], expected[3:], strict=True):  # terms of size 1 cancel in them
            assert abs(float(x) - float(y)) < 1e-4 * max(abs(float(y)), 1e-1)


@pytest.mark.parametrize("form", FORMS, ids=lambda f: f.name)
def test_float32_inside_autocast_and_bfloat16_rows(form: Form) -> None:
    leaves = [x.detach().float().requires_grad_() for x in leaves_of(64, width=32)]
    with torch.no_grad():
        leaves[2].fill_(100.0)
    expected = found_and_gradients(ours, leaves, form=form)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(found_and_gradients(ours, leaves, form=form), expected, rtol=0, atol=0)
    rows = [x.detach().bfloat16().requires_grad_() for x in leaves[:2]]
    found = found_and_gradients(ours, [*rows, *leaves[2:]], form=form)
    assert found[0].dtype == torch.float32 and found[1].dtype == torch.bfloat16
    assert all(x.isfinite().all() for x in found)


@pytest.mark.parametrize("form", [*FORMS, Form(hard_quantile=0.3)], ids=lambda f: f"{f.name}-{f.hard_quantile}")
def test_no_tensor_of_n_by_n_elements(form: Form) -> None:
    rows, tile = 384, 48
    leaves = [x.detach().float().requires_grad_() for x in leaves_of(rows, width=8)]
    with LargestTensor() as watch:
        found_and_gradients(ours, leaves, form=form, groups=torch.arange(rows) // 2, tile=tile)
        if form in VIEW_FORMS:
            found_and_gradients(ours_of_views, leaves[:3], form=form, tile=tile)
    histograms = rows * 257 if form.hard_quantile < 1 else 0
    assert watch.largest <= max(2 * rows * 8, tile * tile, histograms) < rows * rows


def test_what_does_not_fit_is_refused() -> None:
    a, b = torch.ones(4, 5), torch.ones(4, 3, 5)
    for options in (
        {"b": b[:3]},
        {"b": b[..., :4]},
        {"a": b},
        {"present_b": torch.ones(4, dtype=torch.bool)},
        {"groups": torch.ones(4, 2, dtype=torch.int64), "groups_b": torch.ones(4, 1, dtype=torch.int64)},
    ):
        with pytest.raises(ValueError, match=r"must be \(B, D\)"):
            contrastive(**{"a": a, "b": b, **options}, scale=1.0, comm=Comm())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="got 'siglip'"):
        view_contrastive(a, a, scale=1.0, comm=Comm(), form=Form("siglip"))
    with pytest.raises(ValueError, match=r"must be \(B, D\)"):
        view_contrastive(a, b, scale=1.0, comm=Comm())
