"""Pairs of clips with a known overlap: the geometry of every draw, the labels in a stream, and the frames."""

from __future__ import annotations

import itertools
from collections import Counter
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from support.media import encode, numbered_picture, read_number
from support.shards import write_shards

from mmcl.config import build
from mmcl.data import ClipStream
from mmcl.data.views import ViewMaker
from mmcl.media import video_pyav
from mmcl.media.augment import augment
from mmcl.media.augment_video import quarter_turns
from mmcl.media.augmentation import Augmentation
from mmcl.media.windows import overlap_clips
from mmcl.shards import load_manifest
from mmcl.shards.members import Sample
from mmcl.types import AudioSpec, ConfigError, Overlap, VideoSpec, View

LABELS = ("overlap_time", "overlap_space", "speed", "turns")
words = st.tuples(st.integers(0, 2**40), st.integers(0, 99))
rates = st.lists(st.floats(0.0, 1.0), min_size=1, max_size=6, unique=True).map(tuple)
areas = st.tuples(st.floats(0.01, 1.0), st.floats(0.01, 1.0)).map(lambda x: (min(x), max(x)))
aspects = st.tuples(st.floats(0.3, 3.0), st.floats(0.3, 3.0)).map(lambda x: (min(x), max(x)))
ways = st.one_of(
    st.just(Overlap()),
    st.builds(
        Overlap,
        rates=rates,
        speeds=st.lists(st.integers(1, 16), min_size=1, max_size=5, unique=True).map(tuple),
        area=areas,
        aspect=aspects,
    ),
)


def shared(first: tuple[int, ...], second: tuple[int, ...]) -> int:
    """Pixels that lie in both boxes, by counting them."""
    canvas = np.zeros((400, 400), int)
    for top, left, height, width in (first, second):
        canvas[top : top + height, left : left + width] += 1
    return int((canvas == 2).sum())


@given(words, st.integers(0, 2000), st.integers(1, 32), st.tuples(st.integers(2, 400), st.integers(2, 400)), ways)
def test_every_draw_has_the_overlap_that_it_says(words, source, frames, picture, how):
    pair = overlap_clips(source, picture, frames=frames, words=words, how=how)
    assert pair == overlap_clips(source, picture, frames=frames, words=words, how=how)
    first, second = pair.boxes
    height, width = first[2:]
    assert second[2:] == first[2:] and pair.space_rate in how.rates
    for top, left, _, _ in pair.boxes:
        assert 0 <= top <= picture[0] - height and 0 <= left <= picture[1] - width
    found = shared(first, second) / (height * width)
    assert abs(found - pair.space_rate) <= (width + height) / (width * height)
    assert found <= pair.space_rate + 1e-12 or (width + height) / (width * height) > 0.5, "the floor, never above"
    if pair.time_rate is None:
        assert pair.speed is None and pair.starts == (0, 0)
        assert all(
            frames * min(how.speeds) + int((1 - rate) * (frames - 1) * min(how.speeds)) > source for rate in how.rates
        ), "only where there is no room for any rate"
        return
    assert pair.time_rate in how.rates and pair.speed in how.speeds
    span = (frames - 1) * pair.speed
    assert abs(pair.starts[1] - pair.starts[0]) == int((1 - pair.time_rate) * span)
    assert min(pair.starts) >= 0 and max(pair.starts) + frames * pair.speed <= source
    if span:
        both = span - abs(pair.starts[1] - pair.starts[0])
        assert -1e-12 <= both / span - pair.time_rate <= 1 / span + 1e-12


def test_rates_speeds_sides_and_corners_are_drawn_evenly_and_apart() -> None:
    pairs = [overlap_clips(400, (128, 128), frames=16, words=(5, i)) for i in range(4000)]
    for values, kinds in (
        ([pair.time_rate for pair in pairs], 5),
        ([pair.space_rate for pair in pairs], 5),
        ([pair.speed for pair in pairs], 4),
    ):
        counts = Counter(values)
        assert len(counts) == kinds and min(counts.values()) > 0.8 * 4000 / kinds
    tables = np.zeros((5, 5)), np.zeros((5, 4))
    how = Overlap()
    for pair in pairs:
        row = how.rates.index(pair.time_rate)
        tables[0][row, how.rates.index(pair.space_rate)] += 1
        tables[1][row, how.speeds.index(pair.speed)] += 1
    assert tables[0].min() > 100 and tables[1].min() > 140, "no rate tells another, or the speed"
    sides = np.array([np.sign(pair.starts[1] - pair.starts[0]) for pair in pairs if pair.time_rate < 1])
    assert abs(sides.mean()) < 0.06
    corners = Counter(
        (np.sign(b[0] - a[0]), np.sign(b[1] - a[1])) for a, b in (p.boxes for p in pairs if p.space_rate == 0.4)
    )
    diagonal = [corners[y, x] for y in (-1, 1) for x in (-1, 1)]
    assert min(diagonal) > 0.7 * max(diagonal)
    areas = [np.mean([p.boxes[0][2] * p.boxes[0][3] for p in pairs if p.space_rate == rate]) for rate in how.rates]
    assert max(areas) / min(areas) < 1.05, "the size of a crop does not tell the rate"


