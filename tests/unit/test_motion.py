"""Motion vectors of compressed video: right velocities from every codec, geometry, storage, and views of them."""

from __future__ import annotations

import contextlib
import dataclasses
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.media import encode
from support.shards import read_shards, write_shards
from typer.testing import CliRunner

from mmcl.cli import app
from mmcl.data import ClipStream
from mmcl.data.collate import Row, collate
from mmcl.data.options import SamplingOptions
from mmcl.data.places import place_views
from mmcl.data.views import ViewMaker
from mmcl.encoders.motion import TinyMotion, TinyMotionOptions
from mmcl.media.augment import augment
from mmcl.media.augment_video import augment_motion
from mmcl.media.augmentation import Augmentation, CropOptions, VideoAugmentation
from mmcl.media.clip import MediaReader
from mmcl.media.frame_table import FrameTable
from mmcl.media.inputs import decode_windows
from mmcl.media.motion import MotionReader, motion_maps, reference_distances, resized
from mmcl.media.motion_file import StoredMotion, extract_motion
from mmcl.media.windows import Window, elsewhere
from mmcl.shards import load_manifest
from mmcl.shards.check import check_files
from mmcl.shards.members import parse_sample
from mmcl.shards.reader import ShardReader
from mmcl.shards.transcode import MediaOptions
from mmcl.types import Batch, ConfigError, MotionSpec, SampleError, VideoSpec, View

VELOCITY = (-2.0, -1.0)
"""pixels per frame that the pictures move by: to the left and up"""
SIZE, FRAMES, GOP = (96, 128), 24, 12
SPEC = MotionSpec(frames=4, size=48, cell=4)


def panned(size: tuple[int, int] = SIZE) -> np.ndarray:
    """uint8 ``(F, H, W, 3)``: a camera that goes over a textured scene, without a seam between blocks."""
    scene = np.random.default_rng(0).integers(0, 256, (30, 30, 3)).astype(np.uint8).repeat(8, 0).repeat(8, 1)
    return np.stack([scene[i : i + size[0], 2 * i : 2 * i + size[1]] for i in range(FRAMES)])


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("films")
    how = {
        "P": {},
        "B": {"b_frames": 3},
        "mpeg4": {"codec": "mpeg4"},
        "mpeg4 B": {"codec": "mpeg4", "b_frames": 2},
        "turned": {"rotation": 90},
        "vp9": {"codec": "vp9"},
    }
    suffix = {"vp9": "mkv"}
    return {
        name: encode(folder / f"{name}.{suffix.get(name, 'mp4')}", panned(), None, fps=12, gop=GOP, **options)
        for name, options in how.items()
    }


@pytest.mark.parametrize("name", ["P", "B", "mpeg4", "mpeg4 B"])
def test_velocities_are_those_of_the_scene(films: dict[str, Path], name: str) -> None:
    with contextlib.closing(MotionReader(films[name])) as reader:
        grids = reader.grids(np.arange(FRAMES))
        assert grids.shape == (FRAMES, 2, 12, 16) and reader.picture_size == SIZE
        assert np.flatnonzero(reader.is_key).tolist()[:2] == [0, 12]
        assert not grids[reader.is_key].any()
        inner = grids[~reader.is_key][:, :, 3:-3, 3:-3]
        np.testing.assert_allclose(np.median(inner, axis=(2, 3)), [VELOCITY] * len(inner), atol=0.13)
        again = reader.grids([20, 3, 20])
        np.testing.assert_array_equal(again, grids[[20, 3, 20]])


def test_distances_to_references() -> None:
    # display times in the order of decoding: I0 P4 with a pyramid B2 B1 B3, P7 with plain B5 B6, P8
    table = FrameTable(np.arange(9), np.array([0]), np.array([0]), 9, np.array([0, 4, 2, 1, 3, 7, 5, 6, 8]))
    past, future = reference_distances(table, [True, True, True, False, False, True, False, False, True])
    assert past.tolist() == [1, 1, 2, 1, 4, 1, 2, 3, 1]
    assert future.tolist()[1:4] + future.tolist()[5:7] == [1, 2, 1, 2, 1]
    past, future = reference_distances(table, None)  # no pyramid: B frames are never referred to
    assert past.tolist() == [1, 1, 2, 3, 4, 1, 2, 3, 1]
    assert future.tolist()[1:4] == [3, 2, 1]


