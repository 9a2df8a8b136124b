"""What is contrasted, and which loss is made of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

FormName: TypeAlias = Literal["infonce", "siglip", "dcl", "dclw", "clip_label_smoothing"]


@dataclass(frozen=True)
class Form:
    """What is made of the logits.

    With s a logit (scale × cosine), p a positive and n_i the log-sum-exp over the negatives of query i:

    - ``infonce``: log(e^p + e^n) − p (van den Oord et al. 2018, arXiv 1807.03748; both directions: CLIP, 2103.00020);
    - ``dcl``: n − p, the positive is not in the sum (Yeh et al. 2021, arXiv 2110.06848); 0 without negatives;
    - ``dclw``: n − w·p, w = 2 − P·softmax over all P positives (cosine / ``sigma``), of mean 1;
    - ``clip_label_smoothing``: infonce against targets 1 − ε on the positive and ε/M more on each of the query's M
      candidates, itself included; ε is ``smoothing`` (Fini et al. 2023, arXiv 2305.08675, use 0.1);
    - ``siglip``: Σ over positives softplus(−s − bias) + Σ over negatives softplus(s + bias), ÷ the number of positives
      (Zhai et al. 2023, arXiv 2303.15343).
    """

    name: FormName = "infonce"
    sigma: float = 0.5
    detach_weight: bool = True
    """DCLW's weight is a number, not something to learn through"""
    smoothing: float = 0.1
    hard_quantile: float = 1.0
    """share of negatives that count, the hardest: each query keeps ⌈share · M⌉ of the M negatives it has on all ranks,
    those of highest cosine, ties included; a query is a row in one direction, a column in the other. SigLIP has no
    direction: a negative weighs ½ for its row and ½ for its column. 1: all (Wang & Liu 2021, arXiv 2012.09740)"""


@dataclass(frozen=True, eq=False)
class Pair:
    """What of :func:`contrastive`'s arguments is of one pair of sides."""

    a: Tensor
    b: Tensor
    scale: Tensor | float
    present_a: Tensor | None = None
    present_b: Tensor | None = None
    groups: Tensor | None = None
    groups_b: Tensor | None = None
    bias: Tensor | float = 0.0
    pools: Tensor | None = None

    def masks(self) -> tuple[Tensor, Tensor]:
        """``present_a`` and ``present_b``, all rows where they are not given."""
        given = ((self.present_a, self.a.shape[:1]), (self.present_b, self.b.shape[:-1]))
        a, b = (x if x is not None else torch.ones(n, dtype=torch.bool, device=self.a.device) for x, n in given)
        return a, b


SIDES = ("a", "b", "present_a", "present_b", "groups", "groups_b", "pools")
"""what of a pair has rows"""


def sides(pairs: Sequence[Pair]) -> list[Tensor | None]:
    """What has rows, pair by pair."""
    return [getattr(pair, side) for pair in pairs for side in SIDES]


def distinct(xs: Sequence[Tensor | None]) -> tuple[list[Tensor], list[int]]:
    """The different tensors of these, and where among them each stands; −1: None."""
    found: dict[int, tuple[int, Tensor]] = {}
    places = [-1 if x is None else found.setdefault(id(x), (len(found), x))[0] for x in xs]
    return [x for _, x in found.values()], places
