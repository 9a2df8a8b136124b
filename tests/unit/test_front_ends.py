"""Front ends give what the library's own feature extractors give; windows are cropped, repeated and fused as said."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    ASTFeatureExtractor,
    ClapFeatureExtractor,
    Wav2Vec2FeatureExtractor,
    WhisperFeatureExtractor,
)

from mmcl.encoders.front_ends import (
    AstFrontEnd,
    ClapFrontEnd,
    WaveFrontEnd,
    WhisperFrontEnd,
    fitted,
    sounding,
    thirds,
)


def wave(samples: int, seed: int = 0) -> np.ndarray:
    """A gliding tone with a beat in soft noise, in [−1, 1]."""
    time = np.arange(samples) / 16_000
    noise = np.random.default_rng(seed).standard_normal(samples)
    tone = np.sin(2 * np.pi * (200 + 700 * time) * time) * (1 + np.sin(9 * time)) / 2
    return (0.7 * tone + 0.02 * noise).clip(-1, 1).astype(np.float32)


def ours(front: Any, sound: np.ndarray, policy: Any) -> torch.Tensor:
    """A batch of the sound and of a longer one, so that nothing depends on the neighbour; its first row."""
    rows = torch.zeros(2, max(len(sound), front.samples))
    rows[0, : len(sound)] = torch.from_numpy(sound)
    rows[1] = torch.from_numpy(wave(rows.shape[1], seed=1))
    return front(*fitted(rows, sounding(rows, None), front.samples, policy))[0]


@pytest.mark.parametrize("seconds", [0.7, 2.56])
def test_ast_sees_kaldis_filter_banks(seconds: float) -> None:
    extractor = ASTFeatureExtractor(max_length=256)
    sound = wave(round(16_000 * seconds))
    theirs = extractor(sound, sampling_rate=16_000, return_tensors="pt")["input_values"][0]
    front = AstFrontEnd(extractor)
    assert front.samples == 40_960 and AstFrontEnd(ASTFeatureExtractor()).samples == round(10.24 * 16_000)
    torch.testing.assert_close(ours(front, sound, "crop"), theirs, rtol=0, atol=2e-4)


@pytest.mark.parametrize("seconds", [3.1, 30.0])
def test_whisper_sees_its_log_mel(seconds: float) -> None:
    extractor = WhisperFeatureExtractor()
    sound = wave(round(16_000 * seconds))
    theirs = extractor(sound, sampling_rate=16_000, return_tensors="pt")["input_features"][0]
    torch.testing.assert_close(ours(WhisperFrontEnd(extractor, 3000), sound, "crop"), theirs, rtol=0, atol=2e-4)


@pytest.mark.parametrize("truncation", ["rand_trunc", "fusion"])
def test_clap_sees_its_log_mel_of_a_repeated_wave(truncation: str) -> None:
    extractor = ClapFeatureExtractor(frequency_min=50, max_length_s=2, truncation=truncation)
    sound = wave(30_000)
    theirs = extractor(sound, sampling_rate=48_000, return_tensors="pt")["input_features"][0].float()
    front = ClapFrontEnd(extractor, fuses=truncation == "fusion")
    torch.testing.assert_close(ours(front, sound, "repeat-pad"), theirs, rtol=0, atol=5e-3)  # decibels


def test_clap_fuses_as_its_library_does(monkeypatch: pytest.MonkeyPatch) -> None:
    extractor = ClapFeatureExtractor(frequency_min=50, max_length_s=1)
    sound = wave(150_000)
    monkeypatch.setattr(np.random, "choice", lambda places: places[len(places) // 2])
    theirs = extractor(sound, sampling_rate=48_000, return_tensors="pt")["input_features"][0].float()
    rows = torch.from_numpy(sound)[None]
    mel = ClapFrontEnd(extractor, fuses=True)(rows, sounding(rows, None))[0]
    assert mel.shape == (4, 101, 64)
    torch.testing.assert_close(mel, theirs, rtol=0, atol=5e-3)


@pytest.mark.parametrize("normalise", [True, False])
def test_wav2vec_normalises_what_sounds(normalise: bool) -> None:
    extractor = Wav2Vec2FeatureExtractor(do_normalize=normalise, return_attention_mask=True)
    sounds = [wave(9_000), wave(16_000, seed=1)]
    theirs = extractor(sounds, sampling_rate=16_000, padding=True, return_tensors="pt")["input_values"]
    front = WaveFrontEnd(extractor, 16_000)
    torch.testing.assert_close(ours(front, sounds[0], "crop"), theirs[0], rtol=0, atol=1e-5)


def test_nothing_is_lost_under_autocast() -> None:
    extractor = WhisperFeatureExtractor()
    rows = torch.from_numpy(wave(16_000))[None]
    front = WhisperFrontEnd(extractor, 100)
    plain = front(rows, sounding(rows, None))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(front(rows, sounding(rows, None)), plain)


def test_a_row_ends_where_padding_begins() -> None:
    rows = torch.tensor([[1.0, 0.0, 2.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0, 1.0]])
    assert sounding(rows, None).tolist() == [3, 1, 5]
    assert sounding(rows, torch.arange(5) < torch.tensor([[4], [2], [5]])).tolist() == [4, 2, 5]


def test_windows_of_other_lengths() -> None:
    rows = torch.tensor([[1.0, 2.0, 3.0, 0.0, 0.0, 0.0], [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]])
    lengths = sounding(rows, None)
    assert fitted(rows, lengths, 4, "crop")[0].tolist() == [[1, 2, 3, 0], [2, 3, 4, 5]]
    assert fitted(rows, lengths, 7, "crop")[0].tolist() == [[1, 2, 3, 0, 0, 0, 0], [1, 2, 3, 4, 5, 6, 0]]
    repeated, kept = fitted(rows, lengths, 7, "repeat-pad")
    assert repeated.tolist() == [[1, 2, 3, 1, 2, 3, 0], [1, 2, 3, 4, 5, 6, 0]] and kept.tolist() == [6, 6]
    assert thirds(rows[1:], 2).tolist() == [[[1, 2], [3, 4], [5, 6]]]
