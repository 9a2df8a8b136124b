"""Zero-shot classification: the class whose name, put into sentences, lies nearest. Pure functions of unit rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Prompts = Literal["mean", "max"]
Average = Literal["scores", "embeddings"]


def fill_prompts(class_names: Sequence[str], prompts: Sequence[str]) -> list[str]:
    """Every prompt about the first class, then about the second, …; ``{}`` stands for the name.

    Raises:
        ValueError: no class, no prompt, or one without ``{}`` exactly once.

    >>> fill_prompts(["cat", "dog"], ["a {}.", "the {}"])
    ['a cat.', 'the cat', 'a dog.', 'the dog']
    """
    if not class_names or not prompts or any(prompt.count("{}") != 1 for prompt in prompts):
        raise ValueError("class names are needed, and prompts with {} once, where the name goes")
    return [prompt.replace("{}", name) for name in class_names for prompt in prompts]


def zero_shot_scores(
    rows: Tensor,
    sentences: Tensor,
    *,
    prompts: Prompts = "mean",
    views: Average = "embeddings",
    scale: float = 100.0,
) -> Tensor:
    """float32 ``(n, C)``: how well each class fits each sample.

    Args:
        rows: unit rows ``(n, D)`` of samples, or ``(n, views, D)``.
        sentences: unit rows ``(C, P, D)``: the P prompts about each class.
        prompts: ``mean``: a class is the unit mean of its sentences (Radford et al. 2021, section 3.1.4); ``max``: it
            fits as well as the best of them.
        views: ``embeddings``: a sample is the unit mean of its views; ``scores``: the mean of their softmax, as video
            papers average (Feichtenhofer et al. 2021).
        scale: the model's multiplier of the cosine, for that softmax.

    Raises:
        ValueError: shapes that do not fit.

    >>> rows, sentences = torch.eye(2), torch.eye(2)[:, None]
    >>> zero_shot_scores(rows, sentences).tolist()
    [[1.0, 0.0], [0.0, 1.0]]
    """
    if rows.ndim not in (2, 3) or sentences.ndim != 3 or rows.shape[-1] != sentences.shape[-1]:
        raise ValueError(f"rows {tuple(rows.shape)} and sentences {tuple(sentences.shape)} do not fit")
    several = rows if rows.ndim == 3 else rows[:, None]
    if views == "embeddings" and several.shape[1] > 1:
        several = F.normalize(several.mean(1), dim=-1)[:, None]
    if prompts == "mean":
        sentences = F.normalize(sentences.mean(1), dim=-1)[:, None] if sentences.shape[1] > 1 else sentences
    # prompt by prompt: never all of samples × views × classes × prompts
    cosines = several @ sentences[:, 0].T
    for number in range(1, sentences.shape[1]):
        cosines = torch.maximum(cosines, several @ sentences[:, number].T)
    return cosines[:, 0] if cosines.shape[1] == 1 else (scale * cosines).softmax(-1).mean(1)
