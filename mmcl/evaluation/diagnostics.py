"""What the embeddings of a list look like: figures that say why retrieval goes well or badly."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmcl.evaluation.distinct import Integers
from mmcl.evaluation.ranking import RankResult
from mmcl.losses import alignment, tolerance, uniformity

SAMPLED_ROWS = 2000
"""figures over pairs of rows are of so many rows, drawn at random, where there are more"""
OCCURRENCE_RANKS = 10
"""first places that count as found, for hubs"""
BINS = 40
"""of a histogram of similarities, from −1 to 1"""


def modality_figures(rows: Tensor, labels: Integers, *, seed: int = 0) -> dict[str, float]:
    """``uniformity``, ``tolerance`` and ``effective_rank`` of the unit rows ``(n, D)`` of one modality."""
    drawn = _drawn(len(rows), seed)
    sample = rows[drawn].double().cpu()
    return {
        "rows": len(rows),
        "uniformity": float(uniformity(sample)),
        "tolerance": float(tolerance(sample, torch.from_numpy(np.asarray(labels)[drawn]))),
        "effective_rank": effective_rank(rows),
    }


def effective_rank(rows: Tensor) -> float:
    """exp of the entropy of the singular values of ``rows (n, D)``, as shares of their sum: 1 to min(n, D).

    Source: Roy and Vetterli 2007, The effective rank; Garrido et al. 2023 (arXiv 2210.02885), equation 1.
    """
    gram = torch.zeros(rows.shape[1], rows.shape[1], dtype=torch.float64)
    for part in torch.split(rows, 4096):
        gram += part.double().cpu().T @ part.double().cpu()
    values = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()
    # eigenvalues are known to about D · 2⁻⁵² of the largest, their roots to its root
    values = values[values > values.max() * (len(values) * torch.finfo(torch.float64).eps) ** 0.5]
    shares = values / values.sum()
    return float((-(shares * shares.log()).sum()).exp()) if len(shares) else 0.0


def pair_figures(queries: Tensor, gallery: Tensor, right: list[Integers], *, seed: int = 0) -> dict[str, Any]:
    """``alignment`` of right pairs, ``modality_gap`` (distance of the means, Liang et al. 2022, arXiv 2203.02053), and
    histograms of the similarities of right (``positives``) and of other pairs (``negatives``).

    Args:
        queries: ``(Q, D)`` unit rows.
        gallery: ``(M, D)`` unit rows.
        right: for each query the gallery rows that are right.
    """
    asked, candidates = _drawn(len(queries), seed), _drawn(len(gallery), seed + 1)
    left, other = queries[asked].double().cpu(), gallery[candidates].double().cpu()
    first = np.array([(place, row) for place, number in enumerate(asked) for row in right[number][:16]], np.int64)
    first = first.reshape(-1, 2)
    partners = gallery[first[:, 1]].double().cpu()
    paired = left[first[:, 0]]
    wrong = torch.ones(len(left), len(other), dtype=torch.bool)
    where = np.full(len(gallery), -1)
    where[candidates] = np.arange(len(candidates))
    for place, number in enumerate(asked):
        seen = where[right[number]]
        wrong[place, seen[seen >= 0]] = False
    gap = queries.double().mean(0).cpu() - gallery.double().mean(0).cpu()
    return {
        "alignment": float(alignment(paired, partners)),
        "modality_gap": float(gap.norm()),
        "positives": _histogram((paired * partners).sum(1)),
        "negatives": _histogram((left @ other.T)[wrong]),
    }


def occurrences(result: RankResult, k: int = OCCURRENCE_RANKS) -> Integers:
    """``(M,)``: how often each gallery row is among the first ``k`` of a query."""
    return np.bincount(result.top_indices[:, :k].ravel(), minlength=result.gallery)


def hubness(result: RankResult, k: int = OCCURRENCE_RANKS) -> float:
    """Skewness of :func:`occurrences`; 0: all rows alike.

    Source: Radovanović et al. 2010 (JMLR 11), equation 1.
    """
    counts = occurrences(result, k).astype(np.float64)
    deviations = counts - counts.mean()
    spread = float(np.sqrt(np.mean(deviations**2)))
    return float(np.mean(deviations**3) / spread**3) if spread else 0.0


def _histogram(values: Tensor) -> dict[str, Any]:
    counts, edges = np.histogram(values.clamp(-1, 1).numpy(), bins=BINS, range=(-1, 1))
    mean = float(values.mean()) if len(values) else None
    return {"mean": mean, "counts": counts.tolist(), "edges": [round(float(edge), 6) for edge in edges]}


def _drawn(count: int, seed: int) -> Integers:
    if count <= SAMPLED_ROWS:
        return np.arange(count)
    return np.sort(np.random.default_rng(seed).choice(count, SAMPLED_ROWS, replace=False))
