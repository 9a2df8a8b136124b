"""Embeddings stored in shards: written, read, refused where they are not what they say, and used as a teacher."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.recipes import ROOT, tiny_config
from support.shards import read_shards, write_shards
from typer.testing import CliRunner

import mmcl
from mmcl.cli import app
from mmcl.data import ClipStream
from mmcl.evaluation.embed import embed_shards
from mmcl.model import MultimodalModel
from mmcl.recipe import RunConfig, build_model
from mmcl.shards import load_manifest
from mmcl.shards.reshard import ReshardOptions, reshard
from mmcl.shards.vectors import MAX_VECTOR_BYTES, load_embeddings, read_vector, write_vector
from mmcl.shards.verify import verify_shards
from mmcl.training.launch import pretrain
from mmcl.types import ConfigError, SampleError, VectorSpec, View

SPEC = VectorSpec("sound", 6)


def npy(array: np.ndarray, **options: object) -> bytes:
    file = io.BytesIO()
    np.save(file, array, **options)  # type: ignore[arg-type]
    return file.getvalue()


def test_a_vector_goes_round() -> None:
    vector = np.linspace(-1, 1, 6, dtype=np.float32)
    np.testing.assert_array_equal(read_vector(write_vector(vector), 6), vector)
    assert write_vector(vector) == npy(vector)
    for other in (vector.astype(np.float64), vector[None], vector.astype(">f4")):
        np.testing.assert_array_equal(read_vector(npy(other), 6), vector)


def header(text: str, *, magic: bytes = b"\x93NUMPY\x01\x00") -> bytes:
    return magic + len(text).to_bytes(2, "little") + text.encode()


HOSTILE = {
    "an object array": (npy(np.array([print, 1], dtype=object), allow_pickle=True), "not an .npy file of one"),
    "integers": (npy(np.arange(6)), "not an .npy file of one"),
    "a matrix": (npy(np.zeros((2, 3))), "not an .npy file of one"),
    "nothing": (npy(np.zeros(0)), "not an .npy file of one"),
    "a number": (npy(np.zeros(())), "not an .npy file of one"),
    "another width": (npy(np.zeros(7)), "7 numbers, the tower is 6 wide"),
    "not finite": (npy(np.array([0, 1, np.nan, 0, 0, 0])), "not all finite"),
    "too large for 32 bits": (npy(np.full(6, 1e300)), "not all finite"),
    "cut": (npy(np.zeros(6))[:-1], "47 bytes for 6 numbers"),
    "trailing": (npy(np.zeros(6)) + b"x", "49 bytes for 6 numbers"),
    "a terabyte": (header("{'descr': '<f8', 'fortran_order': False, 'shape': (10**11,), }"), "not an .npy file of one"),
    "more than there is": (header("{'descr': '<f8', 'fortran_order': False, 'shape': (9000000,), }"), "0 bytes for"),
    "negative": (header("{'descr': '<f8', 'fortran_order': False, 'shape': (-1,), }"), "not an .npy file of one"),
    "an expression": (header("__import__('os').system('true')"), "not an .npy file of one"),
    "nested": (header("(" * 5000), "not an .npy file of one"),
    "another version": (b"\x93NUMPY\x07\x00" + b"\0" * 90, "not an .npy file of one"),
    "empty": (b"", "not an .npy file of one"),
    "text": (b"[0.1, 0.2]", "not an .npy file of one"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_no_vector_is_refused_before_it_is_read(name: str) -> None:
    data, message = HOSTILE[name]
    with pytest.raises(SampleError, match=message) as caught:
        read_vector(data, 6)
    assert caught.value.reason == "bad_embedding"


def test_a_large_file_is_not_looked_at() -> None:
    with pytest.raises(SampleError, match="too_large"):
        read_vector(bytes(MAX_VECTOR_BYTES + 1))


@settings(max_examples=60)
@given(st.integers(0, 200), st.binary(min_size=1, max_size=4))
def test_damage_is_a_sample_error_or_a_vector(place: int, change: bytes) -> None:
    data = bytearray(npy(np.linspace(0, 1, 6)))
    data[place : place + len(change)] = change
    with contextlib.suppress(SampleError):
        assert read_vector(bytes(data)).dtype == np.float32


@pytest.fixture(scope="module")
def embedded(shards_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(what `mmcl embed` wrote with the towers of an untrained model, the shards with its audio rows attached)."""
    folder = tmp_path_factory.mktemp("embedded")
    torch.manual_seed(7)
    build_model(tiny_config())[0].save_pretrained(folder / "model")
    shards = shards_folder / "train"
    commands = [
        ["embed", str(folder / "model"), str(shards), "--out", str(folder / "emb"), "--workers", "1"],
        ["shards", "reshard", str(shards), "--out", str(folder / "new"), "--attach", f"sound={folder / 'emb'}:audio"],
    ]
    for command in commands:
        done = CliRunner().invoke(app, command, catch_exceptions=False)
        assert done.exit_code == 0, done.output
    assert "sound.npy: 14 of 16 samples" in done.output
    return folder / "emb", folder / "new"


