"""Search in embedded shards: the order of all cosines, one line for what does not fit, faiss, the command."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from support.recipes import tiny_config

import mmcl.search
import mmcl.search_faiss
from mmcl.cli import app
from mmcl.evaluation.embed import embed_to_folder
from mmcl.recipe import build_model
from mmcl.search import Index, search
from mmcl.shards.embedding_files import EmbeddingFile, EmbeddingIndex
from mmcl.types import ConfigError

WIDTH = 8


def make_index(folder: Path, sizes: list[int], *, captions: int = 2, level: str = "joint", views: int = 1) -> Path:
    """A folder of random rows: a video row for each item, some captions each, text rows grouped by item."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(len(sizes))
    files = []
    for shard, size in enumerate(sizes):
        video = F.normalize(torch.randn(size, views, WIDTH, generator=generator), dim=-1)
        tensors = {
            "video.rows": video if views > 1 else video[:, 0],
            "video.items": torch.arange(size),
            "text.rows": F.normalize(torch.randn(size * captions, WIDTH, generator=generator), dim=-1),
            "text.items": torch.arange(size).repeat_interleave(captions),
        }
        save_file({name: value.contiguous() for name, value in tensors.items()}, folder / f"s{shard}.safetensors")
        lines = [
            {
                "key": f"k{shard}_{item}",
                "index": item,
                "captions": [f"caption {shard} {item} {number}" for number in range(captions)],
                "label": -1,
                "metadata": {},
            }
            for item in range(size)
        ]
        (folder / f"s{shard}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        files.append(EmbeddingFile(f"s{shard}.tar", f"s{shard}", "0", size, size))
    EmbeddingIndex(folder, "m" * 32, {"level": level}, {"video": WIDTH, "text": WIDTH}, tuple(files)).write()
    return folder


def all_rows(folder: Path, modality: str, shards: int) -> torch.Tensor:
    return torch.cat([load_file(folder / f"s{n}.safetensors")[f"{modality}.rows"] for n in range(shards)])


def test_exact_search_is_the_order_of_all_cosines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mmcl.search, "CHUNK_ROWS", 7)
    sizes = [20, 0, 33, 5]
    folder = make_index(tmp_path / "index", sizes)
    index = Index.open(folder)
    assert (len(index), index.modalities, index.default_modality) == (58, ("video", "text"), "video")
    queries = torch.randn(3, WIDTH)
    names = [f"k{shard}_{item}" for shard, size in enumerate(sizes) for item in range(size)]
    for modality, per in (("video", 1), ("text", 2)):
        scores = F.normalize(queries, dim=-1) @ all_rows(folder, modality, 4).T
        best = scores.reshape(3, -1, per).amax(2)  # of an item, its best row
        order = best.argsort(dim=1, descending=True)
        for top in (1, 10, 100):
            found = index.query(queries, top, modality=modality)
            for hits, wanted, row in zip(found, order.tolist(), best, strict=True):
                assert [hit.key for hit in hits] == [names[item] for item in wanted[:top]]
                np.testing.assert_allclose([hit.score for hit in hits], row[wanted[:top]], atol=1e-5)
    hit = index.query(all_rows(folder, "text", 4)[[2 * 30 + 1]], 1, modality="text")[0][0]
    assert (hit.key, hit.shard, hit.index, hit.caption) == ("k2_10", "s2.tar", 10, "caption 2 10 1")


def test_many_captions_of_one_item_are_one_hit(tmp_path: Path) -> None:
    index = Index.open(make_index(tmp_path / "index", [4, 4], captions=30))
    hits = index.query(torch.randn(1, WIDTH), 8, modality="text")[0]
    assert len({hit.key for hit in hits}) == 8


def test_no_rows_no_hits(tmp_path: Path) -> None:
    index = Index.open(make_index(tmp_path / "index", [3], captions=0))
    for method in ("exact", "faiss"):
        assert index.query(torch.randn(2, WIDTH), modality="text", method=method) == [[], []]


def test_each_view_of_an_item_counts(tmp_path: Path) -> None:
    folder = make_index(tmp_path / "index", [6, 5], views=3)
    rows = all_rows(folder, "video", 2)
    hits = Index.open(folder).query(rows[[7]][:, 2], 11)[0]
    assert hits[0].key == "k1_1" and hits[0].score == pytest.approx(1.0, abs=1e-5)
    assert len({hit.key for hit in hits}) == 11


