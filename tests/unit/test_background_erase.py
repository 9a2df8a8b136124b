"""Background erasing: what the sheet of its paper promises, and as an augmentation of whole batches."""

from __future__ import annotations

import doctest
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from mmcl.data import ClipStream
from mmcl.media import augment_video
from mmcl.media.augment import augment, background_erase
from mmcl.media.augmentation import Augmentation, EraseOptions, VideoAugmentation
from mmcl.media.augmentation_draws import draw_params
from mmcl.shards import load_manifest
from mmcl.types import Batch, ConfigError, Erase, VideoSpec, View


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


def test_before_or_after_normalisation_is_the_same() -> None:
    """… where that is affine and the same for all frames."""
    video, frames, strength = clips(), torch.tensor([1, 4, 0]), torch.tensor([0.3, 0.2, 0.1])
    mean, std = (torch.rand(3, 1, 1, generator=torch.Generator().manual_seed(i), dtype=torch.float64) for i in (1, 2))
    normalised = background_erase((video - mean) / std, frames, strength)
    torch.testing.assert_close(normalised, (background_erase(video, frames, strength) - mean) / std)


# --- as what a view asks for ------------------------------------------------------------------------------------------

SPEC = VideoSpec(frames=4, size=32, fps=8.0)
STRONG = Augmentation(video=VideoAugmentation(flip=0.5, grey=0.5))


def batches(folder: Path, *views: View, count: int = 2, **options: object) -> list[Batch]:
    given = {"augmentations": {"strong": STRONG}, "seed": 5, "in_process": True, "global_batch": 6, **options}
    source = ClipStream(load_manifest(str(folder)), views=views, **given)  # type: ignore[arg-type]
    return list(itertools.islice(iter(source), count))


def test_an_erased_view_is_the_view_erased_and_nothing_else_changes(shards_folder: Path) -> None:
    plain = View(SPEC, augmentation="strong")
    view = View(SPEC, augmentation="strong", erase=Erase((0.4, 0.9)))
    batch = batches(shards_folder / "train", plain, view)[0]
    before = {each: batch.views[each].data.clone() for each in (plain, view)}
    done = augment(batch)
    assert all(torch.equal(batch.views[each].data, before[each]) for each in (plain, view)), (
        "nothing is changed in place"
    )
    assert torch.equal(before[plain], before[view])
    params = batch.views[view].params
    assert ((params["erase_strength"] >= 0.4) & (params["erase_strength"] <= 0.9)).all()
    assert len(params["erase_strength"].unique()) > 3 and len(params["erase_frame"].unique()) > 1
    wanted = background_erase(done.views[plain].data, params["erase_frame"], params["erase_strength"])
    found, alone = done.views[view].data.int(), done.views[plain].data
    assert (found - wanted.int()).abs().max() <= 1, "the same flip and grey, then erased"
    rows = torch.arange(len(alone))
    assert torch.equal(done.views[view].data[rows, params["erase_frame"]], alone[rows, params["erase_frame"]])
    assert (found - alone.int()).abs().max() > 5
    assert "erase_strength" not in batch.views[plain].params


def test_one_strength_per_batch_is_that_of_the_whole_batch(shards_folder: Path) -> None:
    view = View(SPEC, erase=Erase((0.0, 0.3), per="batch"))
    wholes = batches(shards_folder / "train", view, count=3)
    strengths = [whole.views[view].params["erase_strength"] for whole in wholes]
    assert all(len(strength.unique()) == 1 for strength in strengths)
    assert len({float(strength[0]) for strength in strengths}) == 3
    assert len(wholes[0].views[view].params["erase_frame"].unique()) > 1, "frames are drawn for each clip"
    for rank in range(2):
        parts = batches(shards_folder / "train", view, count=3, rank=rank, world_size=2)
        for part, whole in zip(parts, wholes, strict=True):
            for name, values in whole.views[view].params.items():
                assert torch.equal(part.views[view].params[name], values[rank::2]), name


def test_erasing_twice_is_refused(shards_folder: Path) -> None:
    options = {"strong": Augmentation(video=VideoAugmentation(erase=EraseOptions()))}
    with pytest.raises(ConfigError, match=r"data\.augmentations\.strong\.video\.erase: the objective erases"):
        batches(shards_folder / "train", View(SPEC, augmentation="strong", erase=Erase()), augmentations=options)