def test_a_turned_picture_moves_as_it_is_shown(films: dict[str, Path]) -> None:
    with contextlib.closing(MotionReader(films["turned"])) as reader:
        grids = reader.grids([5])
        assert reader.picture_size == SIZE[::-1] and grids.shape == (1, 2, 16, 12)
        from mmcl.media.video import open_video

        with contextlib.closing(open_video(films["turned"])) as pictures:
            a, b = pictures.read([4, 5]).astype(np.float32).mean(1)
        x, y = np.median(grids[0, :, 3:-3, 3:-3], axis=(1, 2)).round().astype(int)
        assert abs(x) + abs(y) == 3
        still, moved = (np.abs(np.roll(a, shift, (0, 1)) - b)[8:-8, 8:-8].mean() for shift in ((0, 0), (y, x)))
        assert moved < still / 4


def test_a_codec_without_vectors_is_named(films: dict[str, Path]) -> None:
    with pytest.raises(SampleError, match="no_motion_vectors: codec vp9"):
        MotionReader(films["vp9"])


def test_maps_are_scaled_with_the_picture_and_keyframes_hold(films: dict[str, Path]) -> None:
    with contextlib.closing(MotionReader(films["P"])) as reader:
        for fit, scale in (("crop", (0.5, 0.5)), ("squash", (48 / 128, 0.5))):
            maps = motion_maps(reader, np.array([0, 5, 12]), dataclasses.replace(SPEC, fit=fit))
            assert maps.shape == (3, 2, 12, 12) and maps.dtype == np.float32
            wanted = np.multiply(VELOCITY, scale)
            np.testing.assert_allclose(np.median(maps, axis=(2, 3)), [wanted] * 3, atol=0.13)
        zero = motion_maps(reader, np.array([5, 12]), dataclasses.replace(SPEC, keyframes="zero"))
        assert zero[0].any() and not zero[1].any()
        plain = motion_maps(reader, np.array([5]), dataclasses.replace(SPEC, corrected=False))
        np.testing.assert_allclose(np.median(plain, axis=(0, 2, 3)), VELOCITY, atol=0.13)


def test_every_place_is_the_mean_of_what_it_shows() -> None:
    grids = np.arange(2 * 4 * 6, dtype=np.float32).reshape(1, 2, 4, 6)
    # a picture of 30 × 44 pixels: its last cells are cut
    same = MotionSpec(size=30, cell=30, fit="crop")
    rows = np.array([8, 8, 8, 6]) / 30
    columns = np.array([1, 8, 8, 8, 5, 0]) / 30  # 7 … 37 of 44
    wanted = (grids[0] * rows[:, None] * columns).sum((1, 2))
    np.testing.assert_allclose(resized(grids, 8, (30, 44), same)[0, :, 0, 0], wanted, rtol=1e-6)


def test_a_flip_turns_the_first_component_round_and_a_crop_is_faster(films: dict[str, Path]) -> None:
    maps = torch.randn(3, 4, 2, 12, 12, generator=torch.Generator().manual_seed(0))
    flips = torch.tensor([True, False, True])
    done = augment_motion(maps, {"flip": flips}, side=12)
    for row, flip in enumerate(flips.tolist()):
        wanted = maps[row].flip(3) * torch.tensor([-1.0, 1.0]).view(1, 2, 1, 1) if flip else maps[row]
        torch.testing.assert_close(done[row], wanted)
    same = torch.full((1, 4, 2, 12, 12), 3.0)
    part = augment_motion(same, {"crop_share": torch.tensor([[0.25, 0.5, 0.5, 0.25]])}, side=12)
    torch.testing.assert_close(part[0, 0, :, 5, 5], torch.tensor([12.0, 6.0]))
    raw = {"crop_share": torch.tensor([[0.25, 0.5, 0.5, 0.25]]), "flip": torch.tensor([True])}
    torch.testing.assert_close(augment_motion(same, raw, side=12, corrected=False), same)


