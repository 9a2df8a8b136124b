"""Causal towers: no token feels what comes later, padding changes nothing, each token has its patch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mmcl.config import build as build_options
from mmcl.encoders.base import Encoder
from mmcl.encoders.build import build_encoder
from mmcl.encoders.causal import CausalAudioOptions, CausalTextOptions, CausalVideoOptions
from mmcl.model import ModelOptions, MultimodalModel
from mmcl.types import ConfigError, TextSpec

OPTIONS = {
    "video": CausalVideoOptions(width=16, size=16, patch=8, frames=3),
    "audio": CausalAudioOptions(width=16, sample_rate_hz=1000, seconds=0.1, patch_samples=10, bands=4),
    "text": CausalTextOptions(width=16),
}
each = pytest.mark.parametrize("modality", OPTIONS)


def made(modality: str) -> tuple[Encoder, Tensor, Tensor | None]:
    """A tower in float64, two rows for it, and their mask."""
    torch.manual_seed(0)
    tower = build_encoder(OPTIONS[modality]).double()
    if isinstance(tower.spec, TextSpec):
        return tower, *tower.spec.tokenizer(["space invaders", "pong"])
    if modality == "audio":
        return tower, torch.rand(2, 100, dtype=torch.float64) - 0.5, None
    return tower, torch.randint(0, 256, (2, 3, 3, 16, 16), dtype=torch.uint8), None


@each
def test_a_token_feels_its_patch_and_earlier_ones_alone(modality: str) -> None:
    tower, x, mask = made(modality)
    before = tower(x, mask).tokens
    assert before is not None and before.shape[2] == tower.width == 16
    for patch in range(before.shape[1]):
        changed = x.clone()
        if modality == "text":
            changed[0, patch] = 200
        elif modality == "audio":
            changed[0, 10 * patch : 10 * patch + 10] = 0.7
        else:
            frame, row, column = patch // 4, patch % 4 // 2 * 8, patch % 2 * 8
            changed[0, frame, :, row : row + 8, column : column + 8] = 255
        after = tower(changed, mask).tokens
        assert after is not None
        felt = (after != before).any(2)
        assert felt[0].tolist() == [place >= patch for place in range(before.shape[1])]
        assert not felt[1].any(), "rows do not feel each other"


@each
def test_tokens_make_a_grid_and_pooling_is_their_mean(modality: str) -> None:
    tower, x, mask = made(modality)
    features = tower(x, mask)
    assert features.tokens is not None
    if mask is None:
        assert features.grid == {"video": (3, 2, 2), "audio": (10, 1)}[modality]
        torch.testing.assert_close(features.pooled, features.tokens.mean(1))
        return
    longer = torch.cat([x, torch.full((2, 3), 7)], 1)
    padded = tower(longer, torch.cat([mask, torch.zeros(2, 3, dtype=torch.bool)], 1))
    torch.testing.assert_close(padded.pooled, features.pooled)
    for row, length in enumerate(mask.sum(1).tolist()):
        torch.testing.assert_close(features.pooled[row], features.tokens[row, :length].mean(0))


def test_a_model_says_which_towers_are_causal() -> None:
    towers = {
        "a": {"name": "causal_video", "patch": 32},
        "b": {"name": "shared", "tower": "a"},
        "c": {"name": "tiny_text"},
    }
    infos = MultimodalModel(build_options(ModelOptions, {"towers": towers})).tower_infos()
    assert [info.causal_patch for info in infos.values()] == [(1, 32, 32), (1, 32, 32), None]


def test_sizes_that_cannot_be() -> None:
    for tower, message in (
        ({"name": "causal_video", "size": 60}, "size 60 must be a multiple of patch, 16"),
        ({"name": "causal_text", "width": 30}, "width 30 must be a multiple of heads, 4"),
        ({"name": "causal_audio", "seconds": 0.02}, "patch_samples 640 is longer than the window"),
        ({"name": "causal_audio", "bands": 400}, "bands 400 must be at most half of patch_samples, 320"),
    ):
        with pytest.raises(ConfigError, match=message):
            build_options(ModelOptions, {"towers": {"t": tower}})
