"""Augmentation of waves and of tokens: what parameters say is what happens."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mmcl.hashing import uniform
from mmcl.media import augment_tokens
from mmcl.media.augment_audio import augment_audio, silence_bands
from mmcl.media.augmentation import AudioAugmentation, Augmentation
from mmcl.media.augmentation_draws import draw_params
from mmcl.media.device_hash import device_uniform
from mmcl.media.text import ByteTokenizer
from mmcl.types import AudioSpec, View

RATE = 8000
AUDIO = View(AudioSpec(sample_rate_hz=RATE, seconds=0.05), augmentation="strong")
STRONG = Augmentation(
    audio=AudioAugmentation(gain_db=(-6, 6), shift_seconds=0.01, time_masks=2, time_mask_seconds=0.02)
)


def drawn(options: Augmentation, rows: int) -> dict[str, torch.Tensor]:
    draws = [draw_params(options, AUDIO, (1, 2, key)) for key in range(rows)]
    return {name: torch.from_numpy(np.stack([row[name] for row in draws])) for name in draws[0]}


def noise(rows: int, samples: int = 400) -> torch.Tensor:
    return torch.rand(rows, samples, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_waves_against_a_loop() -> None:
    waves, params = noise(6), drawn(STRONG, 6)
    after = augment_audio(waves, params, sample_rate_hz=RATE)
    for row in range(6):
        wave = waves[row].numpy()
        gain, shift = float(params["gain"][row]), int(params["shift_samples"][row])
        assert 0.5 <= gain <= 2.0 and -80 <= shift <= 80
        wanted = np.zeros_like(wave)
        for i in range(len(wave)):
            if 0 <= i - shift < len(wave):
                wanted[i] = np.clip(wave[i - shift] * np.float32(gain), -1, 1)
        for start, length in params["time_masks"][row].tolist():
            assert 0 <= length <= 160 and 0 <= start <= 400 - length
            wanted[start : start + length] = 0
        assert np.array_equal(after[row].numpy(), wanted)
    assert torch.equal(augment_audio(waves, {}, sample_rate_hz=RATE), waves)


def test_a_masked_band_is_silent_and_the_rest_is_not() -> None:
    times = torch.arange(RATE) / RATE
    tones = {hertz: torch.sin(2 * torch.pi * hertz * times) * 0.2 for hertz in (300, 1000, 3000)}
    waves = sum(tones.values()).expand(2, -1)  # type: ignore[union-attr]
    bands = torch.tensor([[[900.0, 1100.0]], [[0.0, 0.0]]])
    masked = silence_bands(waves, bands, sample_rate_hz=RATE)
    assert torch.allclose(masked[0], tones[300] + tones[3000], atol=1e-4)
    assert torch.equal(masked[1], waves[1])


def test_bands_lie_on_the_mel_scale_and_fill_it() -> None:
    options = Augmentation(audio=AudioAugmentation(frequency_masks=2, frequency_mask_width=0.25))
    bands = drawn(options, 300)["frequency_masks"].double()
    mels = 2595 * torch.log10(1 + bands / 700)
    top = 2595 * np.log10(1 + RATE / 2 / 700)
    widths = mels[..., 1] - mels[..., 0]
    assert bands.shape == (300, 2, 2) and (bands >= 0).all() and (bands <= RATE / 2 + 1e-2).all()
    assert (widths <= 0.25 * top + 0.1).all() and widths.mean() == pytest.approx(0.125 * top, rel=0.1)
    assert mels[..., 0].min() < 0.05 * top and mels[..., 1].max() > 0.95 * top


# tokens


def test_the_hash_of_the_device_is_our_hash() -> None:
    seeds = torch.tensor([0, 1, -5, 2**62, -(2**63)])
    ours = augment_tokens._uniform(seeds[:, None], 3, 7)
    assert np.array_equal(ours.numpy(), uniform(seeds.numpy()[:, None], 3, np.arange(7)))
    three = device_uniform(5, seeds, 2)
    assert np.array_equal(three.numpy(), uniform(5, seeds.numpy(), 2))


def tokens(text: str, rows: int, special: tuple[int, ...] = (), **chances: float) -> list[list[int]]:
    ids, mask = ByteTokenizer(64)([text] * rows)
    params = {name: torch.full((rows,), chance) for name, chance in chances.items()}
    params["token_seed"] = torch.arange(rows) * 7919
    out, kept, _ = augment_tokens.augment_tokens(ids, mask, params, mask_id=999, special_ids=special)
    assert (out[~kept] == 0).all() and kept.any(1).all()
    assert (kept.int().diff(dim=1) <= 0).all(), "tokens stand together"
    return [row[keep].tolist() for row, keep in zip(out, kept, strict=True)]


TEXT_IDS = [ord(c) + 1 for c in "abcdefghij"]


def test_token_deletion_keeps_order() -> None:
    rows = tokens("abcdefghij", 400, token_delete=0.3)
    for row in rows:
        assert row == [number for number in TEXT_IDS if number in row]
    assert np.mean([len(row) for row in rows]) == pytest.approx(7.0, abs=0.25)
    assert all(len(row) == 1 for row in tokens("abcdefghij", 50, token_delete=1.0))
    assert tokens("", 3, token_delete=1.0) == [[0]] * 3


def test_token_masks() -> None:
    rows = np.array(tokens("abcdefghij", 400, token_mask=0.25))
    assert (rows == 999).mean() == pytest.approx(0.25, abs=0.03)
    assert ((rows == 999) | (rows == TEXT_IDS)).all()


def test_token_swaps_are_of_neighbours() -> None:
    rows = np.array(tokens("abcdefghij", 600, token_swap=0.5))
    assert (np.sort(rows, axis=1) == TEXT_IDS).all()
    assert np.abs(rows - TEXT_IDS).max() == 1
    # a row of ten has five pairs or, where they start at the second token, four
    assert (rows != TEXT_IDS).mean() == pytest.approx(0.45, abs=0.04)


def test_special_tokens_keep_their_place() -> None:
    first, last = TEXT_IDS[0], TEXT_IDS[-1]
    for row in tokens("abcdefghij", 200, (first, last), token_swap=0.5, token_delete=0.5, token_mask=0.5):
        assert row[0] == first and row[-1] == last and 3 <= len(row) <= 10
