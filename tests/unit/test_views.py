"""Views of one sample: where their clips lie, the parameters that travel with them, the same on any ranks."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from support.recipes import tiny_config

from mmcl.config import build
from mmcl.data import ClipStream
from mmcl.data.collate import Row, collate
from mmcl.data.options import DataOptions, SamplingOptions
from mmcl.data.views import ViewMaker
from mmcl.media.augment import augment
from mmcl.media.augmentation import Augmentation
from mmcl.media.text import ByteTokenizer
from mmcl.shards import load_manifest
from mmcl.shards.members import Sample
from mmcl.training.processes import build_accelerator
from mmcl.training.trainer import Trainer
from mmcl.types import AudioSpec, Batch, ConfigError, TextSpec, VideoSpec, View

OPTIONS = {
    "video": {
        "oversample": 1.5,
        "crop": {"area": [0.2, 0.8]},
        "flip": 0.5,
        "jitter": {},
        "grey": 0.2,
        "blur": {},
        "rotation": {"degrees": 15},
    },
    "audio": {"gain_db": [-6, 6], "shift_seconds": 0.05, "time_masks": 1, "time_mask_seconds": 0.05},
    "text": {"swap": 0.2, "delete": 0.2, "mask": 0.2},
}
STRONG = build(Augmentation, OPTIONS)
VIDEO = VideoSpec(frames=2, size=32, fps=4.0)
VIEWS = (
    View(VIDEO),
    View(VIDEO, augmentation="strong"),
    View(VIDEO, augmentation="strong", copy=1),
    View(VIDEO, clip=1, augmentation="strong"),
    View(AudioSpec(16_000, 0.25), augmentation="strong"),
    View(TextSpec(ByteTokenizer(32)), augmentation="strong"),
)


def stream(folder: Path, **options: object) -> ClipStream:
    options = {
        "global_batch": 6,
        "in_process": True,
        "seed": 3,
        "views": VIEWS,
        "decoder": "pyav",
        "augmentations": {"strong": STRONG},
        **options,
    }
    return ClipStream(load_manifest(str(folder)), **options)  # type: ignore[arg-type]


def take(source: ClipStream, count: int) -> list[Batch]:
    return list(itertools.islice(iter(source), count))


def test_augmented_rows_are_the_same_on_ranks_and_workers(shards_folder: Path) -> None:
    alone = take(stream(shards_folder / "train"), 3)
    wholes = [augment(batch) for batch in alone]
    assert all(not whole.views[view].present.all() for whole in wholes[:1] for view in VIEWS[4:5]), "silent clips"
    parts = [take(stream(shards_folder / "train", rank=r, world_size=3), 3) for r in range(3)]
    parts.append(take(stream(shards_folder / "train", in_process=False, workers=2), 3))
    for rank, batches in enumerate(parts):
        rows = slice(rank, None, 3) if rank < 3 else slice(None)
        for whole, part in zip(wholes, map(augment, batches), strict=True):
            assert part.keys == whole.keys[rows]
            for view in VIEWS:
                mine, all_rows = part.views[view], whole.views[view]
                for name, values in all_rows.params.items():
                    kept = values[rows]
                    if name == "token_targets":  # padded like the tokens, to the longest text of the part
                        kept = kept[:, : mine.params[name].shape[1]]
                    assert torch.equal(mine.params[name], kept), name
                if isinstance(view.spec, TextSpec):
                    kept = [row[mask].tolist() for row, mask in zip(all_rows.data, all_rows.mask, strict=True)][rows]
                    assert [row[mask].tolist() for row, mask in zip(mine.data, mine.mask, strict=True)] == kept
                else:
                    assert torch.equal(mine.data, all_rows.data[rows])


def test_what_travels_with_a_view(shards_folder: Path) -> None:
    batch = take(stream(shards_folder / "train"), 1)[0]
    plain, first, copy, later = (batch.views[view] for view in VIEWS[:4])
    assert plain.data.shape[-1] == 32 and set(plain.params) == {"start_seconds"}
    assert first.data.shape[-1] == 48, "decoded larger, to crop from"
    assert torch.equal(first.data, copy.data), "copies show the same frames, augmented anew"
    assert not torch.equal(first.params["crop_box"], copy.params["crop_box"])
    assert first.params["crop_box"].shape == (6, 4) and first.params["hue"].shape == (6,)
    assert (later.params["start_seconds"] >= first.params["start_seconds"]).all()
    done = augment(batch)
    assert {done.views[view].data.shape[-1] for view in VIEWS[:4]} == {32}
    assert torch.equal(done.views[VIEWS[0]].data, plain.data)
    assert not torch.equal(done.views[VIEWS[1]].data, done.views[VIEWS[2]].data)


def test_a_new_epoch_draws_anew(shards_folder: Path) -> None:
    first, second = take(stream(shards_folder / "train", global_batch=16), 2)
    boxes = [dict(zip(b.keys, b.views[VIEWS[1]].params["crop_box"].tolist(), strict=True)) for b in (first, second)]
    assert sum(boxes[0][key] != boxes[1][key] for key in boxes[0]) >= 14


def test_an_unknown_augmentation_is_named(shards_folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.augmentations: unknown name 'strong'.*did you mean 'stronger'"):
        stream(shards_folder / "train", augmentations={"stronger": STRONG})


@pytest.mark.parametrize(
    ("sampling", "least", "most"),
    [
        (SamplingOptions(span_seconds=0.0), 0.0, 0.0),
        (SamplingOptions(span_seconds=0.4), 0.0, 0.4),
        (SamplingOptions(gap_seconds=(1.0, None)), 1.5, 9.0),
        (SamplingOptions(gap_seconds=(None, 0.1), overlap=False), 0.5, 0.6),
        (SamplingOptions(overlap_rate=(0.25, 0.5)), 0.25, 0.375),
        (SamplingOptions(overlap_rate=(0.4, 0.4)), 0.3, 0.3),
        (SamplingOptions(overlap_rate=(0.0, 0.2)), 0.4, 9.0),
    ],
)
def test_clips_lie_as_the_options_say(
    shards_folder: Path, sampling: SamplingOptions, least: float, most: float
) -> None:
    views = [View(VIDEO), View(VIDEO, clip=1)]
    batch = take(stream(shards_folder / "train", views=views, sampling=sampling, global_batch=16), 1)[0]
    first, second = (batch.views[view].params["start_seconds"] for view in views)
    distances = second - first
    assert (distances >= least - 1e-6).all() and (distances <= most + 1e-6).all()
    assert len(set(first.tolist())) > 8
    if sampling.span_seconds == 0.0:
        assert torch.equal(batch.views[views[0]].data, batch.views[views[1]].data)


def test_a_stride_counts_frames_of_the_source(shards_folder: Path) -> None:
    """These sources have 12 frames per second: every fourth is one of 3 per second, also for the sound beside it."""
    sound = View(AudioSpec(16_000, 0.25))
    rate, stride = (View(VideoSpec(frames=3, size=32, fps=fps, stride=n)) for fps, n in ((3.0, None), (99.0, 4)))
    batches = [take(stream(shards_folder / "train", views=[v, sound], global_batch=16), 1)[0] for v in (rate, stride)]
    a, b = (batch.views[view] for batch, view in zip(batches, (rate, stride), strict=True))
    assert torch.equal(a.present, b.present) and a.present.any()
    assert torch.equal(a.data, b.data)
    assert torch.allclose(a.params["start_seconds"], b.params["start_seconds"], atol=1e-6)
    assert torch.equal(batches[0].views[sound].data, batches[1].views[sound].data)


def test_even_sampling_is_the_same_in_every_epoch(shards_folder: Path) -> None:
    views = [View(VIDEO), View(VIDEO, clip=1)]
    options = {"views": views, "sampling": SamplingOptions(rule="even"), "global_batch": 16}
    batches = take(stream(shards_folder / "train", **options), 2)
    starts = [dict(zip(b.keys, b.views[views[1]].params["start_seconds"].tolist(), strict=True)) for b in batches]
    assert starts[0] == starts[1]


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"sampling": {"gap_seconds": [3, 1]}}, "at least 3 s and at most 1 s"),
        ({"sampling": {"overlap": False, "gap_seconds": [None, -1]}}, "at least 0 s and at most -1 s"),
        ({"sampling": {"rule": "even", "span_seconds": 3}}, "belong to rule 'random'"),
        ({"sampling": {"overlap_rate": [0.5, 0.2]}}, r"overlap_rate must be \[least, most\]"),
        ({"sampling": {"overlap_rate": [0.2, 0.5], "overlap": False}}, "instead of gap_seconds and overlap"),
        ({"sampling": {"overlap_rate": [0.2, 0.5], "rule": "even"}}, "belong to rule 'random'"),
        ({"sampling": {"span_second": 3}}, r"unknown key \(did you mean 'span_seconds'"),
        ({"augmentations": {"a": {"video": {"crop": {"area": [0.9, 0.1]}}}}}, r"a\.video\.crop\.area: .*smallest"),
        ({"augmentations": {"a": {"video": {"flips": 1}}}}, r"a\.video\.flips: unknown key \(did you mean 'flip'"),
    ],
)
def test_wrong_options_name_their_path(tree: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(DataOptions, {"shards": "x", **tree})


def test_text_views_of_several_clips_are_different_captions() -> None:
    texts = [View(TextSpec(ByteTokenizer(32)), clip=k) for k in range(3)]
    samples = [Sample("five", captions=tuple("abcde")), Sample("two", captions=("d", "D  "))]
    drawn = ViewMaker(tuple(texts))
    chosen = set()
    for epoch in range(40):
        values, first = drawn(samples[0], epoch=epoch)
        words = [str(values[view].data) for view in texts]
        assert len(set(words)) == 3 and words[0] == first
        chosen.add(first)
    assert chosen == set("abcde")
    even = ViewMaker(tuple(texts), rule="even")
    made = [even(sample, epoch=0) for sample in samples]
    assert [str(made[0][0][view].data) for view in texts] == ["a", "b", "c"]
    batch = collate(
        [Row(0, "five", made[0][0], caption=made[0][1]), Row(1, "two", made[1][0], caption=made[1][1])], texts
    )
    assert [batch.views[view].present.tolist() for view in texts] == [[True, True], [True, True], [True, False]]
    numbers = torch.stack([batch.views[view].params["caption_number"] for view in texts], 1)
    # equal but for case and white space; none where there is no caption
    assert numbers[1, 0] == numbers[1, 1] == batch.groups[1, 2] and numbers[1, 2] == -1
    assert len(set(numbers[0].tolist())) == 3 and not set(numbers[0].tolist()) & set(numbers[1].tolist())


def test_a_run_trains_on_augmented_views(shards_folder: Path, tmp_path: Path) -> None:
    """The trainer applies what the stream drew, also to the batch of holes with which every start begins."""
    objective = "{name: multi_view, views: {video: 1, text: 1}, augmentation: {video: strong}}"
    config = tiny_config(
        "train.steps=2", f"objectives=[{objective}]", shards=shards_folder / "train", out=tmp_path / "run"
    )
    config = config.model_copy(update={"data": config.data.model_copy(update={"augmentations": {"strong": STRONG}})})
    trainer = Trainer(config, build_accelerator(config))
    seen: list[Batch] = []
    trainer.step_module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    trainer._settle_reducer()
    batch = next(iter(trainer.stream))
    trainer.optimizer_step([batch])
    size = config.model.towers["video"].size  # type: ignore[union-attr]
    for number, inputs in enumerate(seen):
        (view,) = (view for view in inputs.views if view.modality == "video")
        assert inputs.views[view].data.shape[-1] == size and "crop_box" in inputs.views[view].params
        assert bool(inputs.views[view].present.any()) == bool(number)
        if number:
            assert torch.equal(inputs.views[view].data, augment(batch).views[view].data)
            assert np.shape(batch.views[view].data)[-1] == round(1.5 * size)
