"""Audio towers: every one trains all of its weights on two rows, neighbours and padding change nothing, frozen batch
norms keep their bits, and those of transformers give what their library gives from its own files.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support.towers import build_tower, gradients_missing
from torch import nn

from mmcl.encoders import packages
from mmcl.encoders.norms import FrozenBatchNorm
from mmcl.types import ConfigError

SMALL: dict[str, dict[str, Any]] = {
    "audio-spectrogram-transformer": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "max_length": 64,
        "num_mel_bins": 32,
    },
    "clap_audio_model": {
        "patch_embeds_hidden_size": 8,
        "depths": [1, 1],
        "num_attention_heads": [1, 2],
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "spec_size": 128,
        "num_mel_bins": 64,
    },
    "whisper": {
        "d_model": 32,
        "encoder_layers": 2,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": 32,
        "decoder_layers": 1,
        "decoder_attention_heads": 2,
        "decoder_ffn_dim": 32,
        "max_source_positions": 50,
        "vocab_size": 32,
        "pad_token_id": 0,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "decoder_start_token_id": 0,
    },
    "wav2vec2": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "conv_dim": [8, 8],
        "conv_stride": [10, 8],
        "conv_kernel": [10, 8],
        "num_feat_extract_layers": 2,
        "num_conv_pos_embeddings": 16,
        "num_conv_pos_embedding_groups": 2,
        "feat_extract_norm": "layer",
        "do_stable_layer_norm": True,
    },
}
FRONTS: dict[str, Any] = {
    "audio-spectrogram-transformer": ("ASTModel", "ASTFeatureExtractor", {"num_mel_bins": 32, "max_length": 64}),
    "clap_audio_model": (
        "ClapAudioModel",
        "ClapFeatureExtractor",
        {"max_length_s": 2, "frequency_min": 50, "truncation": "rand_trunc"},
    ),
    "whisper": ("WhisperModel", "WhisperFeatureExtractor", {"chunk_length": 1}),
    "wav2vec2": ("Wav2Vec2Model", "Wav2Vec2FeatureExtractor", {"return_attention_mask": True}),
}
OWN = {
    "cnn14": {"channels": 8, "seconds": 1.3, "norm": "frozen"},
    "cnn14-rank": {"channels": 8, "seconds": 1.3},
    "resnet_mel": {"channels": 8, "depths": (1, 1), "seconds": 1.0},
    "sfx_cnn": {"blocks": 1},
}


def folder_of(kind: str, root: Path, **more: Any) -> tuple[str, Any, Any]:
    """A model as its library saves it, with its feature extractor: (the tower's name, the model, the extractor)."""
    model_class, front_class, told = FRONTS[kind]
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **SMALL[kind], **more)
    model = getattr(transformers, model_class)(config).eval()
    for norm in (part for part in model.modules() if isinstance(part, nn.BatchNorm2d)):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2.0)
    extractor = getattr(transformers, front_class)(**told)
    model.save_pretrained(root)
    extractor.save_pretrained(root)
    return f"hf:{root}", model, extractor


def waves(tower: Any, rows: int = 2) -> torch.Tensor:
    time = torch.arange(tower.spec.samples) / tower.spec.sample_rate_hz
    tones = torch.tensor([220.0, 1500.0, 4000.0])[:rows, None]
    noise = torch.rand(rows, tower.spec.samples, generator=torch.Generator().manual_seed(0))
    return 0.5 * torch.sin(2 * torch.pi * tones * time) + 0.1 * (noise - 0.5)


def make(kind: str, root: Path) -> Any:
    torch.manual_seed(0)
    if kind in OWN:
        return build_tower(name=kind.partition("-")[0], **OWN[kind])
    return build_tower(name=folder_of(kind, root)[0], **({"seconds": 0.8} if kind == "wav2vec2" else {}))