def test_motion_of_a_flipped_film_is_the_flipped_motion(tmp_path: Path) -> None:
    """The flip test: pictures and motion flipped together tell the same as a film that was encoded flipped."""
    straight, mirrored = (
        encode(tmp_path / f"{name}.mp4", pictures, None, fps=12, gop=GOP)
        for name, pictures in (("a", panned()), ("b", panned()[:, :, ::-1]))
    )
    found = []
    for path in (straight, mirrored):
        with contextlib.closing(MotionReader(path)) as reader:
            found.append(torch.from_numpy(motion_maps(reader, np.arange(1, 9), SPEC))[None])
    flipped = augment_motion(found[0], {"flip": torch.tensor([True])}, side=12)
    inner = (..., slice(2, -2), slice(2, -2))
    medians = [x[inner].flatten(3).median(3).values for x in (flipped, found[1], found[0])]
    torch.testing.assert_close(medians[0], medians[1], atol=0.07, rtol=0)
    assert (medians[0][..., 0] > 0.9).all() and (medians[2][..., 0] < -0.9).all()


def test_stored_motion_is_that_of_the_stream(films: dict[str, Path]) -> None:
    stored = StoredMotion(extract_motion(films["B"]))
    with contextlib.closing(MotionReader(films["B"], cell=16)) as reader:
        grids = reader.grids(np.arange(FRAMES))
        np.testing.assert_allclose(stored.grids(np.arange(FRAMES)), grids, atol=0.126)
        np.testing.assert_array_equal(stored.frame_times_seconds, reader.frame_times_seconds)
        np.testing.assert_array_equal(stored.is_key, reader.is_key)
        assert stored.picture_size == reader.picture_size == SIZE
    wanted = [(Window(0.5, 1.0), dataclasses.replace(SPEC, fps=12.0, stride=None))]
    with (
        MediaReader(video=films["B"]) as own,
        MediaReader(video=films["B"], motion=extract_motion(films["B"])) as other,
    ):
        maps = [reader.read_all(wanted)[0] for reader in (own, other)]
        np.testing.assert_allclose(*(np.median(x, axis=(2, 3)) for x in maps), atol=0.13)


def test_what_is_no_motion_is_refused(films: dict[str, Path]) -> None:
    good = extract_motion(films["P"])
    file = io.BytesIO()
    np.save(file, np.array([print], dtype=object), allow_pickle=True)
    for data in (file.getvalue(), b"", b"text", good[:-1], good + b"x", good.replace(b"|i1", b"|i9"), good[:60]):
        with pytest.raises(SampleError, match="bad_motion"):
            StoredMotion(data)


@settings(max_examples=40, deadline=None)
@given(place=st.integers(0, 400), change=st.binary(min_size=1, max_size=6))
def test_damage_of_stored_motion_is_a_sample_error_or_motion(films: dict[str, Path], place: int, change: bytes) -> None:
    if "motion" not in _EXTRACTED:
        _EXTRACTED["motion"] = extract_motion(films["P"])
    data = bytearray(_EXTRACTED["motion"])
    data[place : place + len(change)] = change
    with contextlib.suppress(SampleError):
        assert StoredMotion(bytes(data)).grids([0]).dtype == np.float32


_EXTRACTED: dict[str, bytes] = {}


def test_damaged_video_is_a_sample_error(damaged_media: dict[str, Path]) -> None:
    for path in damaged_media.values():
        try:
            reader = MotionReader(path)
        except SampleError:
            continue
        with contextlib.closing(reader), contextlib.suppress(SampleError):
            assert np.isfinite(reader.grids(np.arange(len(reader.frame_times_seconds)))).all()


CLIP = VideoSpec(frames=4, size=48, fps=4.0, stride=3)
VIEWS = (
    View(CLIP, augmentation="strong"),
    View(SPEC, augmentation="strong", place="after", gap_frames=1),
    View(SPEC, augmentation="strong", copy=1, place="elsewhere"),
    View(SPEC, augmentation="strong", copy=2, place="elsewhere"),
    View(dataclasses.replace(CLIP, frames=1, stride=1, keyframe=True), augmentation="strong", copy=3, place="near"),
)
STRONG = Augmentation(video=VideoAugmentation(oversample=1.5, crop=CropOptions(area=(0.2, 0.8)), flip=0.5))


