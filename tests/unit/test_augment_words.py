"""Captions changed word by word: what may go goes, something stays, and every draw can be repeated."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmcl.config import build
from mmcl.data.views import ViewMaker
from mmcl.media.augment_words import ENGLISH, WordOptions, augment_words
from mmcl.media.augmentation import Augmentation
from mmcl.media.text import ByteTokenizer
from mmcl.shards.members import Sample
from mmcl.types import ConfigError, TextSpec, View

CAPTION = "A brown dog, and the cat, on a lawn"
chances = st.floats(0, 1)


def over_keys(options: WordOptions, caption: str = CAPTION, count: int = 400) -> list[str]:
    return [augment_words(caption, options, (0, 0, key)) for key in range(count)]


def test_stop_words_go_and_nothing_else() -> None:
    assert set(over_keys(WordOptions(stop_words=1.0), count=5)) == {"brown dog, cat, lawn"}
    found = over_keys(WordOptions(stop_words=0.8))
    gone = sum(9 - len(text.split()) for text in found) / (5 * len(found))
    assert gone == pytest.approx(0.8, abs=0.04)
    assert set(over_keys(WordOptions(stop_words=1.0, stop_list=("dog",)), "The Dog!", 3)) == {"The"}
    assert set(over_keys(WordOptions(stop_words=1.0), "it is on", 60)) == {"it", "is", "on"}, "one stays, any of them"


def test_synonyms_swaps_and_deletions() -> None:
    known = WordOptions(synonym=0.5, synonyms={"dog": ("hound", "puppy")})
    found = over_keys(known, "dog barks")
    shares = [found.count(f"{word} barks") / len(found) for word in ("dog", "hound", "puppy")]
    assert shares == pytest.approx([0.5, 0.25, 0.25], abs=0.08)
    swapped = over_keys(WordOptions(swap=0.4), "one two three")
    assert swapped.count("one two three") / len(swapped) == pytest.approx(0.6, abs=0.08)
    assert set(swapped) == {"one two three", "two one three", "three two one", "one three two"}
    kept = over_keys(WordOptions(delete=0.2), "1 2 3 4 5 6 7 8 9 10")
    assert sum(len(text.split()) for text in kept) / len(kept) == pytest.approx(8.0, abs=0.2)


@settings(max_examples=30)
@given(st.text(max_size=40), chances, chances, chances, st.integers(0, 2**62))
def test_any_caption_keeps_a_word_of_its_own(text: str, stop: float, swap: float, delete: float, key: int) -> None:
    options = WordOptions(stop_words=stop, swap=swap, delete=delete)
    found = augment_words(text, options, (1, key))
    assert found == augment_words(text, options, (1, key))
    assert set(found.split()) <= set(text.split()) and bool(found.split()) == bool(text.split())
    if not (stop or swap or delete):
        assert found.split() == text.split()


def test_views_that_are_further_copies_are_other_draws() -> None:
    spec = TextSpec(ByteTokenizer())
    views = tuple(View(spec, augmentation=name, copy=i) for name, i in (("none", 0), ("noisy", 1), ("noisy", 2)))
    noisy = build(Augmentation, {"text": {"words": {"delete": 0.5}}})
    caption = " ".join(f"w{i}" for i in range(20))
    texts = []
    for _ in range(2):
        values, chosen = ViewMaker(views, augmentations={"noisy": noisy})(Sample("k", captions=(caption,)), epoch=0)
        assert chosen == caption, "groups go by the caption itself"
        texts.append([str(values[view].data) for view in views])
    clean, first, second = texts[0]
    assert clean == caption and len({clean, first, second}) == 3 and texts[0] == texts[1]


def test_options_are_checked() -> None:
    with pytest.raises(ConfigError, match="synonym needs synonyms"):
        build(WordOptions, {"synonym": 0.5})
    assert build(WordOptions, {"stop_list": ["der"], "synonyms": {"a": ["b"]}}).synonyms == {"a": ("b",)}
    assert len(set(ENGLISH)) == len(ENGLISH)
