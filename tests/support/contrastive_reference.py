"""The symmetric contrastive losses as their formulas say them, row by row; slow and plain."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mmcl.distributed import Form


def contrastive_reference(
    a: Tensor,
    b: Tensor,
    scale: Tensor | float,
    present_a: Tensor | None = None,
    present_b: Tensor | None = None,
    groups: Tensor | None = None,
    unpaired_negatives: bool = False,
) -> Tensor:
    """½ · [mean over paired i of −log softmax a→b + the same b→a], in the dtype of ``a``."""
    rows = range(len(a))
    has_a = [True] * len(a) if present_a is None else present_a.tolist()
    has_b = [True] * len(a) if present_b is None else present_b.tolist()
    paired = [i for i in rows if has_a[i] and has_b[i]]
    numbers = [] if groups is None else groups.reshape(len(a), -1).tolist()

    def negative(i: int, j: int) -> bool:
        return i == j or not numbers or not any(x == y >= 0 for x, y in zip(numbers[i], numbers[j], strict=True))

    def cosine(i: int, j: int) -> Tensor:
        return (a[i] / a[i].norm()) @ (b[j] / b[j].norm())

    total = (0 * a[:0]).sum() + (0 * b[:0]).sum() + 0 * torch.as_tensor(scale, dtype=a.dtype)
    for i in paired:
        columns = [j for j in rows if has_b[j] and (unpaired_negatives or has_a[j]) and negative(i, j)]
        lines = [j for j in rows if has_a[j] and (unpaired_negatives or has_b[j]) and negative(i, j)]
        total = total + torch.stack([scale * cosine(i, j) for j in columns]).logsumexp(0) - scale * cosine(i, i)
        total = total + torch.stack([scale * cosine(j, i) for j in lines]).logsumexp(0) - scale * cosine(i, i)
    return total / (2 * max(1, len(paired)))


def form_reference(
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    bias: Tensor | float = 0.0,
    *,
    form: Form,
    present_a: Tensor | None = None,
    present_b: Tensor | None = None,
    groups: Tensor | None = None,
    groups_b: Tensor | None = None,
    unpaired_negatives: bool = False,
    views: bool = False,
) -> Tensor:
    """Any form, from the N × N·K logits; ``a (B, D)``, ``b (B, D)`` or ``(B, K, D)``. ``views``: both sides in one."""
    b = b if b.ndim == 3 else b[:, None]
    rows, per_row = len(a), b.shape[1]
    here_a = torch.ones(rows, dtype=torch.bool) if present_a is None else present_a
    here_b = torch.ones(rows, per_row, dtype=torch.bool) if present_b is None else present_b.view(rows, per_row)
    both = here_a[:, None] & here_b
    cosines = (F.normalize(a, dim=1)[:, None] * F.normalize(b, dim=2)).sum(2)
    x, y = F.normalize(a, dim=1), F.normalize(b.flatten(0, 1), dim=1)
    of_x, of_y = torch.arange(rows), torch.arange(rows * per_row) // per_row
    seen_x = here_a if unpaired_negatives else both.any(1)
    seen_y = here_b.flatten() if unpaired_negatives else both.flatten()
    if views:
        x = y = torch.cat([x, y])
        of_x = of_y = torch.arange(rows).repeat(2)
        seen_x = seen_y = both[:, 0].repeat(2)
    negative = (of_x[:, None] != of_y) & seen_x[:, None] & seen_y
    if groups is not None:
        mine, theirs = groups.view(rows, -1), (groups if groups_b is None else groups_b).view(rows, -1)
        same = ((mine[:, None] == theirs) & (mine[:, None] >= 0)).any(2)
        negative &= ~same[of_x[:, None], of_y]
    logits = scale * (x @ y.T)
    hard = [negative & _hardest(logits, negative, form.hard_quantile)]
    hard.append(negative & _hardest(logits.T, negative.T, form.hard_quantile).T)
    count = int(both.sum())
    if form.name == "siglip":
        questions = sum((F.softplus(logits + bias, threshold=50)[kept]).sum() / 2 for kept in hard)
        return (
            (questions + F.softplus(-(scale * cosines + bias), threshold=50)[both].sum()) / max(count, 1) * (count > 0)
        )
    weight = 2 - count * (cosines / form.sigma).masked_fill(~both, -torch.inf).flatten().softmax(0).view_as(both)
    values = []
    for i, k in both.nonzero().tolist():
        share = 1 / (2 * int(both[i].sum()) * int(both.any(1).sum()))
        lines = [(logits[i], hard[0][i]), (logits[rows + i], hard[0][rows + i])] if views else []
        lines = lines or [(logits[i], hard[0][i]), (logits.T[i * per_row + k], hard[1].T[i * per_row + k])]
        for line, kept in lines:
            positive, others = scale * cosines[i, k], line[kept]
            if form.name in ("dcl", "dclw"):
                own = 1 if form.name == "dcl" else weight[i, k].detach() if form.detach_weight else weight[i, k]
                values.append(share * (others.logsumexp(0) - own * positive) if len(others) else 0 * positive)
                continue
            target = torch.zeros(1 + len(others), dtype=logits.dtype)
            smoothing = form.smoothing if form.name == "clip_label_smoothing" else 0.0
            target[0] = 1.0
            target = (1 - smoothing) * target + smoothing / len(target)
            values.append(-share * (target * torch.cat([positive[None], others]).log_softmax(0)).sum())
    return torch.stack(values).sum() if values else 0 * (logits.nan_to_num().sum() + cosines.sum())


def _hardest(logits: Tensor, negative: Tensor, share: float) -> Tensor:
    """The largest ⌈share · M⌉ of the M negatives of each row."""
    kept = torch.zeros_like(negative)
    for row, (line, mask) in enumerate(zip(logits, negative, strict=True)):
        number = math.ceil(share * int(mask.sum()) - 1e-9)
        kept[row, line.masked_fill(~mask, -torch.inf).topk(number).indices] = True
    return kept


def robust_rows(case: str) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(4)
    noise = torch.randn(2, 48, 16, generator=random, dtype=torch.float64)
    direction = torch.nn.functional.normalize(torch.randn(16, generator=random, dtype=torch.float64), dim=0)
    if case == "near -1":
        return direction + 0.01 * noise[0], -direction + 0.01 * noise[1]
    if case == "near +1":
        return direction + 0.01 * noise[0], direction + 0.01 * noise[1]
    # [-1, 1]: rows turn through half a circle, so each meets every cosine, and its own at −1
    angle = torch.linspace(0, 2 * torch.pi, 48, dtype=torch.float64)
    circle = torch.nn.functional.pad(torch.stack([angle.cos(), angle.sin()], 1), (0, 14))
    return circle, -circle + 0.001 * noise[0]


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements that any tensor made under it had."""

    largest = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, Tensor):
                self.largest = max(self.largest, x.untyped_storage().nbytes() // x.element_size())
        return out