@pytest.fixture(scope="module")
def with_motion(films: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Shards of three films with their motion, the same without, and the same where it stands still."""
    folder = tmp_path_factory.mktemp("motion")
    lines = [f"{films[name]},{name}" for name in ("P", "B", "mpeg4")]
    (folder / "clips.csv").write_text("\n".join(["path,caption", *lines]))
    command = ["shards", "make", str(folder / "clips.csv"), "--out", str(folder / "with"), "--motion", "--workers", "1"]
    done = CliRunner().invoke(app, command, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    samples = read_shards(folder / "with")
    for members in samples.values():
        records = np.load(io.BytesIO(members["motion.npy"]), allow_pickle=False)
        records["velocity"] = 0
        file = io.BytesIO()
        np.save(file, records, allow_pickle=False)
        members["motion.npy"] = file.getvalue()
    write_shards(folder / "still", samples)
    for members in samples.values():
        del members["motion.npy"]
    write_shards(folder / "without", samples)
    return folder / "with", folder / "without", folder / "still"


def batch_of(folder: Path, **options: object) -> Batch:
    stream = ClipStream(
        load_manifest(str(folder)),
        options.pop("views", VIEWS),  # type: ignore[arg-type]
        **{"global_batch": 8, "in_process": True, "seed": 3, "augmentations": {"strong": STRONG}, **options},  # type: ignore[arg-type]
    )
    return next(iter(stream))


@pytest.mark.slow  # it starts a pool of processes
def test_shards_carry_motion_and_the_stream_is_the_fallback(with_motion: tuple[Path, Path, Path]) -> None:
    members = next(iter(read_shards(with_motion[0]).values()))
    assert set(members) == {"mp4", "motion.npy", "json", "txt"}
    assert len(members["motion.npy"]) == 192 + FRAMES * (13 + 2 * 6 * 8)
    raw = ShardReader(load_manifest(str(with_motion[0]))).read(0, 0)
    assert check_files(raw) == [] and "motion" in parse_sample(raw).vectors
    stored, fallback, still = (batch_of(folder, global_batch=6) for folder in with_motion)
    assert stored.keys == fallback.keys
    for view in VIEWS[1:3]:
        a, b = stored.views[view], fallback.views[view]
        torch.testing.assert_close(a.params, b.params)
        assert a.present.any() and torch.equal(a.present, b.present) and a.data.dtype == torch.float32
        assert (a.data - b.data).abs().mean() < 0.4 * b.data.abs().mean()
        assert a.data.any() and not still.views[view].data.any(), "what is stored counts"


def test_shards_of_pictures_that_refer_to_none_cannot_carry_motion() -> None:
    with pytest.raises(ConfigError, match="codec=mjpeg"):
        MediaOptions(codec="mjpeg", motion=True)


def test_clip_and_following_motion_share_crop_and_flip(shards_folder: Path) -> None:
    batch = batch_of(shards_folder / "train", global_batch=16)
    clip, after, first, second, frame = (batch.views[view] for view in VIEWS)
    shares = clip.params["crop_box"] / 72
    torch.testing.assert_close(after.params["crop_share"], shares.float())
    assert torch.equal(clip.params["flip"], after.params["flip"])
    for other in (first, second):
        assert (other.params["crop_share"] != after.params["crop_share"]).any(1).all()
    assert (first.params["crop_share"] != second.params["crop_share"]).any(1).all()
    assert (frame.params["crop_box"] != clip.params["crop_box"]).any(1).all()
    assert after.data.shape == (16, 4, 2, 18, 18), "finer, to crop from"
    assert augment(batch).views[VIEWS[1]].data.shape == (16, 4, 2, 12, 12)
    # 12 frames per second: a clip of 4 × 3 frames, 1 left out, then 4 of motion
    starts = [x.params["start_seconds"] for x in (clip, after, first, second, frame)]
    torch.testing.assert_close(starts[1] - starts[0], torch.full((16,), 13 / 12, dtype=torch.float64))
    for other in starts[2:4]:
        assert ((other - starts[1]).abs() >= 4 / 12 - 1e-9).all()
    assert ((starts[4] >= (starts[0] - 5.5 / 12).clamp(min=0)) & (starts[4] <= starts[0] + 16.5 / 12)).all()
    assert (starts[4] < starts[0]).any() or (starts[4] > starts[0] + 1).any()
    again = batch_of(shards_folder / "train", global_batch=16)
    assert all(torch.equal(again.views[view].data, batch.views[view].data) for view in VIEWS)


def test_the_picture_near_a_clip_is_a_keyframe(shards_folder: Path) -> None:
    sample = parse_sample(ShardReader(load_manifest(str(shards_folder / "train"))).read(0, 0))
    spec = VideoSpec(frames=3, size=48, fps=1.0)
    with MediaReader(video=sample.video) as media:
        plain, keys = (media.read(Window(0.0, 3.0), dataclasses.replace(spec, keyframe=k)) for k in (False, True))
        first = media.read(Window(0.0, 1 / 12), VideoSpec(frames=1, size=48, fps=12.0))
        later = media.read(Window(16 / 12, 17 / 12), VideoSpec(frames=1, size=48, fps=12.0))
    assert not np.array_equal(plain, keys)
    np.testing.assert_array_equal(keys[0], first[0])  # 0.5 s: frame 6 of keyframes 0, 16 and 32
    np.testing.assert_array_equal(keys[1], later[0])


@settings(max_examples=200, deadline=None)
@given(
    duration=st.floats(0.0, 60.0), start=st.floats(0.0, 50.0), taken=st.floats(0.1, 5.0), length=st.floats(0.1, 9.0),
    u=st.floats(0.0, 1.0, exclude_max=True),
)  # fmt: skip
def test_elsewhere_never_overlaps(duration: float, start: float, taken: float, length: float, u: float) -> None:
    window = Window(start, start + taken)
    found = elsewhere(duration, length, window, u)
    if found is None:
        assert window.end_seconds > duration or (start < length and start + taken + length > duration)
        return
    assert window.end_seconds <= duration + 1e-3
    assert found.end_seconds <= start + 1e-9 or found.start_seconds >= window.end_seconds - 1e-9
    assert found.start_seconds >= 0 and abs(found.seconds - length) < 1e-9
    assert found.end_seconds <= duration + 1e-6


def test_a_source_too_short_has_no_motion_elsewhere() -> None:
    motion = dataclasses.replace(SPEC, fps=10.0, stride=None)
    views = (View(dataclasses.replace(CLIP, stride=None)), *(dataclasses.replace(v, spec=motion) for v in VIEWS[1:3]))
    pairs = [(view, view.spec) for view in views]
    placed = {
        duration: place_views(pairs, duration, words=(1, 2, 3), rule="random", sampling=SamplingOptions())
        for duration in (0.3, 60.0)
    }
    assert placed[0.3][2] is None and placed[60.0][2] is not None
    clip, after = placed[60.0][:2]
    assert clip is not None and after is not None
    assert after.start_seconds == pytest.approx(clip.end_seconds + 0.1)


def test_absent_motion_is_zeros(films: dict[str, Path]) -> None:
    maker = ViewMaker(VIEWS, augmentations={"strong": STRONG})
    batch = augment(collate([Row(0), Row(1)], VIEWS, blank=maker.blank))
    values = batch.views[VIEWS[1]]
    assert values.data.shape == (2, 4, 2, 12, 12) and not values.data.any() and not values.present.any()


def test_the_tower() -> None:
    torch.manual_seed(0)
    tower = TinyMotion(TinyMotionOptions(width=16, channels=8, size=48, cell=4, frames=4))
    assert tower.spec == dataclasses.replace(SPEC, fit="squash")
    x = torch.randn(3, 4, 2, 12, 12)
    features = tower(x)
    assert features.grid == (1, 3, 3) and features.tokens.shape == (3, 9, 16) and features.pooled.shape == (3, 16)
    torch.testing.assert_close(tower(100 * x.sign()).tokens, tower(10 * x.sign()).tokens)  # cut at the limit
    assert not torch.allclose(tower(-x).pooled, features.pooled)
    torch.testing.assert_close(tower(x[1:2]).tokens, features.tokens[1:2])
    names = {id(p) for block in tower.blocks() for p in block.parameters()}
    assert names == {id(p) for p in tower.parameters()}
    with pytest.raises(ConfigError, match="size 60 is no multiple of 4 × cell 4; nearest: 64"):
        TinyMotion(TinyMotionOptions(size=60))


def test_motion_of_arrays_is_refused() -> None:
    with pytest.raises(ConfigError, match="motion is read from compressed files"):
        decode_windows(np.zeros((4, 3, 8, 8), np.uint8), SPEC, 1)