@pytest.mark.parametrize("kind", [*SMALL, *OWN])
def test_two_rows_train_every_weight(kind: str, tmp_path: Path) -> None:
    tower = make(kind, tmp_path)
    x = waves(tower)
    features = tower.train()(x)
    assert features.pooled.shape == (2, tower.width) and features.tokens.shape[::2] == (2, tower.width)
    count = 1
    for size in features.grid:
        count *= size
    assert features.tokens.shape[1] == count and tower.spec.modality == "audio"
    assert not torch.allclose(features.pooled[0], features.pooled[1])
    assert gradients_missing(tower, x) == []
    blocks = tower.blocks()
    assert len(blocks) >= 3 and all(any(True for _ in block.parameters()) for block in blocks)


@pytest.mark.parametrize("kind", [*SMALL, "cnn14", "resnet_mel", "sfx_cnn"])
def test_neighbours_change_nothing(kind: str, tmp_path: Path) -> None:
    tower = make(kind, tmp_path).train()  # frozen norms do not look at the batch in training either
    x = waves(tower)
    torch.testing.assert_close(tower(x[:1]).pooled[0], tower(x).pooled[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [*SMALL, "sfx_cnn"])
@pytest.mark.parametrize("masked", [False, True])
def test_padding_changes_nothing(kind: str, masked: bool, tmp_path: Path) -> None:
    """A short wave in its window, with more padding after it, is the same wave; so is one that a mask ends."""
    tower = make(kind, tmp_path).eval()
    if kind == "clap_audio_model":
        assert tower.policy == "repeat-pad"
    end = tower.spec.samples // 2
    x = waves(tower)[:, :end]
    padded = nn.functional.pad(x, (0, tower.spec.samples - end))
    mask = (torch.arange(tower.spec.samples) < end).expand(2, -1)
    if masked:
        padded = padded.masked_fill(~mask, 0.3)
    again = tower(padded, mask if masked else None)
    torch.testing.assert_close(again.pooled, tower(x).pooled, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["clap_audio_model", "cnn14", "sfx_cnn"])
def test_frozen_batch_norm_keeps_its_bits(kind: str, tmp_path: Path) -> None:
    tower = make(kind, tmp_path).train()
    norms = [part for part in tower.modules() if isinstance(part, FrozenBatchNorm)]
    assert norms and not any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in tower.modules())
    before = [(norm.running_mean.clone(), norm.running_var.clone()) for norm in norms]
    optimizer = torch.optim.SGD(tower.parameters(), lr=1e-3)
    for _ in range(5):
        tower(waves(tower)).pooled.square().mean().backward()
        optimizer.step()
    for norm, (mean, variance) in zip(norms, before, strict=True):
        assert torch.equal(norm.running_mean, mean) and torch.equal(norm.running_var, variance)


