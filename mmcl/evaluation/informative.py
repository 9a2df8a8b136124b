"""Informative embeddings of shards: the states of a cMIM's decoder, for the same probes as any other embedding."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mmcl.config import unknown_name
from mmcl.distributed import Comm
from mmcl.evaluation.embed import _Embedder, own_device
from mmcl.evaluation.embedding_store import EmbeddedShards, EmbedSettings, join
from mmcl.folders import model_folder
from mmcl.model import MultimodalModel
from mmcl.objectives.generative import CMIM
from mmcl.recipe import build_model, load_config
from mmcl.shards import load_manifest
from mmcl.types import DEFAULT_DECODER, ConfigError, Decoder, Modality, RunError, View, ViewBatch


def load_cmim(
    checkpoint: Path | str, objective: str = "cmim", *, modality: Modality | None = None
) -> tuple[MultimodalModel, CMIM]:
    """The model of a checkpoint and one of the objectives that were trained with it, both in eval mode.

    Args:
        checkpoint: a checkpoint or a run folder; an exported model has no objectives.
        objective: its name in the run; where several are of one kind, the later ones bear their number: ``cmim_1``.
        modality: in place of a name: the first whose tower is of this modality.

    Raises:
        ConfigError: no such checkpoint, or no cMIM of that name or modality in it.
        RunError: its objectives cannot be read.
    """
    folder = model_folder(Path(checkpoint))
    if not (folder / "objectives.safetensors").exists():
        raise ConfigError(f"{folder}: holds a model without its objectives; give a checkpoint of the run")
    _, mix = build_model(load_config(folder / "config.yaml"), fresh=False)
    found = {name: each for name, each in mix.each().items() if isinstance(each, CMIM)}
    if modality is not None:
        mine = [name for name, each in found.items() if each.tower.modality == modality]
        if not mine:
            known = ", ".join(dict.fromkeys(each.tower.modality for each in found.values())) or "nothing"
            raise ConfigError(f"{folder}: no cmim of {modality} was trained, but of {known}")
        objective = mine[0]
    if objective not in found:
        raise unknown_name("objective", objective, found)
    try:
        mix.load_state_dict(load_file(folder / "objectives.safetensors"))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise RunError(f"{folder}/objectives.safetensors: cannot be read: {' '.join(str(error).split())}") from None
    return MultimodalModel.from_pretrained(folder).eval(), found[objective].eval()


def embed_informative(
    checkpoint: Path | str,
    shards: str,
    *,
    objective: str = "cmim",
    modality: Modality | None = None,
    clips: int = 1,
    each_view: bool = False,
    batch: int = 64,
    workers: int = 2,
    in_process: bool = False,
    decoder: Decoder = DEFAULT_DECODER,
    comm: Comm | None = None,
) -> EmbeddedShards:
    """The informative embedding, ``(n, width of the decoder)``, of every sample that has the objective's modality.

    ``modality`` chooses the objective in place of its name. Of a sample with several captions the first is embedded.
    Further options are those of :func:`~mmcl.evaluation.embed.embed_shards`; raises what it and :func:`load_cmim` do.
    """
    model, found = load_cmim(checkpoint, objective, modality=modality)
    manifest = load_manifest(shards)
    settings = EmbedSettings(clips, level="pooled", each_view=each_view, decoder=decoder)
    embedder = _Informative(model.to(own_device()), found, settings, batch, comm or Comm.current())
    parts = dict(embedder.run(manifest, None, workers=workers, in_process=in_process))
    embedded = join([parts[shard] for shard in range(manifest.num_shards)])
    if not embedded.items:
        raise RunError(f"{shards}: none of {manifest.num_samples} samples could be read")
    return embedded


class _Informative(_Embedder):
    """An embedder of one tower, whose rows go through the objective."""

    def __init__(
        self, model: MultimodalModel, objective: CMIM, settings: EmbedSettings, batch: int, comm: Comm
    ) -> None:
        super().__init__(model, settings, batch, comm)
        self.objective, tower = objective.to(self.device), objective.tower
        self.text = None
        self.towers = {tower.modality: tower.name}
        self.views = {tower.modality: [View(tower.spec, clip) for clip in range(settings.clips)]}
        self.all_views = self.views[tower.modality]

    def widths(self) -> dict[Modality, int]:
        return dict.fromkeys(self.towers, self.objective.options.decoder.width)

    def _encode(self, tower: str, views: Sequence[ViewBatch]) -> Tensor:
        pooled = [self.model.encode_view(tower, view, ["pooled"])["pooled"] for view in views]
        rows = [self.objective.informative(x, view).float() for x, view in zip(pooled, views, strict=True)]
        return torch.stack(rows, 1) if self.settings.each_view else torch.stack(rows).mean(0)