def test_what_too_short_sources_get() -> None:
    def drawn(source: int) -> set[tuple[int | None, float | None]]:
        pairs = [overlap_clips(source, (64, 64), frames=16, words=(6, i)) for i in range(400)]
        return {(pair.speed, pair.time_rate) for pair in pairs}

    assert drawn(15) == drawn(0) == {(None, None)}
    assert drawn(16) == {(1, 1.0)}
    assert drawn(22) == {(1, rate) for rate in (1.0, 0.8, 0.6)}
    assert {speed for speed, _ in drawn(55)} == {1}
    assert {speed for speed, _ in drawn(56)} == {1, 2}, "32 frames and 24 between the starts at the lowest rate"
    for wrong in ((-1, (8, 8), 2), (9, (1, 8), 2), (9, (8, 8), 0)):
        with pytest.raises(ValueError, match="source_frames >= 0"):
            overlap_clips(wrong[0], wrong[1], frames=wrong[2], words=(1,))


# --- in a stream ------------------------------------------------------------------------------------------------------

HOW = Overlap(speeds=(1, 2, 4))
SPEC = VideoSpec(frames=4, size=32, fps=10.0)
PAIR = (View(SPEC, overlap=HOW, augmentation="mild"), View(SPEC, 1, overlap=HOW, augmentation="mild"))
MILD = {"mild": build(Augmentation, {"video": {"flip": 0.5, "jitter": {}}})}


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of clips whose frames bear their number: 6 of 60 frames, one of 3, at 10 frames per second."""
    folder = tmp_path_factory.mktemp("counted")
    samples = {}
    for name, count in [(f"long{i}", 60) for i in range(6)] + [("short", 3)]:
        pictures = [numbered_picture(number, (64, 64)) for number in range(count)]
        path = encode(folder / f"{name}.mp4", pictures, None, fps=10)
        samples[name] = {"mp4": path.read_bytes()}
    write_shards(folder / "shards", samples)
    return folder / "shards"


def batches(folder: Path, views: tuple[View, ...], count: int = 4, **options: object) -> list:
    options = {"global_batch": 6, "in_process": True, "seed": 2, "decoder": "pyav", "augmentations": MILD, **options}
    source = ClipStream(load_manifest(str(folder)), views=views, **options)  # type: ignore[arg-type]
    return list(itertools.islice(iter(source), count))


@pytest.mark.parametrize("decoder", ["pyav", "decord", "torchcodec"])
def test_frames_are_those_of_the_labels(counted: Path, decoder: str) -> None:
    pytest.importorskip({"pyav": "av"}.get(decoder, decoder))
    seen = Counter()
    for batch in batches(counted, PAIR, decoder=decoder):
        first, second = (batch.views[view] for view in PAIR)
        for name in ("overlap_time", "overlap_space", "speed"):
            assert torch.equal(first.params[name], second.params[name]), "both clips bear the labels of the pair"
        for row, key in enumerate(batch.keys):
            label, speed = int(first.params["overlap_time"][row]), int(first.params["speed"][row])
            numbers = [[read_number(frame) for frame in view.data[row].numpy()] for view in (first, second)]
            if key.startswith("short"):
                assert (label, speed) == (-1, -1) and numbers[0] == numbers[1] == [0, 1, 2, 0]
                continue
            for shown in numbers:
                assert set(np.diff(shown)) == {HOW.speeds[speed]}
            assert abs(numbers[0][0] - numbers[1][0]) == int((1 - HOW.rates[label]) * 3 * HOW.speeds[speed])
            seen[label] += 1
    assert len(seen) == 5


def test_the_same_on_ranks_and_workers_and_anew_in_each_epoch(counted: Path) -> None:
    views = (*PAIR, View(SPEC), View(AudioSpec(16_000, 0.25)))
    alone = batches(counted, views, 2)
    parts = [batches(counted, views, 2, rank=r, world_size=3) for r in range(3)]
    parts.append(batches(counted, views, 2, in_process=False, workers=3))
    for rank, found in enumerate(parts):
        rows = slice(rank, None, 3) if rank < 3 else slice(None)
        for whole, part in zip(alone, found, strict=True):
            for view in PAIR:
                for name in (*LABELS, "crop_box", "start_seconds"):
                    assert torch.equal(part.views[view].params[name], whole.views[view].params[name][rows]), name
                assert torch.equal(part.views[view].data, whole.views[view].data[rows])
    seen: dict[str, list[list[int]]] = {}
    for batch in alone:
        for key, box in zip(batch.keys, batch.views[PAIR[0]].params["crop_box"].tolist(), strict=True):
            seen.setdefault(key, []).append(box)
    again = [boxes for boxes in seen.values() if len(boxes) > 1]
    assert len(again) >= 5 and all(boxes[0] != boxes[1] for boxes in again)
    assert alone[0].views[views[2]].params.keys() == {"start_seconds"}, "other views are sampled as ever"


def test_a_sample_is_opened_and_decoded_once_for_all_its_views(counted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened, decoded = [], []
    real, picture = video_pyav.open_container, video_pyav.PyAVReader._decode
    monkeypatch.setattr(video_pyav, "open_container", lambda data: opened.append(1) or real(data))
    monkeypatch.setattr(
        video_pyav.PyAVReader, "_decode", lambda self, pts, *a, **k: decoded.append(pts) or picture(self, pts, *a, **k)
    )
    data = next((counted.parent).glob("long0.mp4")).read_bytes()
    for epoch in range(5):
        opened.clear(), decoded.clear()
        values, _ = ViewMaker((*PAIR, View(SPEC)), augmentations=MILD)(Sample(key="a", video=data), epoch=epoch)
        times = [pts for group in decoded for pts in group]
        assert len(values) == 3 and len(opened) == 1 and len(times) == len(set(times)) <= 12


def test_crops_are_turned_after_they_are_cut(counted: Path) -> None:
    """A picture whose pixels tell where they are: what is seen is the box, mirrored, then turned."""
    size = 64
    y, x = np.mgrid[:size, :size]
    pixels = np.stack([4 * y, 4 * x, 0 * x], -1).astype(np.uint8)
    how = Overlap(area=(0.25, 0.25), aspect=(1.0, 1.0), oversample=2.0, speeds=(1,))
    views = tuple(View(SPEC, clip, augmentation="flip", overlap=how) for clip in (0, 1))
    flip = {"flip": build(Augmentation, {"video": {"flip": 0.5}})}
    batch = batches(counted, views, 1, augmentations=flip)[0]
    for view in views:
        batch.views[view].data.copy_(torch.from_numpy(pixels).permute(2, 0, 1).expand(6, 4, 3, size, size))
    done, turns = augment(batch), set()
    chosen = [batch.views[view].params["turns"] for view in views]
    assert not torch.equal(*chosen), "each clip draws its own"
    for view in views:
        params = batch.views[view].params
        for row in range(6):
            top, left, height, width = params["crop_box"][row].tolist()
            assert (height, width) == (32, 32)
            box = pixels[top : top + 32, left : left + 32]
            box = box[:, ::-1] if params["flip"][row] else box
            wanted = np.rot90(box, int(params["turns"][row])).transpose(2, 0, 1)
            assert np.abs(done.views[view].data[row, 0].numpy().astype(int) - wanted).max() <= 1
            turns.add(int(params["turns"][row]))
    assert turns == {0, 1, 2, 3}


def test_turns_are_exact_and_independent_of_other_rows() -> None:
    x = torch.rand(5, 2, 3, 6, 6)
    before = x.clone()
    out = quarter_turns(x, torch.tensor([0, 1, 2, 3, 1]))
    assert torch.equal(x, before)
    for row, number in enumerate((0, 1, 2, 3, 1)):
        assert torch.equal(out[row], x[row].rot90(number, (-2, -1)))


def test_a_picture_has_no_times_and_absent_rows_have_no_labels() -> None:
    maker = ViewMaker(PAIR, augmentations=MILD)
    blank = maker.blank(PAIR[0])
    assert blank.data.shape == (4, 3, 64, 64) and {*LABELS, "crop_box", "flip"} <= set(blank.params)  # type: ignore[union-attr]
    file = BytesIO()
    Image.fromarray(numbered_picture(5)).save(file, "PNG")
    values, _ = maker(Sample(key="picture", image=file.getvalue()), epoch=0)
    first = values[PAIR[0]].params
    assert first["overlap_time"] == first["speed"] == -1 and first["overlap_space"] >= 0


def test_what_would_make_labels_wrong_is_refused() -> None:
    for changes, name in (({"crop": {}}, "crop"), ({"oversample": 1.5}, "oversample")):
        options = {"mild": build(Augmentation, {"video": changes})}
        with pytest.raises(ConfigError, match=rf"data\.augmentations\.mild\.video\.{name}: the objective crops"):
            ViewMaker(PAIR, augmentations=options)