@pytest.mark.parametrize("kind", [*(kind for kind in SMALL if kind != "wav2vec2"), *OWN])
def test_front_ends_run_where_the_weights_are(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device that computes nothing: whatever lies on the CPU instead is refused."""
    monkeypatch.setattr(torch, "autocast", lambda *told, **more: nullcontext())  # which that device does not have
    tower = make(kind, tmp_path).to("meta")
    features = tower(torch.zeros(2, tower.spec.samples, device="meta"))
    assert features.pooled.device.type == features.tokens.device.type == "meta"
    assert features.pooled.shape == (2, tower.width)


@pytest.mark.parametrize("kind", SMALL)
def test_published_weights_give_what_their_library_gives(kind: str, tmp_path: Path) -> None:
    """Front end, names of weights and pooling in one: their extractor and model against our tower, on a short wave."""
    name, model, extractor = folder_of(kind, tmp_path)
    tower = build_tower(name=name, **({"seconds": 0.5} if kind == "wav2vec2" else {}))
    from safetensors.torch import load_file

    tensors = tower.foreign(load_file(tmp_path / "model.safetensors"))
    assert tower.load_state_dict(tensors, strict=False).missing_keys == []
    assert tower.foreign(tower.state_dict()).keys() == tower.state_dict().keys()
    x = waves(tower, 1)[:, : tower.spec.samples * 3 // 4]
    inputs = extractor(x[0].numpy(), sampling_rate=tower.spec.sample_rate_hz, return_tensors="pt")
    inputs = {key: value.float() if value.is_floating_point() else value for key, value in inputs.items()}
    with torch.no_grad():
        if kind == "whisper":
            tokens = model.get_encoder()(**inputs).last_hidden_state
            theirs = tokens[:, : -(-x.shape[1] // 320)].mean(1)
        else:
            found = model(**inputs)
            theirs = found.last_hidden_state.mean(1) if kind == "wav2vec2" else found.pooler_output
        features = tower.eval()(x)
        torch.testing.assert_close(features.pooled, theirs, rtol=1e-3, atol=1e-3)
        if kind == "audio-spectrogram-transformer":  # its tokens run along time first, ours along frequency
            time, bands = features.grid
            tokens = found.last_hidden_state[0, 2:].unflatten(0, (bands, time))
            torch.testing.assert_close(features.tokens[0, 3 * bands + 1], tokens[1, 3], rtol=1e-3, atol=1e-3)
        if kind == "clap_audio_model":
            time, bands = features.grid
            maps = found.last_hidden_state[0]
            torch.testing.assert_close(features.tokens[0, 3 * bands + 1], maps[:, 1, 3], rtol=1e-3, atol=1e-3)


def test_weights_of_another_shape_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    name, _, _ = folder_of("audio-spectrogram-transformer", tmp_path)
    tower = build_tower(name=name, config={"intermediate_size": 48})
    with pytest.raises(ConfigError, match=r"does not fit: .*(32|48)"):
        tower.foreign(load_file(tmp_path / "model.safetensors"))


def test_long_audio_is_fused(tmp_path: Path) -> None:
    name, _, _ = folder_of("audio-spectrogram-transformer", tmp_path / "ast")
    kept, fused = (build_tower(name=name, seconds=2.0, long_audio=how).eval() for how in ("crop", "fuse"))
    fused.load_state_dict(kept.state_dict())
    x = waves(kept)
    window = kept.front.samples
    assert x.shape[1] == 32_000 and window == 10_240
    middle = (32_000 - window) // 2
    torch.testing.assert_close(kept(x).pooled, kept(x[:, middle : middle + window]).pooled)
    thirds = [kept(x[:, start : start + window]) for start in (0, middle, 32_000 - window)]
    features = fused(x)
    torch.testing.assert_close(features.pooled, torch.stack([part.pooled for part in thirds]).mean(0))
    torch.testing.assert_close(features.tokens, torch.cat([part.tokens for part in thirds], 1))


@pytest.mark.parametrize("long", [True, False])
def test_clap_with_fusion_trains_what_it_uses(long: bool, tmp_path: Path) -> None:
    more = {"enable_fusion": True, "fusion_type": "aff_2d"}
    name, model, _ = folder_of("clap_audio_model", tmp_path, **more)
    transformers.ClapFeatureExtractor(max_length_s=2, frequency_min=50).save_pretrained(tmp_path)
    tower = build_tower(name=name, **({"seconds": 5.0, "long_audio": "fuse"} if long else {}))
    names = {name for name, parameter in tower.named_parameters() if not parameter.requires_grad}
    assert any("fusion_model" in name for name in names) is not long
    assert gradients_missing(tower, waves(tower)) == []
    if long:
        tower.load_state_dict(tower.foreign(model.state_dict()), strict=False)
        x = waves(tower)
        with torch.no_grad():
            mel = tower.front(x, torch.full((2,), x.shape[1]))
            theirs = model(mel, is_longer=torch.ones(2, 1, dtype=torch.bool)).pooler_output
            torch.testing.assert_close(tower.eval()(x).pooled, theirs, rtol=1e-3, atol=1e-3)


def test_strangers_and_what_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'whisper'"):
        build_tower(name="hf:whispr", modality="audio")
    with pytest.raises(ConfigError, match="unknown name 'hf:bert'"):
        build_tower(name="hf:bert", modality="audio")
    with pytest.raises(ConfigError, match=r"encoder_layrs.*encoder_layers"):
        build_tower(name="hf:whisper", config={**SMALL["whisper"], "encoder_layrs": 3})
    with pytest.raises(ConfigError, match="long_audio"):
        build_tower(name="hf:wav2vec2", config=SMALL["wav2vec2"], long_audio="fuse")
    assert packages.PACKAGES["aisfx"].tower == "sfx_cnn"
