"""Samples damaged in eight ways, one decoder dying of some of them: the run ends, nobody is lost."""

from __future__ import annotations

import io
import itertools
import json
import tarfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from support.media import encode, tone, write_clip
from support.recipes import tiny_overrides
from support.watched_run import launch_watched

from mmcl.data import ClipStream
from mmcl.shards import load_manifest
from mmcl.shards.index import index_shards
from mmcl.types import Decoder, VideoSpec, View

pytestmark = pytest.mark.slow

SAMPLES, DAMAGED_EVERY, EPOCHS = 2_000, 20, 2
WAYS = ("truncated", "bit_flipped", "damaged_moov", "zeroed", "wrong_extension", "empty", "audio_only", "text_only")
MAYBE = {"bit_flipped", "zeroed"}
"""a decoder may conceal these: then the sample is a good one"""
PICTURES = "objectives=[{name: intra_modal, tower: video, method: {name: simclr, hidden: 16, out: 8}}]"
VIEWS = (View(VideoSpec(frames=2, size=32, fps=4.0)),)


def damage(way: str, good: bytes, sound: bytes, seed: int) -> dict[str, bytes]:
    """The members of a sample that is damaged in one way, differently for each seed."""
    rng = np.random.default_rng(seed)
    data = np.frombuffer(good, np.uint8).copy()
    moov, mdat = good.index(b"moov"), good.index(b"mdat")
    if way == "truncated":
        data = data[: rng.integers(len(data) // 4, 3 * len(data) // 4)]
    elif way == "bit_flipped":
        data[rng.integers(mdat + 8, len(data), len(data) // 20)] ^= 1 << 3
    elif way == "damaged_moov":
        data[moov + 8 : moov + 608] = rng.integers(0, 256, 600)
    elif way == "zeroed":
        data[mdat + 8 : (mdat + moov) // 2] = 0
    elif way == "wrong_extension":
        return {"mp4": b"GIF89a" + rng.bytes(500), "txt": b"wrong"}
    elif way == "empty":
        data = data[:0]
    elif way == "audio_only":
        return {"mp4": sound, "txt": b"sound alone"}
    else:
        return {"txt": b"text alone"}
    return {"mp4": data.tobytes(), "txt": way.encode()}


@pytest.fixture(scope="module")
def chaos(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """2,000 samples in uneven shards, one in twenty damaged; which, and how."""
    folder = tmp_path_factory.mktemp("chaos")
    media = tmp_path_factory.mktemp("media")
    clips = [
        write_clip(media / f"{colour}.mp4", colour=colour, seconds=1.0).read_bytes()
        for colour in ("red", "green", "blue")
    ]
    sound = encode(media / "sound.mp4", None, tone(440, 1.0, 16_000)).read_bytes()
    damaged: dict[str, str] = {}
    starts = [0, 90, 500, 1137, 1138, 1999, SAMPLES]
    for shard, (start, stop) in enumerate(itertools.pairwise(starts)):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for number in range(start, stop):
                key, good = f"sample{number:04d}", clips[number % len(clips)]
                members = {"mp4": good, "txt": b"a caption"}
                if number % DAMAGED_EVERY == 7:
                    damaged[key] = WAYS[number // DAMAGED_EVERY % len(WAYS)]
                    members = damage(damaged[key], good, sound, number)
                for extension, content in members.items():
                    info = tarfile.TarInfo(f"{key}.{extension}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    index_shards(folder)
    assert len(damaged) == SAMPLES // DAMAGED_EVERY
    return folder, damaged


def assert_each_once(
    seen: Sequence[Counter[str]], named: Sequence[Counter[str]], damaged: Mapping[str, str], decoder: str
) -> None:
    """In each epoch every sample is either given or named, once; good ones are given, bad ones named."""
    everything = {f"sample{number:04d}" for number in range(SAMPLES)}
    for once, bad in zip(seen, named, strict=True):
        assert Counter(once + bad) == Counter(everything)
        assert everything - damaged.keys() <= once.keys()
        assert {key for key, way in damaged.items() if way not in MAYBE} <= bad.keys()
        print(f"{decoder} conceals: {Counter(damaged[key] for key in damaged.keys() & once.keys())}")


@pytest.mark.parametrize("decoder", ["decord", "pyav"])
def test_every_good_sample_once_and_every_bad_one_named(
    chaos: tuple[Path, dict[str, str]], tmp_path: Path, decoder: Decoder
) -> None:
    folder, damaged = chaos
    streams = [
        ClipStream(
            load_manifest(folder),
            VIEWS,
            global_batch=40,
            rank=rank,
            world_size=2,
            workers=2,
            decoder=decoder,
            timeout_seconds=30,
            quarantine_file=tmp_path / "quarantine.jsonl",
        )
        for rank in range(2)
    ]
    seen: list[Counter[str]] = [Counter() for _ in range(EPOCHS)]
    named: list[Counter[str]] = [Counter() for _ in range(EPOCHS)]
    for step, batches in zip(range(EPOCHS * SAMPLES // 40), zip(*streams, strict=True), strict=False):
        epoch = step * 40 // SAMPLES
        for batch in batches:
            seen[epoch].update(key for key in batch.keys if key)
            named[epoch].update(key for _, key, _, _ in batch.skipped)
        for stream in streams:  # as the trainer does when it logs
            stream.add_quarantine(streams[0].quarantine | streams[1].quarantine)
    assert_each_once(seen, named, damaged, decoder)
    assert streams[0].quarantine <= damaged.keys()
    assert decoder == "decord" or not streams[0].quarantine


def test_the_deaths_of_a_real_decoder(tmp_path: Path) -> None:
    """A few wrong bytes in the index of a file: decord dies of one in twenty of them, and takes nobody with it."""
    good = write_clip(tmp_path / "good.mp4", colour="red", seconds=1.0).read_bytes()
    moov, count = good.index(b"moov"), 120
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for number in range(count):
            rng = np.random.default_rng(4 * number)
            data = np.frombuffer(good, np.uint8).copy()
            data[rng.integers(moov + 8, len(data), 3)] = rng.integers(0, 256, 3)
            info = tarfile.TarInfo(f"sample{number:04d}.mp4")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data.tobytes()))
    index_shards(tmp_path)
    source = ClipStream(load_manifest(tmp_path), VIEWS, global_batch=24, workers=2, decoder="decord")
    batches = list(itertools.islice(iter(source), count // 24))
    keys = [key for batch in batches for key in batch.keys if key]
    keys += [key for batch in batches for _, key, _, _ in batch.skipped]
    assert Counter(keys) == Counter(f"sample{number:04d}" for number in range(count))
    assert source.quarantine, "no file of these ended the decoder: choose others"
    assert source.quarantine == {k for batch in batches for _, k, reason, _ in batch.skipped if reason == "quarantined"}


@pytest.mark.parametrize("decoder", ["decord", "pyav"])
def test_a_run_on_two_ranks_ends(chaos: tuple[Path, dict[str, str]], tmp_path: Path, decoder: Decoder) -> None:
    """Trained on pictures alone, so that all eight ways are bad; each rank notes what it is given."""
    folder, damaged = chaos
    changes = ["data.in_process=false", "data.workers=2", f"data.decoder={decoder}", "train.global_batch=40"]
    changes += [f"train.steps={EPOCHS * SAMPLES // 40}"]
    ranks = launch_watched(tmp_path / "given", *tiny_overrides(PICTURES, *changes, shards=folder, out=tmp_path / "run"))
    seen: list[Counter[str]] = [Counter() for _ in range(EPOCHS)]
    named: list[Counter[str]] = [Counter() for _ in range(EPOCHS)]
    for batches in ranks:
        assert len(batches) == EPOCHS * SAMPLES // 40
        for batch in batches:
            holes = {draw: key for draw, key, _, _ in batch["skipped"]}
            for draw, key in zip(batch["draws"], batch["keys"], strict=True):
                (seen if key else named)[draw // SAMPLES][key or holes.get(draw, f"draw {draw}, unnamed")] += 1
    assert_each_once(seen, named, damaged, decoder)
    skipped = [json.loads(line) for line in (tmp_path / "run/skipped.jsonl").read_text().splitlines()]
    logged: list[Counter[str]] = [Counter() for _ in range(EPOCHS)]
    for entry in skipped:
        logged[entry["draw"] // SAMPLES][entry["key"]] += 1
    assert logged == named
    last = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1])
    assert (last["samples"], last["skipped"]) == (EPOCHS * SAMPLES, len(skipped))
