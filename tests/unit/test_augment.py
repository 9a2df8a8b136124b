"""Augmentation: what parameters say is what happens, to every frame of a row alike, whatever rows stand beside it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as tv
from hypothesis import given, settings
from hypothesis import strategies as st

from mmcl.media import augment_video
from mmcl.media.augment import augment
from mmcl.media.augmentation import (
    AudioAugmentation,
    Augmentation,
    BlurOptions,
    CropOptions,
    JitterOptions,
    RotationOptions,
    TextAugmentation,
    VideoAugmentation,
    check_views,
)
from mmcl.media.augmentation_draws import draw_params
from mmcl.media.text import ByteTokenizer
from mmcl.types import AudioSpec, Batch, ConfigError, TextSpec, VideoSpec, View, ViewBatch

ROWS, FRAMES, SIZE = 5, 3, 40

STRONG = Augmentation(
    video=VideoAugmentation(
        crop=CropOptions(area=(0.2, 0.766)),
        flip=0.5,
        rotation=RotationOptions(degrees=30),
        jitter=JitterOptions(brightness=0.6, contrast=0.6, saturation=0.6, hue=0.15),
        grey=0.2,
        blur=BlurOptions(),
    ),
    audio=AudioAugmentation(gain_db=(-6, 6), shift_seconds=0.01, time_masks=2, time_mask_seconds=0.02),
    text=TextAugmentation(swap=0.3, delete=0.3, mask=0.3),
)
VIDEO = View(VideoSpec(frames=FRAMES, size=SIZE), augmentation="strong")
AUDIO = View(AudioSpec(sample_rate_hz=8000, seconds=0.05), augmentation="strong")
TEXT = View(TextSpec(ByteTokenizer(32)), augmentation="strong")


def pictures(rows: int = ROWS, size: int = SIZE, *, seed: int = 0) -> torch.Tensor:
    """uint8 ``(B, T, 3, H, W)``: noise on slopes, so that both edges and level count."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(rows, FRAMES, 3, size, size, generator=generator) * 120
    slope = torch.linspace(0, 130, size)
    return (noise + slope + slope[:, None] / 30 * torch.rand(rows, FRAMES, 3, 1, 1, generator=generator)).byte()


def stacked(view: View, keys: list[int]) -> dict[str, torch.Tensor]:
    rows = [draw_params(STRONG, view, (1, 2, key)) for key in keys]
    return {name: torch.from_numpy(np.stack([row[name] for row in rows])) for name in rows[0]}


def batch_of(keys: list[int]) -> Batch:
    """Rows whose content follows from their key alone."""
    frames = torch.cat([pictures(1, seed=key) for key in keys])
    waves = torch.stack([torch.rand(400, generator=torch.Generator().manual_seed(key)) * 2 - 1 for key in keys])
    ids, mask = TEXT.spec.tokenizer([f"{key} a dog barks at the {'tall ' * (key % 4)}tree" for key in keys])
    present = torch.ones(len(keys), dtype=torch.bool)
    return Batch(
        views={
            VIDEO: ViewBatch(frames, present, params=stacked(VIDEO, keys)),
            AUDIO: ViewBatch(waves, present, params=stacked(AUDIO, keys)),
            TEXT: ViewBatch(ids, present, mask, stacked(TEXT, keys)),
        },
        keys=tuple(map(str, keys)),
        draws=torch.arange(len(keys)),
        groups=torch.zeros(len(keys), 3, dtype=torch.int64),
        labels=torch.zeros(len(keys), dtype=torch.int64),
    )


def close(ours: torch.Tensor, reference: torch.Tensor, *, levels: float = 1.0) -> None:
    """uint8 against a reference in [0, 255] before rounding."""
    assert ours.dtype == torch.uint8
    assert (ours.double() - reference.double()).abs().max() <= levels


# each transform against torchvision's, row by row and frame by frame


def apply(frames: torch.Tensor, size: int = SIZE, **params: torch.Tensor) -> torch.Tensor:
    return augment_video.augment_video(frames, params, size=size)


def reference(frames: torch.Tensor, function) -> torch.Tensor:  # type: ignore[no-untyped-def]
    return torch.stack([torch.stack([function(i, f.float() / 255) for f in row]) for i, row in enumerate(frames)]) * 255


