"""What the losses share: their precision, unit rows, and sums that stay finite when there is nothing to sum."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from functools import wraps
from typing import Any, ParamSpec

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

P = ParamSpec("P")

ZERO_NORM = 1e-12
"""rows of a smaller Euclidean norm count as zero"""


def full_precision(loss: Callable[P, Tensor]) -> Callable[P, Tensor]:
    """Runs ``loss`` in float64 if one of its tensors is float64, else in float32, and outside autocast.

    Lists of tensors are converted too. Numbers and 0-d tensors (temperatures) follow the others.
    """

    @wraps(loss)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> Tensor:
        tensors = [t for t in _floats((*args, *kwargs.values())) if t.ndim]
        dtype = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
        device = tensors[0].device.type if tensors else "cpu"
        known = torch.amp.is_autocast_available(device)
        with torch.autocast(device, enabled=False) if known else nullcontext():
            convert: Any = loss  # the conversion keeps every type, which ParamSpec cannot say
            result: Tensor = convert(
                *(_convert(a, dtype) for a in args), **{k: _convert(v, dtype) for k, v in kwargs.items()}
            )
        return result

    return wrapper


def _floats(values: Iterable[object]) -> Iterable[Tensor]:
    for value in values:
        if isinstance(value, list | tuple):
            yield from _floats(value)
        elif isinstance(value, Tensor) and value.is_floating_point():
            yield value


def _convert(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, list | tuple):
        return [_convert(item, dtype) for item in value]
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def unit(x: Tensor) -> Tensor:
    """``x`` over the Euclidean norm of its last axis; zero rows stay zero and get zero gradient.

    Not ``F.normalize``: it multiplies the gradient of a zero row by 1e12, and then gradient clipping sees nothing else.
    """
    norm: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / norm.masked_fill(norm < ZERO_NORM, float("inf"))


def row_mean(values: Tensor) -> Tensor:
    """Mean over rows ``(B,)``; 0, still joined to the graph, where there are none."""
    return values.sum() / max(len(values), 1)


def diagonal_nll(logits: Tensor) -> Tensor:
    """−log softmax of each row of ``(B, N)`` at its own diagonal entry, ``(B,)``."""
    return -logits.log_softmax(1).diagonal()


def masked_logsumexp(logits: Tensor, masked: Tensor) -> Tensor:
    """log-sum-exp over the last axis without the ``masked`` entries; −inf with zero gradient where all are masked."""
    nothing = masked.all(-1)
    # the gradient of a row of −inf alone is NaN; masked_fill would drop it, but anomaly detection stops there
    logits = logits.masked_fill(masked, float("-inf")).masked_fill(nothing[..., None], 0.0)
    return logits.logsumexp(-1).masked_fill(nothing, float("-inf"))


def log_sum_of_candidates(
    anchors: Tensor,
    candidates: Tensor,
    hidden: Callable[[Tensor], Tensor],
    *,
    temperature: float | Tensor,
    tile: int = 1024,
) -> Tensor:
    """log Σ exp(⟨anchor, candidate⟩ / temperature) of each anchor, ``(B,)``; −inf where no candidate is left.

    ``anchors (B, D)``, ``candidates (M, D)``; ``hidden`` takes numbers of anchors, int64 ``(b,)``, and says which
    candidates they do not see, bool ``(b, M)``. Anchors are taken ``tile`` at a time and their logits made again for
    the gradient: no more than ``tile × M`` of them are held at once.
    """

    def part(rows: Tensor, numbers: Tensor) -> Tensor:
        return masked_logsumexp(rows @ candidates.T / temperature, hidden(numbers))

    numbers = torch.arange(len(anchors), device=anchors.device)
    if len(anchors) <= tile:
        return part(anchors, numbers)
    parts = zip(torch.split(anchors, tile), torch.split(numbers, tile), strict=True)
    return torch.cat([checkpoint(part, *own, use_reentrant=False) for own in parts])


def distances(x: Tensor) -> Tensor:
    """Euclidean distances between rows, ``(B, B)``; zero distances have zero gradient."""
    # the default goes through x·y above 25 rows and loses half of the digits of small distances
    return torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
