"""Several clips of one video as positives of each other: MoCo and BYOL over more than two clips."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmcl.losses._checks import matrix_list, positive
from mmcl.losses._math import full_precision, row_mean
from mmcl.losses.byol import cosine_rows
from mmcl.losses.moco import moco


@full_precision
def persistency_moco(queries: Tensor, keys: Sequence[Tensor], queue: Tensor, *, temperature: float | Tensor) -> Tensor:
    """MoCo's loss of one clip as query, mean over the other clips as keys.

    Args:
        queries: float ``(B, D)``, one clip of each video, normalised inside.
        keys: one or more float ``(B, D)``, the other clips, normalised inside, detached.
        queue: float ``(K, D)``, normalised inside, detached; only rows that hold keys.
        temperature: divides the cosine; above 0, a number or 0-d tensor (0.1 in the authors' code).

    Returns:
        0-d, ≥ 0, in nats: mean over rows and clips; does not depend on the number of clips where their keys are equal.

    Raises:
        ValueError: no keys, shapes disagree, or the temperature is not above 0.

    Source: Feichtenhofer et al. 2021 (arXiv 2104.14558), section 3.

    >>> rows = torch.ones(2, 3)
    >>> f"{persistency_moco(rows, [rows, rows], torch.ones(7, 3), temperature=0.1):.4f}"  # log 8
    '2.0794'
    """
    matrix_list("keys", keys, at_least=1, like=("queries", queries))
    return torch.stack([moco(queries, clip, queue, temperature=temperature) for clip in keys]).mean()


@full_precision
def persistency_byol(prediction: Tensor, targets: Sequence[Tensor], *, temperature: float | Tensor = 0.5) -> Tensor:
    """−cos / temperature of one clip's prediction, mean over the other clips as targets.

    At the default temperature this is :func:`mmcl.losses.byol` less 2.

    Args:
        prediction: float ``(B, D)``, of one clip of each video, normalised inside.
        targets: one or more float ``(B, D)``, the other clips, normalised inside, detached.
        temperature: divides the cosine; above 0, a number or 0-d tensor.

    Returns:
        0-d in [−1/temperature, 1/temperature]: mean over rows and clips; 0 without rows.

    Raises:
        ValueError: no targets, shapes disagree, or the temperature is not above 0.

    Source: Feichtenhofer et al. 2021 (arXiv 2104.14558), section 3.

    >>> f"{persistency_byol(torch.eye(3), [torch.eye(3)]):.1f}"
    '-2.0'
    """
    matrix_list("targets", targets, at_least=1, like=("prediction", prediction))
    positive("temperature", temperature)
    cosines = torch.stack([cosine_rows(prediction, clip) for clip in targets])
    return -row_mean(cosines.mean(0)) / temperature