@pytest.mark.parametrize("size", [SIZE, 16, 57])
def test_crop_and_flip(size: int) -> None:
    frames = pictures()
    boxes = torch.tensor([[0, 0, 40, 40], [3, 5, 11, 17], [20, 0, 20, 40], [39, 39, 1, 1], [1, 2, 38, 3]])
    flips = torch.tensor([True, False, True, False, True])

    def one(i: int, picture: torch.Tensor) -> torch.Tensor:
        cut = tv.resized_crop(picture, *boxes[i].tolist(), size=[size, size], antialias=True)
        return tv.horizontal_flip(cut) if flips[i] else cut

    close(apply(frames, size, crop_box=boxes, flip=flips), reference(frames, one), levels=0.51)


def test_the_whole_picture_is_left_as_it_is() -> None:
    frames = pictures()
    whole = torch.tensor([[0, 0, SIZE, SIZE]]).expand(ROWS, 4)
    assert torch.equal(apply(frames, crop_box=whole), frames)
    neutral = {name: torch.ones(ROWS) for name in ("brightness", "contrast", "saturation")}
    neutral.update({name: torch.zeros(ROWS) for name in ("hue", "rotation_degrees", "blur_sigma")})
    assert torch.equal(apply(frames, grey=torch.zeros(ROWS, dtype=torch.bool), **neutral), frames)
    assert apply(frames) is frames


def test_a_picture_decoded_larger_comes_out_in_the_size_of_the_view() -> None:
    frames = pictures(size=60)
    wanted = reference(frames, lambda _, picture: tv.resize(picture, [SIZE, SIZE], antialias=True))
    close(apply(frames), wanted, levels=0.51)


def test_rotation() -> None:
    degrees = torch.tensor([0.0, 10.0, -33.0, 90.0, 179.0])
    wanted = reference(
        pictures(), lambda i, x: tv.rotate(x, float(degrees[i]), interpolation=tv.InterpolationMode.BILINEAR)
    )
    close(apply(pictures(), rotation_degrees=degrees), wanted)


FACTORS = torch.tensor([0.0, 0.4, 1.0, 1.3, 2.5])


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation"])
def test_factors(name: str) -> None:
    function = getattr(tv, f"adjust_{name}")
    wanted = reference(pictures(), lambda i, picture: function(picture, float(FACTORS[i])))
    close(apply(pictures(), **{name: FACTORS}), wanted, levels=0.51)


def test_hue() -> None:
    turns = torch.tensor([-0.5, -0.1, 0.0, 0.07, 0.4])
    wanted = reference(pictures(), lambda i, picture: tv.adjust_hue(picture, float(turns[i])))
    close(apply(pictures(), hue=turns), wanted)
    flat = torch.tensor([0, 7, 255], dtype=torch.uint8).view(3, 1, 1, 1, 1).expand(3, 2, 3, 4, 4)
    assert torch.equal(apply(flat, 4, hue=turns[:3]), flat), "grey has no hue"


def test_grey() -> None:
    chosen = torch.tensor([True, False, True, False, False])
    wanted = reference(pictures(), lambda i, x: tv.rgb_to_grayscale(x, 3) if chosen[i] else x)
    close(apply(pictures(), grey=chosen), wanted, levels=0.51)


def test_blur() -> None:
    sigmas = torch.tensor([0.0, 0.1, 0.7, 1.5, 6.0])
    kernel = 2 * augment_video.blur_radius(SIZE) + 1
    assert kernel == 5

    def one(i: int, picture: torch.Tensor) -> torch.Tensor:
        return tv.gaussian_blur(picture, [kernel, kernel], [float(sigmas[i])] * 2) if sigmas[i] else picture

    close(apply(pictures(), blur_sigma=sigmas), reference(pictures(), one), levels=0.51)
    assert apply(pictures(size=1), 1, blur_sigma=sigmas).shape[-1] == 1


