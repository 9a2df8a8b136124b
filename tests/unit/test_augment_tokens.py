"""Masked tokens as BERT wants them: which they were is told, some show a random token, some themselves."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from mmcl.media import augment_tokens
from mmcl.media.augment import augment
from mmcl.media.augmentation import Augmentation, check_views
from mmcl.media.text import ByteTokenizer
from mmcl.types import Batch, ConfigError, TextSpec, View, ViewBatch


def test_masked_tokens_are_told_and_some_are_random_or_kept() -> None:
    """BERT's 80/10/10, of 4,000 tokens of which half are masked; random ones are tokens of the vocabulary."""
    chances = {"token_mask": 0.5, "token_mask_random": 0.1, "token_mask_keep": 0.1}
    view = View(TextSpec(ByteTokenizer(64)), augmentation="strong")
    ids, mask = view.spec.tokenizer(["abcdefghij"] * 400 + ["abc", ""])
    params = {name: torch.full((402,), chance) for name, chance in chances.items()}
    params["token_seed"] = torch.arange(402) * 7919
    present = torch.arange(402) < 401
    batch = Batch({view: ViewBatch(ids, present, mask, params)}, ("",) * 402, *(torch.zeros(402),) * 3)
    after = augment(batch).views[view]
    targets = after.params["token_targets"]
    chosen = targets >= 0
    assert torch.equal(targets[chosen], ids[chosen]) and torch.equal(after.data[~chosen], ids[~chosen])
    assert not (chosen & ~mask).any() and not chosen[401].any(), "padding and absent rows have no targets"
    shown = after.data[chosen]
    kept, blank = (shown == targets[chosen]).float().mean(), (shown == 0).float().mean()
    assert float(chosen[:400].float().mean()) == pytest.approx(0.5, abs=0.04)
    assert float(kept) == pytest.approx(0.1, abs=0.03) and float(blank) == pytest.approx(0.8, abs=0.04)
    strange = shown[(shown != targets[chosen]) & (shown != 0)]
    assert len(strange.unique()) > 100 and int(strange.min()) >= 1 and int(strange.max()) <= 256
    whole = after.data[0]
    cut = {name: value[:1] for name, value in params.items()}
    wide = torch.nn.functional.pad(ids[:1], (0, 5)), torch.nn.functional.pad(mask[:1], (0, 5))
    again, _, _ = augment_tokens.augment_tokens(*wide, cut, vocabulary=257)
    assert torch.equal(again[0, :10], whole), "padding changes nothing"


class Uncounted:
    mask_id = 1

    def __call__(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        return ByteTokenizer()(texts)


def test_a_tokenizer_that_does_not_say_its_vocabulary_draws_no_random_tokens() -> None:
    text = {"strong": Augmentation(text={"mask": 0.15, "mask_random": 0.1})}
    with pytest.raises(ConfigError, match=r"data\.augmentations\.strong\.text\.mask_random: 0.1, but.*vocabulary"):
        check_views([View(TextSpec(Uncounted()), augmentation="strong")], text, path="data.augmentations")
    with pytest.raises(ValueError, match=r"mask_random 0\.7 and mask_keep 0\.4 exceed 1"):
        Augmentation(text={"mask": 0.15, "mask_random": 0.7, "mask_keep": 0.4})
    with pytest.raises(ValueError, match="shares of mask, which is 0"):
        Augmentation(text={"mask_keep": 0.4})
