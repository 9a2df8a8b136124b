"""Background erasing: what the sheet of its paper promises, and as an augmentation of whole batches."""

from __future__ import annotations

import doctest

import numpy as np
import pytest
import torch

from mmcl.media import augment_video
from mmcl.media.augment import background_erase
from mmcl.media.augmentation import Augmentation, EraseOptions, VideoAugmentation, draw_params
from mmcl.types import VideoSpec, View


def clips() -> torch.Tensor:
    return torch.rand(3, 5, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_identities() -> None:
    video, frames, strength = clips(), torch.tensor([0, 2, 4]), torch.tensor([0.3, 0.1, 1.0])
    before = video.clone()
    out = background_erase(video, frames, strength)
    assert torch.equal(video, before) and out.shape == video.shape and out.dtype == video.dtype
    rows = torch.arange(3)
    torch.testing.assert_close(out[rows, frames], video[rows, frames])
    keep = (1 - strength.double()).view(3, 1, 1, 1, 1)
    torch.testing.assert_close(out.diff(dim=1), keep * video.diff(dim=1), rtol=0, atol=1e-7)
    wanted = keep[:, 0] * video.mean(1) + (1 - keep[:, 0]) * video[rows, frames]
    torch.testing.assert_close(out.mean(1), wanted, rtol=0, atol=1e-7)
    assert torch.equal(background_erase(video, 1, 0.0), video)
    still = video[:, :1].expand_as(video)
    torch.testing.assert_close(background_erase(still, frames, strength), still)
    torch.testing.assert_close(background_erase(video[1], 2, 0.1), out[1], rtol=0, atol=1e-7)


def test_bytes_are_rounded_and_nonsense_refused() -> None:
    video = (clips() * 255).byte()
    out = background_erase(video, 0, 0.5)
    wanted = (video.double() + video[:, :1].double()) / 2
    assert out.dtype == torch.uint8 and (out.double() - wanted).abs().max() <= 0.5
    with pytest.raises(ValueError, match=r"frame_index must lie in 0 … 4, got \[5, 5, 5\]"):
        background_erase(video, 5, 0.1)
    with pytest.raises(ValueError, match="video must be"):
        background_erase(video[0, 0], 0, 0.1)
    assert doctest.testmod(augment_video).failed == 0


def test_as_an_augmentation() -> None:
    options = Augmentation(video=VideoAugmentation(erase=EraseOptions(probability=0.7, strength=(0.1, 0.3))))
    view = View(VideoSpec(frames=5, size=4), augmentation="erase")
    rows = [draw_params(options, view, (1, 2, key)) for key in range(400)]
    params = {name: torch.from_numpy(np.stack([row[name] for row in rows])) for name in rows[0]}
    strength, frames = params["erase_strength"], params["erase_frame"]
    assert float((strength > 0).float().mean()) == pytest.approx(0.7, abs=0.07)
    assert ((strength == 0) | ((strength >= 0.1) & (strength <= 0.3))).all()
    assert frames.bincount().tolist() == pytest.approx([80] * 5, abs=30)
    video = (clips() * 255).byte()
    out = augment_video.augment_video(video, {name: value[:3] for name, value in params.items()}, size=4)
    assert torch.equal(out, background_erase(video, frames[:3], strength[:3]))
