"""A crop keeps exactly its box, of the picture as a player shows it, and is part of what makes a sample itself."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.media import encode, moving_pattern, tone

from mmcl.media.video import open_video
from mmcl.shards import MakeOptions, ShardReader, load_manifest, make_shards, parse_sample
from mmcl.shards.transcode import MediaOptions, parse_crop, transcode
from mmcl.types import ConfigError, SampleError

SIZE = (96, 160)


def quarters(count: int) -> list[np.ndarray]:
    """uint8 ``(H, W, 3)``: four plain colours, and stripes between them that end at pixel 20 from the left and top."""
    picture = np.zeros((*SIZE, 3), np.uint8)
    height, width = SIZE[0] // 2, SIZE[1] // 2
    for place, colour in enumerate([(220, 40, 40), (40, 180, 60), (40, 60, 220), (220, 210, 40)]):
        top, left = place // 2 * height, place % 2 * width
        picture[top : top + height, left : left + width] = colour
    picture[:20, :20] = 235
    return [picture] * count


def all_frames(source) -> np.ndarray:
    """float32 ``(T, 3, H, W)`` as displayed."""
    reader = open_video(source, decoder="pyav")
    try:
        return reader.read(range(len(reader.frame_times_seconds))).astype(np.float32)
    finally:
        reader.close()


@pytest.mark.parametrize("rotation", [0, 90, 180, 270])
@pytest.mark.parametrize("box", [(0, 0, 40, 30), (13, 7, 51, 61), (30, 20, 66, 76)])
def test_the_box_is_cut_out_of_the_displayed_picture(tmp_path, rotation, box):
    path = encode(tmp_path / "a.mp4", quarters(3), None, rotation=rotation)
    x, y, width, height = box
    wanted = all_frames(path)[:, :, y : y + height, x : x + width]
    made = transcode(path, MediaOptions(short_side=512, crf=0, crop=box))
    found = all_frames(made.data)
    even = 2 * round(height / 2), 2 * round(width / 2)
    assert found.shape[2:] == even and (made.video["height"], made.video["width"]) == even
    rows, columns = min(height, even[0]), min(width, even[1])
    assert np.abs(found[:, :, :rows, :columns] - wanted[:, :, :rows, :columns]).mean() < 6


def test_sound_and_time_are_as_without(tmp_path):
    path = encode(tmp_path / "a.mp4", moving_pattern((200, 0, 0), 24, SIZE), tone(440, 2.0, 16_000))
    whole, part = (transcode(path, MediaOptions(crop=crop)) for crop in (None, (0, 0, 64, 64)))
    assert part.duration_seconds == whole.duration_seconds and part.audio == whole.audio
    assert (part.video["frames"], part.video["fps"]) == (whole.video["frames"], whole.video["fps"])
    assert (part.video["width"], part.video["height"]) == (64, 64)


def test_the_short_side_is_that_of_the_box(tmp_path):
    path = encode(tmp_path / "a.mp4", quarters(2), None)
    made = transcode(path, MediaOptions(short_side=32, crop=(10, 10, 128, 64)))
    assert (made.video["width"], made.video["height"]) == (64, 32)


def test_pictures_are_cropped_too(tmp_path):
    Image.fromarray(quarters(1)[0]).save(tmp_path / "a.png")
    made = transcode(tmp_path / "a.png", MediaOptions(crop=(80, 0, 60, 40)))
    assert (made.video["width"], made.video["height"]) == (60, 40)


@pytest.mark.parametrize("box", [(0, 0, 161, 10), (0, 90, 10, 10), (500, 0, 10, 10)])
@pytest.mark.parametrize("name", ["a.mp4", "a.png"])
def test_a_box_outside_is_a_named_failure(tmp_path, box, name):
    encode(tmp_path / "a.mp4", quarters(1), None)
    Image.fromarray(quarters(1)[0]).save(tmp_path / "a.png")
    with pytest.raises(SampleError, match="crop_outside"):
        transcode(tmp_path / name, MediaOptions(crop=box))


@pytest.mark.parametrize("text", ["1:2:3", "a:b:c:d", "-1:0:10:10", "0:0:0:10", "0:0:10:1", "1.5:0:10:10"])
def test_a_wrong_crop_is_refused(text):
    with pytest.raises(ConfigError, match="crop"):
        MediaOptions(crop=parse_crop(text))


def samples_of(folder: Path):
    reader = ShardReader(load_manifest(folder))
    return [parse_sample(reader.read(0, index)) for index in range(len(reader))]


def test_columns_win_over_the_option_and_make_other_samples(tmp_path):
    encode(tmp_path / "a.mp4", quarters(2), None)
    crops = [{}, {"crop_x": 0, "crop_y": 0, "crop_w": 40, "crop_h": 30}, {"crop_x": 4, "crop_y": 0, "crop_w": 50}]
    crops.append({"crop_x": "2", "crop_y": "2.0", "crop_w": 32, "crop_h": 48})
    table = tmp_path / "t.jsonl"
    table.write_text("".join(json.dumps({"path": "a.mp4", **crop}) + "\n" for crop in crops))
    options = MakeOptions(media=MediaOptions(crop=(0, 0, 64, 64)), shuffle=None, workers=1)
    report = make_shards(table, tmp_path / "out", options)
    assert report.failures == {"bad_row": 1} and report.samples == 3
    samples = samples_of(tmp_path / "out")
    assert [sample.video_size for sample in samples] == [(64, 64), (30, 40), (48, 32)]
    assert samples[2].metadata["source"]["crop"] == [2, 2, 32, 48] and "crop_x" not in samples[1].metadata
    assert len({sample.key for sample in samples}) == 3
    assert make_shards(table, tmp_path / "out", options).reused == 3
    with pytest.raises(ConfigError, match="crop"):
        make_shards(table, tmp_path / "out", MakeOptions(media=MediaOptions(crop=(0, 0, 64, 62)), shuffle=None))
