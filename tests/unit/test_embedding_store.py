"""Folders of embeddings: the same bytes on any number of processes, kept while they are true, made again when not."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from support.recipes import tiny_config
from support.shards import read_shards, write_shards
from typer.testing import CliRunner

import mmcl.evaluation.embed
from mmcl.cli import app
from mmcl.data import ClipStream
from mmcl.distributed import Comm
from mmcl.evaluation.embed import embed_shards, embed_to_folder
from mmcl.evaluation.embedding_store import EmbeddedItem, EmbeddedShards, join, open_embeddings
from mmcl.model import MultimodalModel
from mmcl.recipe import build_model
from mmcl.shards import load_manifest
from mmcl.types import AudioSpec, ConfigError, RunError, View


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    options = ["model.towers.video.fit=crop"]
    return build_model(tiny_config(*options))[0].save_pretrained(tmp_path_factory.mktemp("model") / "model")


@pytest.fixture(scope="module")
def shards(shards_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven samples in shards of 3, 3 and 1."""
    folder = tmp_path_factory.mktemp("seven") / "shards"
    write_shards(folder, dict(list(read_shards(shards_folder / "train").items())[:7]), max_count=3)
    return folder


@pytest.fixture(scope="module")
def whole(model: Path, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that one process wrote in one go."""
    folder = tmp_path_factory.mktemp("whole") / "emb"
    embed_to_folder(model, str(shards), folder, batch=2, in_process=True)
    return folder


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The samples that streams were asked for, as they are."""
    asked: list[int] = []

    class Watched(ClipStream):
        def __init__(self, *args: object, samples: list[int], **options: object) -> None:
            asked.extend(number for number in samples if number >= 0)
            super().__init__(*args, samples=samples, **options)

    monkeypatch.setattr(mmcl.evaluation.embed, "ClipStream", Watched)
    return asked


def test_a_folder_comes_back_as_it_was_embedded(model: Path, shards: Path, whole: Path) -> None:
    stored, direct = (
        open_embeddings(whole),
        embed_shards(MultimodalModel.from_pretrained(model), str(shards), batch=2, in_process=True),
    )
    assert len(stored) == 7 and stored.modalities == ("video", "audio", "text")
    assert [len(part.items) for part in stored] == [3, 3, 1]
    loaded = stored.load()
    assert [dataclasses.astuple(a) for a in loaded.items] == [dataclasses.astuple(b) for b in direct.items]
    assert [item.draw for item in loaded.items] == list(range(7))
    assert list(loaded.rows) == list(direct.rows) == list(loaded.owners)
    for modality, rows in direct.rows.items():
        assert torch.equal(loaded.rows[modality], rows)
        assert torch.equal(loaded.owners[modality], direct.owners[modality])
    index = json.loads((whole / "index.json").read_text())
    assert index["items"] == 7 and index["modalities"] == {"video": 32, "audio": 32, "text": 32}


def rank_folder(rank: int, world: int, model: str, shards: str, out: str) -> int:
    return len(embed_to_folder(Path(model), shards, Path(out), batch=2, in_process=True, comm=Comm.current()))


@pytest.mark.parametrize("world", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_the_same_files_on_any_number_of_processes(
    world: int, model: Path, shards: Path, whole: Path, tmp_path: Path, gloo
) -> None:
    assert gloo(world, rank_folder, str(model), str(shards), str(tmp_path / "emb")) == [7] * world
    assert digests(tmp_path / "emb") == digests(whole)


def test_an_interrupted_run_goes_on_with_the_shards_that_are_left(
    model: Path, shards: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoded: list[int]
) -> None:
    class FullError(Exception):
        pass

    write = mmcl.evaluation.embed.EmbeddingStore.write

    def stopping(self: object, shard: int, part: EmbeddedShards) -> None:
        if shard == 1:
            raise FullError
        write(self, shard, part)

    with monkeypatch.context() as patch, pytest.raises(FullError):
        patch.setattr(mmcl.evaluation.embed.EmbeddingStore, "write", stopping)
        embed_to_folder(model, str(shards), tmp_path / "emb", batch=2, in_process=True)
    with pytest.raises(ConfigError, match="unfinished embeddings: run the same command again"):
        open_embeddings(tmp_path / "emb")
    encoded.clear()
    embed_to_folder(model, str(shards), tmp_path / "emb", batch=2, in_process=True)
    assert encoded == [3, 4, 5, 6]
    assert digests(tmp_path / "emb") == digests(whole)
    encoded.clear()
    embed_to_folder(model, str(shards), tmp_path / "emb", batch=2, in_process=True)
    assert encoded == []


def test_what_changed_is_embedded_again_and_nothing_else(
    model: Path, shards: Path, whole: Path, tmp_path: Path, encoded: list[int]
) -> None:
    out, changed = tmp_path / "emb", tmp_path / "shards"
    shutil.copytree(whole, out)

    def embedded(model: Path, shards: Path, **options: object) -> list[int]:
        encoded.clear()
        embed_to_folder(model, str(shards), out, in_process=True, batch=2, **options)
        return list(encoded)

    samples = read_shards(shards)
    last = list(samples)[-1]
    samples[last] = {**samples[last], "json": json.dumps({"caption": "another one", "label": 3}).encode()}
    write_shards(changed, samples, max_count=3)
    assert embedded(model, changed) == [6]
    assert open_embeddings(out).load().items[-1].label == 3
    assert embedded(model, changed, clips=2) == list(range(7)), "other settings"
    other = tmp_path / "model"
    torch.manual_seed(1)
    build_model(tiny_config())[0].save_pretrained(other)
    assert embedded(other, changed, clips=2) == list(range(7)), "another model"
    damaged = out / "shard-000001.jsonl"
    damaged.write_text(damaged.read_text().replace("caption", "capti0n"))
    assert embedded(other, changed, clips=2) == [3, 4, 5], "items that are not those of the rows"
    write_shards(tmp_path / "fewer", dict(list(samples.items())[:3]), max_count=3)
    assert embedded(other, tmp_path / "fewer", clips=2) == []
    assert not (out / "shard-000001.jsonl").exists() and not (out / "shard-000001.safetensors").exists()


def test_three_crops_and_windows_are_kept_or_averaged(model: Path, shards: Path) -> None:
    """Each view is the row of its own window and crop; their mean is what is embedded without."""
    loaded = MultimodalModel.from_pretrained(model)

    def embedded(**options: object) -> EmbeddedShards:
        return embed_shards(loaded, str(shards), batch=4, in_process=True, **options)

    kept, mean, centre = embedded(clips=2, crops=3, each_view=True), embedded(clips=2, crops=3), embedded(clips=2)
    assert kept.rows["video"].shape == (7, 6, 32) and kept.rows["audio"].shape[1:] == (2, 32)
    unit = torch.nn.functional.normalize(kept.rows["video"].mean(1), dim=-1)
    assert torch.allclose(unit, mean.rows["video"], atol=1e-6)
    middle = torch.nn.functional.normalize(kept.rows["video"][:, [1, 4]].mean(1), dim=-1)
    assert torch.allclose(middle, centre.rows["video"], atol=1e-6)
    assert not torch.allclose(kept.rows["video"][:, 0], kept.rows["video"][:, 2], atol=1e-4)
    assert torch.equal(mean.rows["audio"], centre.rows["audio"])


def test_crops_that_cannot_be_are_refused(shards: Path) -> None:
    model = build_model(tiny_config("model.towers.video.fit=squash"))[0]
    with pytest.raises(ConfigError, match="crops=3: the tower 'video' scales both sides"):
        embed_shards(model, str(shards), crops=3, in_process=True)
    with pytest.raises(ConfigError, match="crops=2; allowed: 1, 3"):
        embed_shards(model, str(shards), crops=2, in_process=True)


def test_equal_captions_have_equal_rows_wherever_they_were_encoded() -> None:
    def part(draw: int, captions: tuple[str, ...], rows: list[list[float]]) -> EmbeddedShards:
        item = EmbeddedItem(f"k{draw}", draw, captions, -1, {})
        return EmbeddedShards(
            (item,), {"text": torch.tensor(rows)}, {"text": torch.zeros(len(rows), dtype=torch.int64)}
        )

    joined = join([part(0, ("a", "b"), [[1.0], [2.0]]), part(1, ("c",), [[3.0]]), part(2, ("b", "a"), [[2.1], [1.1]])])
    assert joined.rows["text"].squeeze(1).tolist() == [1.0, 2.0, 3.0, 2.0, 1.0]
    assert joined.owners["text"].tolist() == [0, 0, 1, 2, 2]


def test_samples_are_read_in_the_order_given(shards: Path) -> None:
    view = View(AudioSpec(8000, 0.5))
    options = {"global_batch": 2, "rule": "even", "in_process": True}
    keys = list(read_shards(shards))
    stream = ClipStream(load_manifest(shards), [view], shuffle=False, samples=[5, -1, 0, 0, 3], **options)
    found = [key for batch in stream for key in batch.keys]
    assert found == [keys[5], "", keys[0], keys[0], keys[3], ""]
    with pytest.raises(ValueError, match="shuffle=False"):
        ClipStream(load_manifest(shards), [view], samples=[1], **options)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"name": "../x"}, "damaged.*is not a name"),
        ({"items": 9}, "damaged.*9 items of 3 samples"),
        ({"version": 2}, "embeddings of version 2"),
        ({"format": "x"}, "not a folder that `mmcl embed` wrote"),
        ({"model": None, "shards": 3}, "damaged"),
    ],
)
def test_an_index_that_says_what_cannot_be(whole: Path, tmp_path: Path, change: dict[str, object], words: str) -> None:
    index = json.loads((whole / "index.json").read_text())
    index.update({name: value for name, value in change.items() if name in index})
    if not change.keys() & index.keys() - {"items"}:
        index["shards"][0].update(change)
    (tmp_path / "index.json").write_text(json.dumps(index))
    with pytest.raises(ConfigError, match=words):
        open_embeddings(tmp_path)


