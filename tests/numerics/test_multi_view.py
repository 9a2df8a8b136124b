"""Any number of views and modalities at once, with some missing: against loops over the terms that are there."""

from __future__ import annotations

from itertools import combinations, permutations

import pytest
import torch
from support.exactness import TOWERS
from support.objectives import batch_for, build_objective, embed
from torch import Tensor

from mmcl import losses
from mmcl.distributed import Comm
from mmcl.types import ConfigError

TEMPERATURE = 0.4


def loop(rows: list[Tensor], has: Tensor, related: Tensor, method: str, within: bool) -> Tensor:
    """``rows``: unit ``(B, D)`` per view; ``has (V, B)``. Each sum is full terms × the mean of those that are there."""
    views, taking = len(rows), [i for i in range(has.shape[1]) if has[:, i].sum() >= 2]

    def mean(terms: list[Tensor]) -> Tensor:
        return torch.stack(terms).mean()

    def similar(l: int, i: int, m: int, j: int) -> Tensor:  # noqa: E741
        return torch.exp((rows[l][i] @ rows[m][j]) / TEMPERATURE)

    values = []
    for i in taking:
        mine = [view for view in range(views) if has[view, i]]
        others = [j for j in taking if j != i and not related[i, j]]
        if method == "mv_info_nce":
            pairs = views * (views - 1)
            positive = pairs * mean([similar(a, i, b, i) for a, b in permutations(mine, 2)])
            terms = [
                similar(a, i, b, j) for a in mine for j in [i, *others] for b in range(views) if b != a and has[b, j]
            ]
            full = pairs * (1 + len(others))
            if within:
                terms += [similar(a, i, a, j) for a in mine for j in others if has[a, j]]
                full += views * len(others)
            values.append(torch.log(full * mean(terms)) - torch.log(positive))
        else:
            spreads = []
            for a in mine:
                near = [similar(a, i, a, j) for j in others if has[a, j]]
                if near:
                    spreads.append(torch.log(len(others) * mean(near)))
            if spreads:
                pairs = views * (views - 1) // 2
                positive = pairs * mean([similar(a, i, b, i) for a, b in combinations(mine, 2)])
                values.append(views * mean(spreads) - torch.log(positive))
    return torch.stack(values).mean()


METHODS = [("mv_info_nce", "cross"), ("mv_info_nce", "all"), ("mv_dhel", "cross")]


@pytest.mark.parametrize(("method", "negatives"), METHODS)
@pytest.mark.parametrize("masked", [True, False])
def test_missing_views_and_groups(method: str, negatives: str, masked: bool) -> None:
    objective = build_objective(
        "multi_view",
        TOWERS,
        method=method,
        negatives=negatives,
        temperature=TEMPERATURE,
        views={"video": 2, "audio": 1, "text": 1},
        mask_false_negatives=masked,
    )
    related_to_others = 0
    for step in range(3):
        batch = batch_for(objective, "mixed", step)
        embeddings, _ = embed(objective, batch)
        rows = [torch.nn.functional.normalize(embeddings.get(need), dim=1) for need in objective.needs]
        has = torch.stack([batch.views[need.view].present for need in objective.needs])
        groups = batch.groups
        related = ((groups[:, None] == groups[None]) & (groups[:, None] >= 0)).any(2) & masked
        term = objective(embeddings, Comm())
        torch.testing.assert_close(term.loss, loop(rows, has, related, method, negatives == "all"))
        assert not has.all()
        related_to_others += int((related & ~torch.eye(len(batch), dtype=torch.bool)).sum())
        taking = has.sum(0)[has.sum(0) >= 2].double()
        torch.testing.assert_close(term.metrics["views"], taking.mean())
    assert (related_to_others > 0) == masked


@pytest.mark.parametrize(("method", "negatives"), METHODS)
def test_nothing_missing_is_the_pure_loss(method: str, negatives: str) -> None:
    objective = build_objective(
        "multi_view", TOWERS, method=method, negatives=negatives, temperature=TEMPERATURE, mask_false_negatives=False
    )
    embeddings, _ = embed(objective, batch_for(objective, "full"))
    views = [embeddings.get(need) for need in objective.needs]
    more = {"negatives": negatives} if method == "mv_info_nce" else {}
    wanted = getattr(losses, method)(views, temperature=TEMPERATURE, **more)
    torch.testing.assert_close(objective(embeddings, Comm()).loss, wanted, rtol=1e-12, atol=0)


def test_views_of_their_own_windows() -> None:
    objective = build_objective("multi_view", TOWERS, views={"video": 3, "text": 1}, windows="different")
    assert [(need.tower, need.view.clip) for need in objective.needs] == [
        ("video", 0),
        ("video", 1),
        ("video", 2),
        ("text", 0),
    ]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"views": {"video": 1}}, "objectives.4.views: two views at least"),
        ({"views": {"vidoe": 2}}, "objectives.4.views: .*'vidoe'"),
        ({"augmentation": {"sound": "x"}}, "objectives.4.augmentation: .*'sound'"),
    ],
)
def test_refuses(options: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        build_objective("multi_view", TOWERS, **options)
