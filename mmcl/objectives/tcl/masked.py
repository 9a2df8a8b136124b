"""Masked language modelling (MLM) with the other modality in view."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmcl.losses.soft_targets import soft_target_rows
from mmcl.objectives.tcl.fusion import Fusion, Tokens
from mmcl.objectives.tcl.rows import Rows
from mmcl.objectives.transformers import in_chunks


class VocabularyHead(nn.Module):
    """A linear map, GELU and norm, then one logit per token of the vocabulary."""

    def __init__(self, width: int, vocabulary: int) -> None:
        super().__init__()
        self.transform, self.norm = nn.Linear(width, width), nn.LayerNorm(width)
        self.out = nn.Linear(width, vocabulary)

    def forward(self, x: Tensor) -> Tensor:
        """``(m, width)`` to float32 or float64 ``(m, vocabulary)``."""
        logits: Tensor = self.out(self.norm(F.gelu(self.transform(x))))
        return logits if logits.dtype == torch.float64 else logits.float()


@dataclass(frozen=True, eq=False)
class Reader:
    """One fusion tower, online or its momentum copy, with its head and the tokens ``(B, L, D)`` that it sees."""

    fusion: nn.Module
    head: nn.Module
    reading: Tokens
    context: Tokens

    def logits(self, numbers: Tensor, places: Tensor) -> Tensor:
        """Of the tokens at ``places``, bool ``(P, L)``, of these samples."""
        assert isinstance(self.fusion, Fusion)
        fused = self.fusion(self.reading.at_least_one().pick(numbers), self.context.at_least_one().pick(numbers))
        out: Tensor = self.head(fused[:, 1:][places])
        return out


def masked_tokens(
    reader: Reader, teacher: Reader | None, targets: Tensor, rows: Rows, alpha: Tensor | float, chunk: int
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of masked tokens, the mean over those of all ranks, and how many they are; both 0-d.

    ``targets`` int64 ``(B, L)``: the tokens that were masked, −1 elsewhere.
    """
    targets = targets.masked_fill(~rows.own[:, None], -1)
    numbers = rows.own.nonzero()[:, 0]
    if len(numbers) == 0:
        numbers = numbers.new_zeros(1)
        targets = F.pad(targets, (0, 0, 0, int(len(targets) == 0)), value=-1)

    def values(some: Tensor) -> Tensor:
        wanted = targets[some]
        places = wanted >= 0
        logits, labels = reader.logits(some, places), wanted[places]
        if teacher is None:
            return F.cross_entropy(logits, labels, reduction="none")
        with torch.no_grad():
            soft = teacher.logits(some, places)
        return soft_target_rows(logits, soft, labels, alpha=alpha)

    each = in_chunks(values, numbers, chunk)
    return rows.mean(each), rows.comm.sum(torch.tensor(len(each), device=each.device))
