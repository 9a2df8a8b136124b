"""Image-text matching (ITM) for any two modalities: true pairs against the hardest of all ranks, in proportion."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmcl.hashing import text_hash
from mmcl.media.device_hash import device_uniform
from mmcl.objectives.tcl.fusion import Fusion, Tokens
from mmcl.objectives.tcl.rows import Rows
from mmcl.objectives.transformers import in_chunks

_READING, _CONTEXT = text_hash("tcl reading negative"), text_hash("tcl context negative")
"""what the random numbers are for"""


def hard_negatives(queries: Tensor, candidates: Tensor, rows: Rows, scale: Tensor, words: tuple[int, int]) -> Tensor:
    """int64 ``(n,)``: for each query ``(n, D)`` one of the candidates ``(M, D)``, drawn ∝ exp(scale · cosine).

    Never the row's own sample nor one of its groups; −1 where no other is left. The draw is the largest logit with
    Gumbel noise of its own for each (query, candidate), keyed by ``words`` and the two draw numbers: the order of rows,
    and how they lie on ranks, change nothing.
    """
    if queries.shape[0] == 0:
        return rows.numbers
    taken = rows.hidden | rows.itself
    u = device_uniform(*words, rows.draws[rows.numbers][:, None], rows.draws).clamp_min(2.0**-54)
    with torch.autocast(queries.device.type, enabled=False):
        logits = scale.detach() * (queries.detach() @ candidates.detach().T)
    best = (logits - (-u.log()).log()).masked_fill(taken, -torch.inf).argmax(1)
    return best.masked_fill(taken.all(1), -1)


class Matching(nn.Module):
    """Two classes on the pair's output of the fusion tower: together or not."""

    def __init__(self, width: int, seed: int) -> None:
        super().__init__()
        self.seed = seed
        self.head = nn.Linear(width, 2)

    def forward(
        self,
        fusion: Fusion,
        tokens: tuple[Tokens, Tokens],
        joint: tuple[Tensor, Tensor],
        rows: Rows,
        scale: Tensor,
        chunk: int,
    ) -> tuple[Tensor, Tensor]:
        """The loss and the share of right answers, both 0-d and global.

        ``tokens`` and ``joint (B, D)`` are those of the reading and of the context tower, of this rank.
        """
        reading, context = (side.of_all_ranks(rows.comm).at_least_one() for side in tokens)
        own = [x[rows.own] for x in joint]
        every = [rows.all(x) for x in joint]
        for_context = hard_negatives(own[1], every[0], rows, scale, (self.seed, _READING))
        for_reading = hard_negatives(own[0], every[1], rows, scale, (self.seed, _CONTEXT))
        numbers = rows.numbers
        pairs = [(numbers, numbers), (numbers, for_reading), (for_context, numbers)]
        found = torch.cat([torch.minimum(a, b) >= 0 for a, b in pairs])
        labels = torch.cat([torch.full_like(numbers, int(kind == 0)) for kind in range(3)])
        samples = torch.cat([torch.stack([a.clamp_min(0), b.clamp_min(0)], 1) for a, b in pairs])
        places = rows.places[samples]
        if len(places) == 0:
            places, labels, found = places.new_zeros(1, 2), labels.new_zeros(1), found.new_zeros(1)

        def judge(some: Tensor) -> Tensor:
            fused = fusion(reading.pick(some[:, 0]), context.pick(some[:, 1]))
            return _wide(self.head(fused[:, 0]))

        logits = in_chunks(judge, places, chunk)
        values = F.cross_entropy(logits, labels, reduction="none")
        right = (logits.argmax(1) == labels).to(values.dtype)
        return rows.comm.mean(values, found), rows.comm.mean(right.detach(), found)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
