"""From a model and shards to a report: everything embedded once, lists by a column, commands that say what is wrong."""

from __future__ import annotations

import dataclasses
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from support.recipes import tiny_config

from mmcl.distributed import Comm
from mmcl.evaluation.embed import EmbeddedShards, embed_shards, embed_to_folder
from mmcl.evaluation.run import caption_labels, evaluate_checkpoint, group_names, split_lists
from mmcl.evaluation.shard_gallery import CLIP_FRAMES, ShardGallery
from mmcl.media.audio import read_audio
from mmcl.model import MultimodalModel
from mmcl.recipe import build_model
from mmcl.shards import load_manifest
from mmcl.types import ConfigError, RunError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return build_model(tiny_config())[0].export(tmp_path_factory.mktemp("model") / "model")


@pytest.fixture(scope="module")
def embedded(folder: Path, shards_folder: Path) -> EmbeddedShards:
    return embed_shards(MultimodalModel.from_pretrained(folder), str(shards_folder / "train"), batch=5, workers=1)


def test_everything_is_embedded_once_in_the_order_of_the_shards(embedded: EmbeddedShards) -> None:
    assert [item.draw for item in embedded.items] == list(range(16))
    assert len({item.key for item in embedded.items}) == 16
    assert embedded.rows["video"].shape == (16, 32)
    assert embedded.owners["video"].tolist() == list(range(16))
    assert len(embedded.rows["audio"]) == 14, "two clips have no sound"
    for rows in embedded.rows.values():
        assert torch.allclose(rows.norm(dim=1), torch.ones(len(rows)), atol=1e-6)


def test_features_before_the_heads_for_probes(folder: Path, shards_folder: Path, embedded: EmbeddedShards) -> None:
    """``pooled``: what the heads make ``joint`` from; no texts."""
    model = MultimodalModel.from_pretrained(folder)
    found = embed_shards(model, str(shards_folder / "train"), in_process=True, level="pooled")
    assert set(found.rows) == {"video", "audio"}
    assert [item.key for item in found.items] == [item.key for item in embedded.items]
    for modality, rows in found.rows.items():
        assert rows.shape == (len(embedded.rows[modality]), model.tower(modality).width)
        joint = torch.nn.functional.normalize(model.heads[modality](rows), dim=1)
        assert torch.allclose(joint, embedded.rows[modality], atol=1e-5)


def rank_rows(rank: int, world: int, model: str, shards: str) -> dict[str, object]:
    found = embed_shards(MultimodalModel.from_pretrained(model), shards, batch=2, in_process=True, comm=Comm.current())
    return {"keys": [item.key for item in found.items], **{m: rows.numpy() for m, rows in found.rows.items()}}


def test_three_processes_embed_the_same(folder: Path, shards_folder: Path, embedded: EmbeddedShards, gloo) -> None:
    """16 samples on 3 ranks of 2 rows: padding is not embedded, every rank returns everything, in order."""
    for found in gloo(3, rank_rows, str(folder), str(shards_folder / "train")):
        assert found["keys"] == [item.key for item in embedded.items]
        for modality, rows in embedded.rows.items():
            assert np.allclose(found[modality], rows.numpy(), atol=1e-6)


def test_lists_by_a_column_with_the_headline_first(embedded: EmbeddedShards) -> None:
    lists = split_lists(embedded, "group", "red")
    assert next(iter(lists)) == "red"
    assert sum(map(len, lists.values())) == 16
    with pytest.raises(ConfigError, match=r"--by colour.*there are: .*group"):
        split_lists(embedded, "colour", None)
    with pytest.raises(ConfigError, match="--headline mauve"):
        split_lists(embedded, "group", "mauve")


def test_groups_by_a_column_or_the_label(embedded: EmbeddedShards) -> None:
    assert group_names(embedded.items, "group") == [str(item.metadata["group"]) for item in embedded.items]
    bare = [dataclasses.replace(item, metadata={}, label=number - 1) for number, item in enumerate(embedded.items[:3])]
    assert group_names(bare, "label") == [None, "0", "1"]
    with pytest.raises(ConfigError, match=r"--per colour.*there are: .*group, label"):
        group_names(embedded.items, "colour")


def test_items_with_the_same_caption_are_right_answers_of_each_other(embedded: EmbeddedShards) -> None:
    labels = caption_labels(embedded.items)
    captions = [item.captions[0] for item in embedded.items]
    for i in range(16):
        for j in range(16):
            assert (labels[i] == labels[j]) == (captions[i] == captions[j])