def test_all_of_them_in_their_order() -> None:
    """Parameters that came with a batch reproduce its pixels with another library."""
    batch = batch_of([3, 4, 5, 6, 7])
    before, after = batch.views[VIDEO], augment(batch).views[VIDEO]
    p = before.params
    kernel = 2 * augment_video.blur_radius(SIZE) + 1

    def one(i: int, x: torch.Tensor) -> torch.Tensor:
        x = tv.resized_crop(x, *p["crop_box"][i].tolist(), size=[SIZE, SIZE], antialias=True)
        x = tv.horizontal_flip(x) if p["flip"][i] else x
        x = tv.rotate(x, float(p["rotation_degrees"][i]), interpolation=tv.InterpolationMode.BILINEAR)
        x = tv.adjust_contrast(tv.adjust_brightness(x, float(p["brightness"][i])), float(p["contrast"][i]))
        x = tv.adjust_hue(tv.adjust_saturation(x, float(p["saturation"][i])), float(p["hue"][i]))
        x = tv.rgb_to_grayscale(x, 3) if p["grey"][i] else x
        sigma = float(p["blur_sigma"][i])
        return tv.gaussian_blur(x, [kernel, kernel], [sigma, sigma]) if sigma else x

    close(after.data, reference(before.data, one), levels=2.0)
    assert after.params is before.params
    assert {name: len(set(map(str, p[name].tolist()))) > 1 for name in ("crop_box", "flip", "hue", "blur_sigma")} == {
        "crop_box": True,
        "flip": True,
        "hue": True,
        "blur_sigma": True,
    }


def test_all_frames_of_a_clip_alike() -> None:
    batch = batch_of(list(range(12)))
    view = batch.views[VIDEO]
    still = view.data[:, :1].expand(-1, FRAMES, -1, -1, -1)
    done = augment(replace(batch, views={VIDEO: replace(view, data=still)})).views[VIDEO].data
    assert torch.equal(done[:, 0], done[:, 1])
    assert torch.equal(done[:, 0], done[:, 2])
    assert not torch.equal(done[:, 0], still[:, 0])


