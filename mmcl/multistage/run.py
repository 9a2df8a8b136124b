"""Stages one after the other: train, embed, cluster, and train anew on batches of one pseudo-label.

What a stage leaves behind, in ``stage_N`` of the run folder: ``run`` (its checkpoints), and, where another follows,
``embeddings`` of all samples, ``centroids.safetensors`` and ``clusters.safetensors``, the labels that the next stage
draws by. Labels come last, so a stage whose labels are there is done.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor

from mmcl.concatenated import write_stages
from mmcl.config import to_yaml, unknown_name
from mmcl.data.clusters import Clusters, check_radix, read_clusters, with_digit
from mmcl.distributed import Comm
from mmcl.evaluation.embed import embed_to_folder
from mmcl.evaluation.embedding_store import EmbeddedShards, StoredEmbeddings
from mmcl.multistage.kmeans import assign, kmeans
from mmcl.recipe import RunConfig
from mmcl.shards.files import write_atomically
from mmcl.shards.manifest import Manifest, load_manifest
from mmcl.training.checkpoint import save_tensors
from mmcl.training.launch import together, train, training_processes
from mmcl.training.signals import StopRequest
from mmcl.types import ConfigError, Modality, RunError


def run_stages(config: RunConfig) -> bool:
    """Trains all stages into ``train.out``, or goes on with them; on one process or as one rank of many.

    In the end the folder is a model: what ``mmcl embed`` and ``mmcl evaluate`` read, the stages' rows concatenated
    (:class:`~mmcl.concatenated.ConcatenatedModel`).

    Returns:
        Whether all are done; False after a stop that was asked for.

    Raises:
        ConfigError: a wrong configuration, or stages of another one.
        RunError: a stage cannot go on.
    """
    out, stages = Path(config.train.out), config.multistage.stages
    manifest = _only_manifest(config)
    with StopRequest(out / "stop") as stop, training_processes(config) as accelerator:
        comm = Comm.current()
        for stage in range(stages):
            last = stage == stages - 1
            if not last and together(lambda: _is_done(config, manifest, stage)):  # noqa: B023
                continue
            if comm.rank == 0:
                print(f"stage {stage} of {stages}", flush=True)
            if not _train(stage_config(config, stage), accelerator, stop):
                return False
            if not last:
                _cluster(config, stage, manifest, comm)
            if comm.any(stop.requested) and not last:
                return False
        if comm.rank == 0:
            write_atomically(out / "config.yaml", to_yaml(config).encode())
            write_stages(out, [f"{_folder(out, stage).name}/run" for stage in range(stages)])
            print(f"{stages} stages in {out}: mmcl evaluate and mmcl embed read their concatenation there", flush=True)
        comm.barrier()
    return True


def stage_config(config: RunConfig, stage: int) -> RunConfig:
    """What a stage trains: the same from the same start, in its own folder, on batches of the labels before it."""
    out = Path(config.train.out)
    clusters = None if stage == 0 else str(labels_file(out, stage - 1))
    return config.model_copy(
        update={
            "data": config.data.model_copy(update={"clusters": clusters}),
            "train": config.train.model_copy(update={"out": str(_folder(out, stage) / "run")}),
        }
    )


def labels_file(out: Path, stage: int) -> Path:
    """The labels that a stage leaves for the next."""
    return _folder(out, stage) / "clusters.safetensors"


def _folder(out: Path, stage: int) -> Path:
    return out / f"stage_{stage}"


def _only_manifest(config: RunConfig) -> Manifest:
    """The shards, which pseudo-labels are of."""
    if config.data.clusters is not None:
        raise ConfigError("data.clusters: the stages make their own; leave it out")
    if not isinstance(config.data.shards, str):
        raise ConfigError("data.shards: stages are of one folder or URL of indexed shards, not of several sources")
    check_radix([config.multistage.clusters] * config.multistage.stages)
    return load_manifest(config.data.shards)


def _is_done(config: RunConfig, manifest: Manifest, stage: int) -> bool:
    """Whether the labels of a stage are there. ConfigError where they are of other shards or another K."""
    path = labels_file(Path(config.train.out), stage)
    if not path.exists():
        return False
    found, radix = read_clusters(path), (config.multistage.clusters,) * (stage + 1)
    if found.manifest != manifest.fingerprint or found.radix != radix:
        raise ConfigError(f"{path}: labels of other shards, or of {found.radix} clusters; take another train.out")
    return True


def _train(config: RunConfig, accelerator: Accelerator, stop: StopRequest) -> bool:
    finished = train(config, accelerator, stop, resume="auto")
    for tracker in accelerator.trackers:
        tracker.finish()
    accelerator.free_memory()  # or the models of all stages would stay
    return finished


def _cluster(config: RunConfig, stage: int, manifest: Manifest, comm: Comm) -> None:
    """Embeds all samples, the ranks together; the first parts them into clusters and writes their labels."""
    out, options, data = Path(config.train.out), config.multistage, config.data
    stored = embed_to_folder(
        _folder(out, stage) / "run",
        manifest.url,
        _folder(out, stage) / "embeddings",
        clips=config.evaluate.clips,
        level=options.level,
        workers=data.workers,
        in_process=data.in_process,
        decoder=data.decoder,
        comm=comm,
    )

    def write() -> None:
        if comm.rank > 0:
            return
        numbers, rows = rows_to_cluster(stored, options.modality)
        centroids = kmeans(rows, options.clusters, seed=config.train.seed, fit_rows=options.fit_rows)
        digits = np.full(manifest.num_samples, -1, np.int64)
        digits[numbers.numpy()] = assign(rows, centroids).numpy()
        before = read_clusters(labels_file(out, stage - 1)) if stage else None
        labels = np.zeros_like(digits) if before is None else before.labels
        radix = () if before is None else before.radix
        labels = with_digit(labels, digits, options.clusters)
        made = Clusters(labels, (*radix, options.clusters), manifest.fingerprint)
        save_tensors(_folder(out, stage) / "centroids.safetensors", {"centroids": centroids})
        made.save(labels_file(out, stage))
        print(_told(made, config.train.global_batch), flush=True)

    together(write)
    comm.barrier()


def rows_to_cluster(stored: StoredEmbeddings, modality: Modality | None) -> tuple[Tensor, Tensor]:
    """Numbers int64 ``(n,)`` of samples, and their unit rows float32 ``(n, D)``.

    A sample's row is the mean of its rows of ``modality``; in the joint space, where it has none, of the next that it
    has. Samples without any are left out.

    Raises:
        ConfigError: the model has no such modality.
        RunError: no sample has any.
    """
    names = sorted(stored.modalities, key=lambda name: name == "text")
    first = modality or next(iter(names))
    if first not in names:
        raise unknown_name("multistage.modality", first, names)
    others = [name for name in names if name != first] if stored.index.settings.get("level") == "joint" else []
    parts = [_sample_rows(part, [first, *others]) for part in stored]
    numbers, rows = (torch.cat(each) for each in zip(*parts, strict=True))
    if not len(numbers):
        raise RunError(f"{stored.index.folder}: no sample has rows of {first}, there is nothing to cluster")
    return numbers, rows


def _sample_rows(part: EmbeddedShards, modalities: list[Modality]) -> tuple[Tensor, Tensor]:
    numbers = torch.tensor([item.draw for item in part.items], dtype=torch.int64)
    width = part.rows[modalities[0]].shape[1]
    found = torch.zeros(len(numbers), width)
    missing = torch.ones(len(numbers), dtype=torch.bool)
    for modality in modalities:
        owners, rows = part.owners[modality], F.normalize(part.rows[modality].float(), dim=1)
        here = missing[owners]
        found.index_add_(0, owners[here], rows[here])
        missing[owners] = False
    return numbers[~missing], F.normalize(found[~missing], dim=1)


def _told(made: Clusters, batch: int) -> str:
    """A line on what the next stage draws from."""
    counts = sorted(made.counts.values())
    steps, out = sum(-(-count // batch) for count in counts), int((made.labels < 0).sum())
    line = (
        f"{len(counts)} pseudo-labels of {counts[0]:,} to {counts[-1]:,} samples: an epoch of the next stage is "
        f"{steps:,} batches, {1 - sum(counts) / (steps * batch):.1%} of whose rows are holes"
    )
    return line + (f"; {out:,} samples that could not be read are left out" if out else "")
