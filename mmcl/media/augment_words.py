"""Augmentation of captions as words, before any tokenizer sees them: stop words, synonyms, swaps, deletions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator

from mmcl.config import Options
from mmcl.hashing import uniform

Probability = Annotated[float, Field(ge=0, le=1)]
Words = Annotated[tuple[str, ...], Field(min_length=1)]

_WORDS = 59
"""what the random numbers of this file are for"""
_STOP, _SYNONYM, _WHICH, _SWAP, _DELETE = range(5)

_SMALL = """
a an the this that these those some any of in on at by to from with for as into onto over under about and or but if then
than so while there here is are was were be been being am do does did has have had will would can could it its he she
they them his her their we you i not very just up down out off
"""
ENGLISH = tuple(_SMALL.split())
"""small words of English that a caption can do without"""


class WordOptions(Options):
    """Changes of words, in this order; of each caption at least one word stays (EDA, arXiv 1901.11196)."""

    stop_words: Probability = 0.0
    """each of ``stop_list`` goes"""
    stop_list: Words = ENGLISH
    """in small letters"""
    synonym: Probability = 0.0
    """each word that has synonyms becomes one of them"""
    synonyms: dict[str, Words] = Field(default_factory=dict)
    """word in small letters: its synonyms; no list comes with the package"""
    swap: Probability = 0.0
    """two of the caption's words change places"""
    delete: Probability = 0.0
    """each word goes"""

    @model_validator(mode="before")
    @classmethod
    def _lists(cls, given: Any) -> Any:
        """YAML writes tuples as lists."""
        if not isinstance(given, dict):
            return given
        found = {k: tuple(v) if k == "stop_list" and isinstance(v, list) else v for k, v in given.items()}
        lists = found.get("synonyms")
        if isinstance(lists, dict):
            found["synonyms"] = {k: tuple(v) if isinstance(v, list) else v for k, v in lists.items()}
        return found

    @model_validator(mode="after")
    def _has_synonyms(self) -> WordOptions:
        if self.synonym and not self.synonyms:
            raise ValueError("synonym needs synonyms, a list for each word that has any")
        return self


def augment_words(caption: str, options: WordOptions, words: Sequence[int]) -> str:
    """The caption, changed: a pure function of it and of the numbers ``words`` (seed, epoch, key, view).

    >>> augment_words("A dog on the lawn", WordOptions(stop_words=1.0), (0,))
    'dog lawn'
    """
    parts = caption.split()
    if not parts:
        return caption

    def draws(purpose: int, count: int) -> npt.NDArray[np.float64]:
        return uniform(*words, _WORDS, purpose, np.arange(count))

    small = {part: part.casefold().strip(".,;:!?\"'()") for part in parts}
    stops = np.array([small[part] in options.stop_list for part in parts])
    parts = _without(parts, stops, draws(_STOP, len(parts)), options.stop_words)
    chances, which = draws(_SYNONYM, len(parts)), draws(_WHICH, len(parts))
    for i, part in enumerate(parts):
        others = options.synonyms.get(small[part], ())
        if others and chances[i] < options.synonym:
            parts[i] = others[int(which[i] * len(others))]
    chance, first, second = draws(_SWAP, 3)
    if chance < options.swap and len(parts) > 1:
        i = int(first * len(parts))
        j = (i + 1 + int(second * (len(parts) - 1))) % len(parts)
        parts[i], parts[j] = parts[j], parts[i]
    return " ".join(_without(parts, np.ones(len(parts), bool), draws(_DELETE, len(parts)), options.delete))


def _without(
    parts: list[str], may_go: npt.NDArray[np.bool_], draws: npt.NDArray[np.float64], chance: float
) -> list[str]:
    """Some of them gone; where all would go the one with the largest number stays."""
    stays = ~(may_go & (draws < chance))
    if not stays.any():
        stays[draws.argmax()] = True
    return [part for part, there in zip(parts, stays, strict=True) if there]