def test_a_row_does_not_feel_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Alone, in another order, in chunks, padded further, or split over three ranks."""
    keys = list(range(9))
    whole = augment(batch_of(keys))
    monkeypatch.setattr(augment_video, "CHUNK_BYTES", 1)
    for mine in ([4], [8, 2], keys[0::3], keys[1::3], keys[2::3]):
        part = augment(batch_of(mine))
        for view in (VIDEO, AUDIO):
            assert torch.equal(part.views[view].data, whole.views[view].data[mine])
        text, all_text = part.views[TEXT], whole.views[TEXT]
        for row, key in enumerate(mine):
            assert text.data[row][text.mask[row]].tolist() == all_text.data[key][all_text.mask[key]].tolist()


def test_absent_rows_stay_zero_and_nothing_is_modified() -> None:
    batch = batch_of([0, 1, 2])
    present = torch.tensor([True, False, True])
    blanks = {
        view: {name: torch.from_numpy(np.zeros_like(value)) for name, value in draw_params(STRONG, view, (0,)).items()}
        for view in (VIDEO, AUDIO, TEXT)
    }
    views = {}
    for view, values in batch.views.items():
        params = {name: value.clone() for name, value in values.params.items()}
        data = values.data.clone()
        data[1] = 0
        for name, value in params.items():
            value[1] = blanks[view][name]
        views[view] = ViewBatch(data, present, values.mask, params)
    copies = {view: values.map(torch.clone) for view, values in views.items()}
    done = augment(replace(batch, views=views))
    for view, values in done.views.items():
        assert not values.data[1].any()
        assert torch.equal(views[view].data, copies[view].data)
        assert torch.equal(values.data[0], augment(batch).views[view].data[0])
    assert done.views[TEXT].mask.any(1).all()


# draws


@settings(max_examples=60)
@given(st.integers(0, 2**62), st.integers(1, 80), st.floats(0.05, 1.0), st.floats(0.2, 1.0), st.floats(1.0, 4.0))
def test_crop_boxes_lie_inside_and_have_area_and_aspect(
    key: int, size: int, area: float, low: float, high: float
) -> None:
    options = Augmentation(video=VideoAugmentation(crop=CropOptions(area=(area, 1.0), aspect=(low, high))))
    top, left, height, width = draw_params(options, View(VideoSpec(size=size)), (key,))["crop_box"].tolist()
    assert top >= 0 and left >= 0 and height >= 1 and width >= 1
    assert top + height <= size and left + width <= size
    # rounding moves a side by half a pixel
    assert (height + 0.5) * (width + 0.5) >= area * size * size * 0.999
    assert low * (height - 0.5) - 0.5 <= width <= high * (height + 0.5) + 0.5


def test_an_aspect_that_never_fits_gives_the_largest_centred_box() -> None:
    options = Augmentation(video=VideoAugmentation(crop=CropOptions(area=(1.0, 1.0), aspect=(4.0, 4.0))))
    box = draw_params(options, View(VideoSpec(size=64)), (1,))["crop_box"]
    assert box.tolist() == [24, 0, 16, 64]


def test_frequencies_and_ranges() -> None:
    rows = [draw_params(STRONG, VIDEO, (0, 0, key)) for key in range(2000)]
    column = {name: np.array([row[name] for row in rows]) for name in rows[0]}
    assert column["flip"].mean() == pytest.approx(0.5, abs=0.05)
    assert column["grey"].mean() == pytest.approx(0.2, abs=0.04)
    assert (column["blur_sigma"] > 0).mean() == pytest.approx(0.5, abs=0.05)
    assert (column["brightness"] == 1).mean() == pytest.approx(0.2, abs=0.04)
    for name in ("brightness", "contrast", "saturation"):
        assert 0.4 <= column[name].min() < 0.45 < 1.55 < column[name].max() <= 1.6
    assert -0.15 <= column["hue"].min() < -0.14 < 0.14 < column["hue"].max() <= 0.15
    assert np.abs(column["rotation_degrees"]).max() <= 30
    areas = column["crop_box"][:, 2] * column["crop_box"][:, 3] / SIZE**2
    assert 0.17 < areas.min() < 0.25 and 0.7 < areas.max() < 0.82
    correlations = np.corrcoef([column[name] for name in ("brightness", "contrast", "hue", "flip", "rotation_degrees")])
    assert np.abs(correlations - np.eye(5)).max() < 0.08


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return all(np.array_equal(a[name], b[name]) for name in a)


def test_what_the_draws_depend_on() -> None:
    mine = draw_params(STRONG, VIDEO, (1, 2, 3))
    assert same(mine, draw_params(STRONG, VIDEO, (1, 2, 3)))
    for other in (replace(VIDEO, copy=1), replace(VIDEO, clip=1), replace(VIDEO, augmentation="other")):
        assert not same(mine, draw_params(STRONG, other, (1, 2, 3)))
    for words in ((0, 2, 3), (1, 0, 3), (1, 2, 0)):
        assert not same(mine, draw_params(STRONG, VIDEO, words))
    twice = draw_params(STRONG, replace(VIDEO, spec=VideoSpec(size=2 * SIZE)), (1, 2, 3))
    assert np.abs(twice["crop_box"] - 2 * mine["crop_box"]).max() <= 2, "towers of two sizes see the same part"
    assert twice["hue"] == mine["hue"]


def test_nothing_is_drawn_for_what_is_off() -> None:
    for view in (VIDEO, AUDIO, TEXT):
        assert draw_params(Augmentation(), view, (1,)) == {}


# names


def test_unknown_names_are_refused_with_the_nearest() -> None:
    check_views([VIDEO, View(VideoSpec())], {"strong": STRONG}, path="data.augmentations")
    with pytest.raises(
        ConfigError, match=r"data\.augmentations: unknown name 'strong' \(did you mean 'strogn'\?\).*none"
    ):
        check_views([VIDEO], {"strogn": STRONG}, path="data.augmentations")
    with pytest.raises(ConfigError, match=r"data\.augmentations\.none.*built in"):
        check_views([], {"none": STRONG}, path="data.augmentations")


class Maskless:
    def __call__(self, texts):  # type: ignore[no-untyped-def]
        return ByteTokenizer()(texts)


def test_a_tokenizer_without_a_mask_token_is_refused() -> None:
    view = View(TextSpec(Maskless()), augmentation="strong")
    with pytest.raises(ConfigError, match=r"data\.augmentations\.strong\.text\.mask: 0.3, but"):
        check_views([view], {"strong": STRONG}, path="data.augmentations")