def test_embeddings_come_back_from_the_shards_as_rows(embedded: tuple[Path, Path], shards_folder: Path) -> None:
    folder, shards = embedded
    rows = load_embeddings(folder, "audio")
    plain, attached = read_shards(shards_folder / "train"), read_shards(shards)
    assert plain.keys() == attached.keys() and len(rows) == 14, "two clips are silent"
    for key, members in attached.items():
        vector = members.pop("sound.npy", None)
        assert members == plain[key]
        assert (vector is not None) == (key in rows)
    assert verify_shards(shards).ok
    view = View(VectorSpec("sound", 32))
    stream = ClipStream(load_manifest(shards), [view], global_batch=16, shuffle=False, in_process=True)
    batch = next(iter(stream))
    for number, key in enumerate(plain):  # a sample with nothing else to see is a hole
        here = bool(batch.views[view].present[number])
        assert here == (key in rows)
        np.testing.assert_array_equal(batch.views[view].data[number], rows[key] if here else np.zeros(32))


@pytest.mark.parametrize(
    ("attach", "message"),
    [
        ({"Sound": "emb:audio"}, "attach='Sound': small letters"),
        ({"sound": "{emb}:depth"}, "no embeddings of 'depth'; there are: audio, text, video"),
        ({"sound": "{emb}/no:audio"}, "not a folder that `mmcl embed` wrote"),
    ],
)
def test_what_cannot_be_attached(
    embedded: tuple[Path, Path], tmp_path: Path, attach: dict[str, str], message: str
) -> None:
    places = {name: place.format(emb=embedded[0]) for name, place in attach.items()}
    with pytest.raises(ConfigError, match=message):
        reshard([embedded[1]], tmp_path / "out", ReshardOptions(attach=places))
    assert not (tmp_path / "out").exists()
    write_shards(tmp_path / "others", {"stranger": {"txt": b"a"}})
    with pytest.raises(ConfigError, match=r"attach: sound=.*none of the 1 keys"):
        reshard([tmp_path / "others"], tmp_path / "out", ReshardOptions(attach={"sound": f"{embedded[0]}:audio"}))
    for wrong in ("sound", "sound=emb", "=emb:audio"):
        assert CliRunner().invoke(app, ["shards", "reshard", "x", "--out", "y", "--attach", wrong]).exit_code


def config(shards: Path, out: Path, *overrides: str) -> RunConfig:
    path = ROOT / "configs/pretrain/precomputed_teachers.yaml"
    places = [f"data.shards={shards}", f"train.out={out}", "data.decoder=pyav", "data.in_process=true"]
    return mmcl.load_config(path, [*places, "train.threads=1", "train.global_batch=8", *overrides])


def test_a_damaged_embedding_is_a_hole_and_a_missing_one_an_absent_row(
    embedded: tuple[Path, Path], tmp_path: Path
) -> None:
    samples = read_shards(embedded[1])
    first = next(key for key, members in samples.items() if "sound.npy" in members)
    samples[first]["sound.npy"] = b"damaged"
    write_shards(tmp_path / "shards", samples)
    assert [(f.key, f.reason) for f in verify_shards(tmp_path / "shards").findings] == [(first, "bad_embedding")]
    pretrain(config(tmp_path / "shards", tmp_path / "run", "train.steps=2"))
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["skipped"] == 1
    assert "bad_embedding" in (tmp_path / "run/skipped.jsonl").read_text()


def test_embeddings_teach_as_the_frozen_tower_that_made_them(embedded: tuple[Path, Path], tmp_path: Path) -> None:
    """A run with the stored rows as its teacher; they are in no checkpoint, and not searched in."""
    pretrain(config(embedded[1], tmp_path / "run", "train.steps=3", "train.log_every=1"))
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert lines[0]["compositional_distillation/pairs/sound"] + lines[1]["compositional_distillation/pairs/sound"] == 14
    assert all(line["compositional_distillation/loss/composition/sound"] > 0 for line in lines)
    model = MultimodalModel.from_pretrained(tmp_path / "run")
    assert not [name for name in model.state_dict() if name.startswith("towers.sound")]
    found = embed_shards(model, str(embedded[1]), workers=1, in_process=True, decoder="pyav")
    assert "sound" not in found.rows and "video" in found.rows


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.towers.sound.member=audio"], r"model\.towers\.sound\.member: .*modality of its own"),
        (["model.towers.sound.member=A.b"], r"model\.towers\.sound\.member: .*pattern"),
        (["model.towers.sound.lock=none"], r"objectives\.0\.teachers\.0: the teacher 'sound' is not frozen"),
        (["objectives.0.level=joint"], r"objectives\.0\.level: joint, but 'sound' holds stored embeddings"),
        (["objectives=[{name: intra_modal, tower: sound, method: {name: simclr}}]"], "tower: .*have no views"),
        (
            ["objectives=[{name: distillation, method: attention_transfer, teacher: sound}]"],
            "the teacher 'sound' offers attention_transfer no level 'tokens'; allowed: none",
        ),
    ],
)
def test_what_stored_embeddings_cannot_do(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_model(config(Path("shards"), Path("run"), *overrides))


@pytest.mark.slow
@pytest.mark.parametrize(
    "objective",
    [
        "{name: contrastive_distillation, teacher: sound, slots: 64, negatives: 32}",
        "{name: distillation, method: relational, teacher: sound}",
        "{name: compositional_distillation, teachers: [sound, audio], teacher_weight: 0.5}",
    ],
)
def test_every_kind_of_distillation_takes_them(embedded: tuple[Path, Path], tmp_path: Path, objective: str) -> None:
    more = [
        "model.towers.audio={name: tiny_audio, width: 32, channels: 16, seconds: 0.5, lock: with_head}",
    ]
    pretrain(config(embedded[1], tmp_path / "run", f"objectives=[{objective}]", *more, "train.steps=1"))
    (line,) = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert line["loss"] > 0
