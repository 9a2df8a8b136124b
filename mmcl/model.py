"""Towers, joint heads and temperatures: the one place that runs encoders."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from mmcl.config import Options, build, unknown_name
from mmcl.encode import Encodes
from mmcl.encoders.base import Encoder
from mmcl.encoders.build import TowerOptions, build_towers, exported_towers
from mmcl.encoders.fusion import Fusions, LearnedFusionOptions
from mmcl.encoders.heads import HeadOptions, unit_projection
from mmcl.encoders.lora import without_lora
from mmcl.encoders.pretrained import Source, load_pretrained
from mmcl.encoders.shared import Shared, SharedOptions
from mmcl.encoders.stored import card_name, found_tower, spec_values, stored_tower, tower_files
from mmcl.folders import CONFIG
from mmcl.hub import Pretrained
from mmcl.layers import absent_rows
from mmcl.objectives.base import LEVELS
from mmcl.types import (
    Batch,
    ConfigError,
    Embeddings,
    Features,
    Kind,
    Level,
    Need,
    TowerInfo,
    View,
    ViewBatch,
)

Values: TypeAlias = dict[tuple[str, View, Level, Kind], Tensor]

MAX_LOG_SCALE = math.log(100.0)
"""CLIP's clamp of the learned multiplier (Radford et al. 2021, section 2.5)."""


class ModelOptions(Options):
    """Named towers and the joint space."""

    towers: Annotated[dict[str, TowerOptions], Field(min_length=1)]
    joint_width: Annotated[int, Field(ge=2)] = 128
    head: HeadOptions = HeadOptions()
    heads: dict[str, HeadOptions] = Field(default_factory=dict)
    """tower: its head, where it is another than ``head``"""
    temperature: Annotated[float, Field(gt=0.01, le=10)] = 0.07
    """where the learned temperatures start"""
    learn_temperature: bool = True
    fusion: LearnedFusionOptions = LearnedFusionOptions()
    """of the sets of towers that objectives name, such as ``video+audio``"""


class _Description(Options):
    """What ``config.json`` of a model folder holds."""

    model: ModelOptions
    scales: tuple[str, ...] = ()
    fusions: tuple[str, ...] = ()
    momentum: tuple[str, ...] = ()
    """towers with a momentum copy"""