def test_the_report_of_an_untrained_model(folder: Path, shards_folder: Path, tmp_path: Path) -> None:
    evaluation = evaluate_checkpoint(
        folder, str(shards_folder / "train"), tmp_path, clips=2, workers=1, note="Made up."
    )
    saved = json.loads((tmp_path / "report.json").read_text())
    assert set(saved["directions"]) == {
        f"{a}->{b}" for a in ("text", "video", "audio") for b in ("text", "video", "audio") if a != b
    }
    assert saved["lists"]["all"]["missing"] == {"audio": 2}
    assert next(iter(evaluation.report.headline.directions)) == "text->video"
    page = (tmp_path / "report.html").read_text()
    for kind in ("image/jpeg", "image/svg+xml", "image/webp", "audio/webm"):
        assert f"data:{kind};base64," in page
    names = [part for part in (*shards_folder.parts, "train") if part != "shards"]
    assert saved["title"] == f"{'/'.join(names[-2:])} · {'/'.join(folder.parts[-2:])}"
    assert f"# Retrieval report: {saved['title'].replace('_', chr(92) + '_')}\n" in (tmp_path / "report.md").read_text()
    again = evaluate_checkpoint(folder, str(shards_folder / "train"), tmp_path / "b", clips=2, workers=1)
    assert again.report.fingerprint == evaluation.report.fingerprint


def test_items_are_shown_as_picture_and_sound(embedded: EmbeddedShards, shards_folder: Path) -> None:
    """The middle of each: a poster and a moving clip of it, a picture of its sound and the sound itself."""
    gallery = ShardGallery(load_manifest(shards_folder / "train"), embedded)
    silent = {number for number in range(16) if number not in embedded.owners["audio"].tolist()}
    assert len(gallery) == 16 and len(silent) == 2
    for number, item in enumerate(gallery):
        assert (item.key, item.captions) == (embedded.items[number].key, embedded.items[number].captions)
        assert item.missing == (("audio",) if number in silent else ())
        assert (item.waveform is None) == (item.sound is None) == (number in silent)
    shown = gallery[next(number for number in range(16) if number not in silent)]
    poster = np.asarray(Image.open(io.BytesIO(shown.poster)).convert("RGB"), np.float32).mean((0, 1))
    clip = Image.open(io.BytesIO(shown.clip))
    assert clip.n_frames == CLIP_FRAMES
    clip.seek(CLIP_FRAMES // 2)
    assert np.abs(np.asarray(clip.convert("RGB"), np.float32).mean((0, 1)) - poster).max() < 12
    sample = gallery.sample(next(item.draw for item in embedded.items if item.key == shown.key))
    half = {"start_seconds": 0.0, "end_seconds": 0.5, "sample_rate_hz": 8000}
    waves = [read_audio(media, **half) for media in (shown.sound, sample.audio or sample.video)]
    tones = [int(np.abs(np.fft.rfft(wave)).argmax()) for wave in waves if wave is not None]
    assert len(tones) == 2 and abs(tones[0] - tones[1]) <= 1 < tones[0]


def test_embeddings_are_written(folder: Path, shards_folder: Path, tmp_path: Path) -> None:
    assert len(embed_to_folder(folder, str(shards_folder / "test"), tmp_path / "emb", workers=1)) == 8
    tensors = load_file(tmp_path / "emb/shard-000000.safetensors")
    assert tensors["video.rows"].shape == (5, 32)
    assert tensors["text.items"].tolist() == list(range(5))
    assert len((tmp_path / "emb/shard-000001.jsonl").read_text().splitlines()) == 3


PROGRAM = "import sys\nfrom mmcl.cli import main\ntry:\n    main()\nfinally:\n    print('torch' in sys.modules)"


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["evaluate", "retrieval", "none", "SHARDS", "--out", "OUT"], "none: no such folder"),
        (["evaluate", "retrieval", "MODEL", "none", "--out", "OUT"], "none"),
        (["evaluate", "retrieval", "MODEL", "SHARDS", "--out", "OUT", "--against", "none"], "--against none"),
        (["embed", "MODEL", "none", "--out", "OUT"], "none"),
        (["export", "none", "--out", "OUT"], "none: no such folder"),
        (["train", "none.yaml"], "none.yaml: no such file"),
        (["train", "none.yaml", "--resume", "train.steps=9"], "write --resume auto train.steps=9"),
    ],
)
def test_commands_say_what_is_wrong_in_one_line_and_at_once(
    folder: Path, shards_folder: Path, tmp_path: Path, arguments: list[str], part: str
) -> None:
    """Before torch is imported, which takes seconds."""
    places = {"MODEL": str(folder), "SHARDS": str(shards_folder / "test"), "OUT": str(tmp_path / "out")}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *(places.get(argument, argument) for argument in arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 2, done.stderr
    assert part in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert done.stdout == "False\n"
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_embedded(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    for write in (evaluate_checkpoint, embed_to_folder):
        with pytest.raises(RunError, match=r"cannot write to .*file/report"):
            write(tmp_path / "no checkpoint", "no shards", tmp_path / "file/report")
