"""Negatives of one pseudo-label: the mask on a mixed batch is the sampler on pure ones; one label is the base loss."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support.contrastive_reference import contrastive_reference
from support.exactness import TOWERS
from support.gloo import GlooPool
from torch import Tensor

from mmcl.config import build as build_options
from mmcl.distributed import Comm, Form, contrastive, view_contrastive
from mmcl.objectives import OBJECTIVES
from mmcl.objectives.ranks import mean_negatives

ROWS = 24
FORMS = [Form(), Form("dcl"), Form("siglip"), Form("clip_label_smoothing"), Form(hard_quantile=0.5)]
POOLS = torch.tensor([3, 0, 70, 3, 0, 3] * 4)


def rows() -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(1)
    a, b = torch.randn(2, ROWS, 6, generator=random, dtype=torch.float64)
    return a.requires_grad_(), b.requires_grad_()


def cross(form: Form) -> Callable[..., Tensor]:
    return lambda a, b, **more: contrastive(a, b, scale=7.0, bias=-2.0, comm=Comm(), form=form, tile=5, **more)


def views(form: Form) -> Callable[..., Tensor]:
    return lambda a, b, **more: view_contrastive(a, b, scale=7.0, comm=Comm(), form=form, tile=5, **more)


WAYS = [cross(form) for form in FORMS] + [views(form) for form in FORMS if form.name in ("infonce", "dcl")]


def gradients(loss: Tensor, of: tuple[Tensor, ...]) -> list[Tensor]:
    return list(torch.autograd.grad(loss, of))


@pytest.mark.parametrize("way", WAYS)
def test_the_mask_on_a_mixed_batch_is_the_samplers_pure_batches(way: Callable[..., Tensor]) -> None:
    """The same rows: the mean over pure batches, each weighed by its rows; values and gradients."""
    a, b = rows()
    present = torch.arange(ROWS) % 7 != 2
    groups = torch.arange(ROWS) // 5
    option = {"present": present} if way in WAYS[len(FORMS) :] else {"present_a": present}
    masked = way(a, b, pools=POOLS, groups=groups, **option)
    pure = []
    for pool in POOLS.unique():
        here = pool == POOLS
        alone = way(a[here], b[here], groups=groups[here], **{name: mask[here] for name, mask in option.items()})
        pure.append(alone * (here & present).sum() / present.sum())
    sampled = torch.stack(pure).sum()
    assert float(masked.detach()) == pytest.approx(float(sampled.detach()), abs=1e-9)
    for left, right in zip(gradients(masked, (a, b)), gradients(sampled, (a, b)), strict=True):
        assert torch.allclose(left, right, atol=1e-9)


@pytest.mark.parametrize("way", WAYS)
def test_one_label_is_the_base_loss_and_two_are_not(way: Callable[..., Tensor]) -> None:
    a, b = rows()
    one = way(a, b, pools=torch.full((ROWS,), 5))
    assert torch.equal(one, way(a, b))
    assert abs(float((way(a, b, pools=torch.arange(ROWS) % 2) - one).detach())) > 1e-3


def test_a_row_without_a_label_has_no_negatives() -> None:
    a, b = rows()
    pools = torch.where(torch.arange(ROWS) < 20, 0, -1)
    expected = contrastive_reference(a[:20], b[:20], scale=7.0) * 20 / ROWS
    assert float(contrastive(a, b, scale=7.0, comm=Comm(), pools=pools)) == pytest.approx(float(expected))


def on_ranks(rank: int, world: int) -> list[float]:
    comm, (a, b) = Comm.current(), rows()
    own = slice(rank, None, world)
    groups = (torch.arange(ROWS) // 3)[own, None]
    values = [
        contrastive(a[own], b[own], scale=7.0, comm=comm, pools=POOLS[own], groups=groups),
        view_contrastive(a[own], b[own], scale=7.0, comm=comm, pools=POOLS[own]),
        mean_negatives(groups, torch.arange(ROWS)[own] % 5 > 0, comm, POOLS[own]),
    ]
    assert rank > 0 or world > 1 or float(values[0]) > 0
    d_a, d_b = torch.autograd.grad(values[0], (a, b))
    whole = [comm.sum(gradient).sum(1) / world for gradient in (d_a, d_b)]
    return [float(value.detach()) for value in values] + torch.cat(whole).tolist()


@pytest.mark.parametrize("world", [2, 3])
def test_on_several_ranks_it_is_the_same(gloo: GlooPool, world: int) -> None:
    expected = on_ranks(0, 1)
    for found in gloo(world, on_ranks):
        assert found == pytest.approx(expected, abs=1e-9)


def test_negatives_are_counted_within_a_pool() -> None:
    groups = torch.stack([torch.arange(ROWS) // 3, torch.arange(ROWS) % 4], 1)
    present = torch.arange(ROWS) % 5 > 0
    pools = torch.where(torch.arange(ROWS) == 7, -1, POOLS)
    count = 0
    for i in range(ROWS):
        for j in range(ROWS):
            same = bool((groups[i] == groups[j]).any())
            count += bool(present[i] and present[j] and pools[i] == pools[j] and pools[i] >= 0 and not same)
    found = mean_negatives(groups, present, Comm(), pools)
    assert float(found) == pytest.approx(count / int(present.sum()))


def test_those_say_so_that_keep_to_labels() -> None:
    method = {"name": "simclr", "hidden": 8, "out": 8}
    options = {
        "cross_modal": {},
        "intra_modal": {"tower": "video", "windows": "different", "method": method},
        "mutual": {},
    }
    said = {}
    for name, more in options.items():
        entry = OBJECTIVES[name]
        said[name] = entry.build(build_options(entry.options, {"name": name, **more}), TOWERS).pools
    assert said == {"cross_modal": True, "intra_modal": True, "mutual": False}