class MultimodalModel(Encodes, Pretrained):
    """Named towers, one projection each into a joint space, one learned temperature per pair."""

    def __init__(self, options: ModelOptions) -> None:
        super().__init__()
        self.options, self.joint_width = options, options.joint_width
        encoders = build_towers(options.towers)
        self.towers = nn.ModuleDict(encoders)
        for name in options.heads:
            if name not in encoders:
                raise unknown_name("model.heads", name, encoders)
        heads = {name: options.heads.get(name, options.head) for name in encoders}
        self.heads = nn.ModuleDict({n: heads[n].build(encoders[n].width, options.joint_width) for n in encoders})
        self.momentum_towers, self.momentum_heads = nn.ModuleDict(), nn.ModuleDict()
        self.log_scales, self.fusions = nn.ParameterDict(), Fusions()
        self.loaded: list[str] = []
        for name in encoders:
            if self.head_locked(name):
                self.heads[name].requires_grad_(False)
        self.train()

    def train(self, mode: bool = True) -> MultimodalModel:
        """As any module, but what is locked stays in eval mode: no dropout, no running statistics."""
        super().train(mode)
        for name in self.towers:
            if self.head_locked(name):
                self.heads[name].eval()
        return self

    def head_locked(self, tower: str) -> bool:
        """Whether a tower is not trained, nor its head (teachers)."""
        return getattr(self.options.towers[tower], "lock", None) == "with_head"

    def owner(self, tower: str) -> str:
        """The tower that holds the weights of this one: itself, unless it shares another's."""
        options = self.options.towers[tower]
        return options.tower if isinstance(options, SharedOptions) else tower

    def load_pretrained(self, functions: Mapping[str, Source] | None = None) -> None:
        """Gives towers, and their heads where they are of the same shape, the weights that ``pretrained`` names;
        ``loaded`` tells of it.

        Args:
            functions: tower: what gives its weights instead, for example a function that returns named tensors.

        Raises:
            ConfigError: a name is no tower, nothing can be read, or it does not fit.
        """
        sources: dict[str, Source | None] = {n: getattr(o, "pretrained", None) for n, o in self.options.towers.items()}
        for name in functions or {}:
            if name not in sources or self.owner(name) != name:
                raise unknown_name("pretrained", name, [n for n in sources if self.owner(n) == n])
        sources.update(functions or {})
        self.loaded = [
            load_pretrained(self.tower(n), self.heads[n], source, tower=n, path=f"model.towers.{n}.pretrained")
            for n, source in sources.items()
            if source is not None
        ]

    def description(self) -> dict[str, Any]:
        """The options, with what towers read from folders named by its place in the model folder."""
        model = self.options.model_dump(mode="json")
        for name, tower in model["towers"].items():
            tower.update(stored_tower(name, self.options.towers[name]))
        momentum = list(self.momentum_heads)
        return {"model": model, "scales": list(self.log_scales), "fusions": list(self.fusions), "momentum": momentum}

    @classmethod
    def from_description(cls, description: dict[str, Any], *, folder: Path) -> MultimodalModel:
        where = str(folder / CONFIG)
        described = build(_Description, description, where=where)
        towers = {
            name: tower.model_copy(update=found_tower(tower, folder, where=f"{where}: model.towers.{name}"))
            for name, tower in described.model.towers.items()
        }
        model = cls(described.model.model_copy(update={"towers": towers}))
        model.add_scales(described.scales)
        model.add_fusions(described.fusions)
        for tower in described.momentum:
            if tower not in model.towers:
                raise unknown_name(f"{where}: momentum", tower, model.towers)
            model.add_momentum(tower)
        return model

    def preprocessing(self) -> dict[str, Any]:
        return {"towers": {name: spec_values(self.tower(name).spec) for name in self.towers}}

    def assets(self) -> dict[str, Path]:
        towers = self.options.towers.items()
        return {target: source for name, tower in towers for target, source in tower_files(name, tower).items()}

    def export(
        self, folder: str | Path, *, facts: Mapping[str, str] | None = None, report: Mapping[str, Any] | None = None
    ) -> Path:
        """The model folder without momentum copies, its card with ``facts`` and the figures of a ``report``."""
        return self.alone().save_pretrained(folder, model_card_kwargs=self._card_facts(facts, report))

    def push_to_hub(self, repo_id: str, **arguments: Any) -> str:
        """Uploads what :meth:`export` writes, as one commit; the URL of the commit. See :class:`Pretrained`."""
        given = dict(arguments.pop("model_card_kwargs", None) or {})
        if given or self._card is None:
            arguments["model_card_kwargs"] = self._card_facts(given.get("facts"), given.get("report"))
        return super(MultimodalModel, self.alone()).push_to_hub(repo_id, **arguments)

    def card_names(self) -> dict[str, str]:
        """What each tower is, for people."""
        return {name: card_name(tower) for name, tower in self.options.towers.items()}

    def _card_facts(self, facts: Mapping[str, str] | None, report: Mapping[str, Any] | None) -> dict[str, Any]:
        own = {
            "towers": ", ".join(f"{name} ({told})" for name, told in self.card_names().items()),
            "parameters": f"{sum(p.numel() for n, p in self.named_parameters() if not n.startswith('momentum_')):,}",
            "joint space": f"{self.joint_width} numbers",
        }
        own.update({"learned fusion of": ", ".join(self.fusions)} if self.fusions else {})
        return {"facts": {**own, **(facts or {})}, "report": report}

    def alone(self) -> MultimodalModel:
        """A copy for use alone: no momentum copies, LoRA merged, nothing of how towers were trained."""
        options = self.options.model_copy(update={"towers": exported_towers(self.options.towers)})
        model = MultimodalModel(options)
        model._card = self._card
        model.add_scales(self.log_scales)
        model.add_fusions(self.fusions)
        kept = ("momentum_", *(f"towers.{name}." for name in self.towers))
        tensors = {k: v for k, v in self.state_dict().items() if not k.startswith(kept)}
        for name in self.towers:
            tensors.update({f"towers.{name}.{k}": v for k, v in without_lora(self.tower(name)).state_dict().items()})
        model.load_state_dict(tensors)
        return model

    def add_scales(self, names: Iterable[str], starts: Mapping[str, float] | None = None) -> None:
        """Gives the model a temperature for each name, e.g. one per pair of towers (``"video-text"``).

        They start at ``starts``, those that it does not name at the model's ``temperature``.
        """
        for name in names:
            start = -math.log((starts or {}).get(name, self.options.temperature))
            self.log_scales[name] = nn.Parameter(torch.tensor(start), requires_grad=self.options.learn_temperature)

    def add_fusions(self, names: Iterable[str]) -> None:
        """Gives the model a learned fusion of each of these sets of towers, e.g. ``"video+audio"``.

        Raises:
            ConfigError: a name is not of two towers or more.
        """
        self.fusions.add(names, list(self.towers), self.joint_width, self.options.fusion)

    def add_momentum(self, tower: str) -> None:
        """Gives a tower and its head a copy that follows them without a gradient (:meth:`ema_pairs`)."""
        owner, encoder = self.owner(tower), self.tower(tower)
        if owner not in self.momentum_towers:
            self.momentum_towers[owner] = copy.deepcopy(self.towers[owner]).requires_grad_(False)
        if isinstance(encoder, Shared):
            self.momentum_towers[tower] = encoder.on(self.momentum_towers[owner])
        self.momentum_heads[tower] = copy.deepcopy(self.heads[tower]).requires_grad_(False)

    def ema_pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        """(online, momentum copy) of towers and their heads."""
        copies = [(self.towers, self.momentum_towers), (self.heads, self.momentum_heads)]
        return [(online[name], copied[name]) for online, copied in copies for name in copied]

    def serve(self, needs: Iterable[Need]) -> None:
        """Makes the momentum copies that ``needs`` ask for; what none of them uses gets no gradient.

        A parameter that never takes part would keep the ranks waiting for its gradient.
        """
        needs = list(needs)
        for tower in dict.fromkeys(need.tower for need in needs if need.kind == "momentum"):
            self.add_momentum(tower)
        online = [need for need in needs if need.kind == "online"]
        for name in self.towers:
            if name not in {self.owner(need.tower) for need in online}:
                self.towers[name].requires_grad_(False)
            if name not in {need.tower for need in online if {"joint", "joint_tokens"} & set(need.levels)}:
                self.heads[name].requires_grad_(False)

    def tower(self, name: str) -> Encoder:
        encoder = self.towers[name]
        assert isinstance(encoder, Encoder)
        return encoder

    def tower_infos(self) -> dict[str, TowerInfo]:
        """What objectives may know of the towers."""
        infos = {}
        for name in self.towers:
            tower = self.tower(name)
            learns = getattr(self.options.towers[self.owner(name)], "lock", "all") not in ("all", "with_head")
            infos[name] = TowerInfo(
                name,
                tower.spec,
                tower.width,
                self.options.joint_width,
                learns,
                tower.stages,
                not self.head_locked(name),
                tower.causal_patch,
            )
        return infos

    def tower_of(self, modality: str) -> str:
        """The first tower of a modality; :class:`ConfigError` if there is none."""
        for name in self.towers:
            if self.tower(name).spec.modality == modality:
                return name
        raise ConfigError(f"the model has no {modality} tower; it has: {', '.join(self.towers)}")

    def scales(self) -> dict[str, Tensor]:
        """The multipliers of the cosine, 0-d, at most 100."""
        return {name: parameter.clamp(max=MAX_LOG_SCALE).exp() for name, parameter in self.log_scales.items()}

    def forward(self, batch: Batch, needs: Iterable[Need]) -> Embeddings:
        """Runs each tower once per view that is needed of it, on the present rows alone."""
        return self.embeddings(self.encode(batch, needs), batch)

    def embeddings(self, values: Values, batch: Batch) -> Embeddings:
        """Values that were encoded before, with the temperatures and fusions of now."""
        return Embeddings(values, batch, self.scales(), dict(self.fusions.items()))

    def learning_values(self, values: Values) -> list[tuple[str, View, Level, Kind]]:
        """The keys of those that towers or heads learn from."""
        return [key for key in values if self._learns(key[0], key[3])]

    def _learns(self, tower: str, kind: Kind) -> bool:
        modules = (self.towers[self.owner(tower)], self.heads[tower])
        parts = (p for module in modules for p in module.parameters())
        return kind == "online" and any(p.requires_grad for p in parts)

    def encode(self, batch: Batch, needs: Iterable[Need], *, learning_only: bool = False) -> Values:
        """The values of :class:`Embeddings`. Towers that learn run first, so that with ``learning_only``, which leaves
        out the others, they draw the same random numbers.
        """
        runs: dict[tuple[str, View, Kind], list[Level]] = {}
        for need in needs:
            levels = runs.setdefault((need.tower, need.view, need.kind), [])
            levels += [level for level in need.levels if level not in levels]
        learns = {run: self._learns(run[0], run[2]) for run in runs}
        values: dict[tuple[str, View, Level, Kind], Tensor] = {}
        for run in sorted(runs, key=lambda run: not learns[run]):
            tower, view, kind = run
            if learning_only and not learns[run]:
                continue
            with torch.set_grad_enabled(learns[run] and torch.is_grad_enabled()):
                for level, value in self.encode_view(tower, batch.views[view], runs[run], kind).items():
                    values[(tower, view, level, kind)] = value
        return values

    def encode_view(
        self, tower: str, view: ViewBatch, levels: Sequence[Level], kind: Kind = "online"
    ) -> dict[Level, Tensor]:
        """Levels of one tower or its momentum copy, ``(B, …)``, of questions ``(B, K + J, …)``; absent rows are zero.

        A rank without any present row runs one dummy row whose result is joined with weight 0, so that every rank
        uses every parameter and no collective of DDP or FSDP is missed.
        """
        rows = view.present.nonzero().squeeze(1)
        dummy, everyone = len(rows) == 0, len(rows) == len(view)
        if dummy:
            rows = torch.zeros(1, dtype=torch.long, device=view.data.device)
        # most batches have all rows: nothing to pick out, nothing to put back
        picked = slice(None) if everyone and not dummy else rows
        mask = None if view.mask is None else view.mask[picked]
        towers, heads = (self.towers, self.heads) if kind == "online" else (self.momentum_towers, self.momentum_heads)
        values: dict[Level, Tensor] = {}
        with absent_rows(dummy):
            data, texts = view.data[picked], None
            if mask is not None and mask.ndim == 3:  # the texts of questions, each read alone
                texts, data, mask = mask.shape[:2], data.flatten(0, 1), mask.flatten(0, 1)
            features: Features = towers[tower](data, mask)
            found = [self._level(tower, heads[tower], features, level) for level in levels]
            found = [x if texts is None else x.view(*texts, *x.shape[1:]) for x in found]
        if not {"joint", "pooled"} & set(levels):  # DDP waits for the parameters behind the last of the levels too
            found[0] = found[0] + 0.0 * features.pooled.sum()
        for level, value in zip(levels, found, strict=True):
            if isinstance(picked, slice):
                values[level] = value
                continue
            out = value.new_zeros((len(view), *value.shape[1:]))
            values[level] = out + 0.0 * value.sum() if dummy else out.index_copy(0, rows, value)
        return values

    def _level(self, tower: str, head: nn.Module, features: Features, level: Level) -> Tensor:
        if level == "joint":
            return unit_projection(head, features.pooled)
        if level == "joint_tokens" and features.tokens is not None:
            # batch statistics are of rows: tokens go through a head one by one
            real = None if features.token_mask is None else features.token_mask.flatten()
            rows = unit_projection(head, features.tokens.flatten(0, 1), real)
            return rows.view(*features.tokens.shape[:2], -1)
        if level == "pooled":
            return features.pooled
        if level == "tokens" and features.tokens is not None:
            return features.tokens
        stage = level.removeprefix("stage:")
        if level.startswith("stage:") and stage in features.stages:
            return features.stages[stage]
        known = ", ".join([*LEVELS, *(f"stage:{name}" for name in features.stages)])
        raise ConfigError(f"tower {tower!r} has no level {level!r}; allowed: {known}")


def average_windows(rows: Sequence[Tensor]) -> Tensor:
    """The unit mean of unit rows ``(B, D)``, one per window of the same clips."""
    return rows[0] if len(rows) == 1 else F.normalize(torch.stack(list(rows)).mean(0), dim=-1)


def parameter_counts(model: MultimodalModel) -> Mapping[str, int]:
    """Parameters that learn, of each tower with its head and of the whole."""

    def learning(*modules: nn.Module) -> int:
        return sum(p.numel() for module in modules for p in module.parameters() if p.requires_grad)

    return {
        **{name: learning(model.towers[name], model.heads[name]) for name in model.towers},
        "total": learning(model),
    }