def test_what_does_not_fit_is_one_line(tmp_path: Path) -> None:
    folder = make_index(tmp_path / "index", [5])
    index = Index.open(folder)
    with pytest.raises(ConfigError, match=r"modality: unknown name 'vidoe' \(did you mean 'video'"):
        index.query(torch.randn(1, WIDTH), modality="vidoe")
    with pytest.raises(ConfigError, match=r"queries have 4 numbers, video rows of .* have 8"):
        index.query(torch.randn(1, 4))
    with pytest.raises(ConfigError, match="finite float rows"):
        index.query(torch.full((1, WIDTH), float("nan")))
    with pytest.raises(ConfigError, match=r"unknown name 'fais' \(did you mean 'faiss'"):
        index.query(torch.randn(1, WIDTH), method="fais")
    with pytest.raises(ConfigError, match="the model that made it is not named; say --checkpoint"):
        search(index, "a dog")
    with pytest.raises(ConfigError, match="--pooled"):
        Index.open(make_index(tmp_path / "pooled", [5], level="pooled"))
    (folder / "s0.safetensors").write_bytes((folder / "s0.safetensors").read_bytes()[:-8])
    with pytest.raises(ConfigError, match=r"s0\.safetensors: cannot be read"):
        Index.open(folder).query(torch.randn(1, WIDTH))
    (folder / "index.json").unlink()
    with pytest.raises(ConfigError, match="unfinished"):
        Index.open(folder)


def test_rows_that_point_past_the_items_are_refused(tmp_path: Path) -> None:
    folder = make_index(tmp_path / "index", [5])
    tensors = load_file(folder / "s0.safetensors")
    tensors["video.items"] = tensors["video.items"] + 10_000
    save_file(tensors, folder / "s0.safetensors")
    with pytest.raises(ConfigError, match="do not belong together"):
        Index.open(folder).query(torch.randn(1, WIDTH))


def test_faiss_is_built_once_and_again_when_rows_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("faiss")
    monkeypatch.setattr(mmcl.search_faiss, "FLAT_ROWS", 200)  # so that lists are learned
    folder = make_index(tmp_path / "index", [300, 100])
    queries = torch.randn(20, WIDTH)
    index = Index.open(folder)
    exact, near = index.query(queries, 5), index.query(queries, 5, method="faiss")
    shared = [len({a.key for a in one} & {b.key for b in other}) for one, other in zip(exact, near, strict=True)]
    assert sum(shared) >= 0.6 * 5 * 20
    scores = {hit.key: hit.score for hit in exact[0]}
    assert all(hit.score == pytest.approx(scores.get(hit.key, hit.score), abs=1e-5) for hit in near[0])
    kept = folder / "faiss/video.faiss"
    made = kept.stat().st_mtime_ns
    assert Index.open(folder).query(queries, 5, method="faiss") == near
    assert kept.stat().st_mtime_ns == made
    tensors = load_file(folder / "s1.safetensors")
    tensors["video.rows"][:] = queries[0] / queries[0].norm()
    save_file(tensors, folder / "s1.safetensors")
    assert Index.open(folder).query(queries[:1], 3, method="faiss")[0][2].score == pytest.approx(1.0, abs=1e-5)
    assert kept.stat().st_mtime_ns > made
    kept.write_bytes(kept.read_bytes()[:1000])  # cut short: built again
    assert Index.open(folder).query(queries[:1], 3, method="faiss")[0][2].score == pytest.approx(1.0, abs=1e-5)


@pytest.fixture(scope="module")
def embedded(shards_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model, and what it made of the test shards."""
    torch.manual_seed(0)
    model = build_model(tiny_config())[0].export(tmp_path_factory.mktemp("model") / "model")
    out = model.parent / "emb"
    embed_to_folder(model, str(shards_folder / "test"), out, workers=0, in_process=True)
    return model, out


def test_the_command_finds_by_text_picture_and_sound(
    embedded: tuple[Path, Path], media_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, index = embedded
    clip = json.loads(next(index.glob("*.jsonl")).read_text().splitlines()[0])
    caption = clip["captions"][0]
    app(["search", str(index), caption, "--modality", "text", "--top", "2", "--json"], standalone_mode=False)
    first = json.loads(capsys.readouterr().out)[0]
    assert first["caption"] == caption and first["score"] == pytest.approx(1.0, abs=1e-5)
    file = next(path for path in media_folder.glob("*.mp4") if path.stem in clip["key"] or clip["key"] in path.stem)
    for modality in ("video", "audio"):
        options = ["--modality", modality, "--checkpoint", str(model)]
        app(["search", str(index), str(file), *options], standalone_mode=False)
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == min(10, len(Index.open(index)))
    app(["search", str(index), str(file), "--top", "1"], standalone_mode=False)
    assert clip["key"] in capsys.readouterr().out  # its own picture, by the checkpoint that the index names


def test_the_index_knows_its_model(embedded: tuple[Path, Path], tmp_path: Path) -> None:
    model, index = embedded
    other = build_model(tiny_config())[0].export(tmp_path / "other")
    with pytest.raises(ConfigError, match=r"was made by the model [0-9a-f]{12}…, .*other is [0-9a-f]{12}…; embed"):
        search(Index.open(index), "a red clip", checkpoint=other)
    with pytest.raises(ConfigError, match=r"dog\.mp4: no such file"):
        search(Index.open(index), "dog.mp4", checkpoint=model)
    with pytest.raises(ConfigError, match=r"index\.json: not_media"):
        search(Index.open(index), str(index / "index.json"), checkpoint=model)
    assert search(Index.open(index), "x" * 5000, checkpoint=model, top=1)[0].modality == "video"
