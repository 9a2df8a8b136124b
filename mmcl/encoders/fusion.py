"""Learned fusion: the joint rows of several towers as one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from mmcl.config import Options, unknown_name
from mmcl.layers import MLPHead
from mmcl.types import ConfigError


class LearnedFusionOptions(Options):
    """What a learned fusion adds to the sum of its members' rows: an MLP of all of them. It starts at zero."""

    layers: Annotated[int, Field(ge=2, le=4)] = 2
    hidden: Annotated[int, Field(ge=1)] = 512


class Fusion(nn.Module):
    """Unit rows of ``members`` towers to one unit row: normalise(Σ rows + MLP(rows side by side)).

    The MLP's last layer starts at zero: until it learns, a fusion is the unit mean of the rows. The sum stays in it, as
    the image does in TIRG (Vo et al. 2019, arXiv 1812.07119), so that it does not begin by spoiling what towers learn.
    """

    def __init__(self, members: int, width: int, options: LearnedFusionOptions) -> None:
        super().__init__()
        self.mlp = MLPHead(members * width, options.hidden, width, options.layers)
        for parameter in self.mlp.linears[-1].parameters():
            nn.init.zeros_(parameter)

    def forward(self, rows: Sequence[Tensor]) -> Tensor:
        """``(B, D)`` of each member, in their order, to ``(B, D)``; float32, also under autocast, or float64."""
        with torch.autocast(rows[0].device.type, enabled=False):
            rows = [x if x.dtype == torch.float64 else x.float() for x in rows]
            added: Tensor = self.mlp(torch.cat(rows, -1))
            return F.normalize(torch.stack(rows).sum(0) + added, dim=-1)


class Fusions(nn.ModuleDict):
    """The fusions of a model by name, such as ``video+audio``: its members in the order of the model's towers."""

    def add(self, names: Iterable[str], towers: Sequence[str], width: int, options: LearnedFusionOptions) -> None:
        """Makes those of these names.

        Raises:
            ConfigError: a name is not of two towers or more.
        """
        for name in names:
            members = name.split("+")
            for tower in members:
                if tower not in towers:
                    raise unknown_name(f"fusion {name}", tower, towers)
            if len(set(members)) < max(2, len(members)):
                raise ConfigError(f"fusion {name}: needs two towers or more, each once")
            self[name] = Fusion(len(members), width, options)

    def of(self, towers: Iterable[str]) -> str:
        """The name of the fusion of these towers, in whatever order.

        Raises:
            ConfigError: there is none; names those that there are.
        """
        wanted = list(towers)
        for name in self:
            if sorted(name.split("+")) == sorted(wanted):
                return name
        raise ConfigError(
            f"the model has no learned fusion of {'+'.join(wanted)}; it has: {', '.join(self) or 'none'} "
            "(objective cross_modal learns those that its pairs name)"
        )

    @torch.no_grad()
    def fuse(self, rows: Mapping[str, Tensor]) -> Tensor:
        """What :meth:`mmcl.encode.Encodes.fuse` says."""
        name = self.of(rows)
        if len({x.shape for x in rows.values()}) > 1:
            raise ValueError(f"rows of {name} differ in shape: {', '.join(str(tuple(x.shape)) for x in rows.values())}")
        fusion = self[name]
        device = next(fusion.parameters()).device
        fused: Tensor = fusion([rows[tower].to(device) for tower in name.split("+")])
        return fused.float().cpu()
