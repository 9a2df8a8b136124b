"""What is clustered, and a stage on clusters of one sample."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.recipes import ROOT, tiny_config

import mmcl
from mmcl.data.clusters import Clusters
from mmcl.evaluation.embed import embed_to_folder
from mmcl.multistage.run import rows_to_cluster
from mmcl.recipe import build_model
from mmcl.shards import load_manifest
from mmcl.training.launch import pretrain
from mmcl.types import ConfigError


def test_a_sample_without_the_modality_goes_by_another(shards_folder: Path, tmp_path: Path) -> None:
    build_model(tiny_config())[0].save_pretrained(tmp_path / "model")
    shards = str(shards_folder / "train")
    stored = embed_to_folder(tmp_path / "model", shards, tmp_path / "joint", in_process=True)
    numbers, rows = rows_to_cluster(stored, "audio")
    assert numbers.tolist() == list(range(16))
    whole = stored.load()
    heard = dict(zip(whole.owners["audio"].tolist(), whole.rows["audio"], strict=True))
    assert 0 < len(heard) < 16, "the generated set has clips without sound"
    for number in range(16):
        assert torch.allclose(rows[number], heard.get(number, whole.rows["video"][number]), atol=1e-6)
    words = rows_to_cluster(stored, "text")[1]
    mine = whole.rows["text"][whole.owners["text"] == 0]
    assert torch.allclose(words[0], F.normalize(mine.mean(0), dim=0), atol=1e-6)
    assert torch.equal(rows_to_cluster(stored, None)[1], rows_to_cluster(stored, "video")[1])
    with pytest.raises(ConfigError, match=r"multistage\.modality"):
        rows_to_cluster(stored, "vidio")
    pooled = embed_to_folder(tmp_path / "model", shards, tmp_path / "pooled", in_process=True, level="pooled")
    numbers, rows = rows_to_cluster(pooled, "audio")
    assert numbers.tolist() == sorted(heard), "rows of two towers before their heads lie in no common space"
    assert torch.allclose(rows.norm(dim=1), torch.ones(len(rows)))


def test_a_label_of_one_sample_trains_on_without_negatives(shards_folder: Path, tmp_path: Path) -> None:
    """Also with batch statistics, which are then of one sample's two views."""
    manifest = load_manifest(str(shards_folder / "train"))
    labels = np.array([4, *[0] * 7, *[9] * 8])
    Clusters(labels, (10,), manifest.fingerprint).save(tmp_path / "clusters.safetensors")
    settings = [
        "model.towers.video={name: tiny_video, width: 32, channels: 16, size: 32, frames: 2, fps: 4}",
        f"data.clusters={tmp_path / 'clusters.safetensors'}",
        f"data.shards={shards_folder / 'train'}",
        f"train.out={tmp_path / 'run'}",
        *("train.steps=3", "train.global_batch=8", "train.log_every=1", "train.threads=1"),
        *("data.decoder=pyav", "data.in_process=true"),
    ]
    pretrain(mmcl.load_config(ROOT / "configs/pretrain/intra_modal_simclr.yaml", settings))
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 3 and lines[-1]["epoch"] == 1.0
    assert all(math.isfinite(value) for line in lines for value in line.values())
    alone = [line for line in lines if line["negatives"] == 0]
    assert [line["loss"] for line in alone] == [0.0]