def test_files_that_do_not_belong_together(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "emb")
    items = tmp_path / "emb/shard-000000.jsonl"
    items.write_text("".join(items.read_text().splitlines(keepends=True)[:1]))
    with pytest.raises(ConfigError, match=r"shard-000000.*do not belong together"):
        open_embeddings(tmp_path / "emb").shard(0)
    items.write_text('{"key": 3}\n')
    with pytest.raises(ConfigError, match=r"shard-000000\.jsonl:1: not an item"):
        open_embeddings(tmp_path / "emb").shard(0)


def test_rows_are_mapped_not_read(whole: Path) -> None:
    """The file is a mapping of this process while its rows are in use."""
    part = open_embeddings(whole).shard(0)
    assert str(whole / "shard-000000.safetensors") in Path("/proc/self/maps").read_text()
    assert np.isfinite(part.rows["video"].numpy()).all()


def test_shards_without_a_readable_sample(model: Path, tmp_path: Path) -> None:
    write_shards(tmp_path / "bad", {"a": {"mp4": b"nothing"}})
    with pytest.raises(RunError, match="none of 1 samples could be read"):
        embed_to_folder(model, str(tmp_path / "bad"), tmp_path / "emb", in_process=True)


def test_the_command_takes_views(model: Path, shards: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "emb")
    options = ["--clips", "2", "--crops", "3", "--pooled", "--each-view", "--workers", "1"]
    done = CliRunner().invoke(app, ["embed", str(model), str(shards), "--out", out, *options], catch_exceptions=False)
    assert done.exit_code == 0 and "7 samples embedded" in done.output
    assert open_embeddings(out).shard(0).rows["video"].shape[:2] == (3, 6)
