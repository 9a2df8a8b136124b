"""Context and motion apart: a clip names a keyframe of its video, and foretells the motion that follows it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from mmcl.config import Options, unknown_name
from mmcl.distributed import Comm
from mmcl.layers import MLPHead
from mmcl.losses._math import unit
from mmcl.losses.points import point_rows
from mmcl.objectives.base import Objective, Term
from mmcl.objectives.ranks import related_rows
from mmcl.objectives.views import learning_tower
from mmcl.objectives.weights import Weight
from mmcl.types import ConfigError, Embeddings, MotionSpec, Need, TowerInfo, VideoSpec, View


class MotionDecouplingOptions(Options):
    """Context matching and motion prediction (Huang et al. 2021, arXiv 2104.00862).

    Context: the clip's features find a keyframe near it among those of all samples. Motion: a transformer reads the
    clip's tokens and foretells, point by point, what the motion tower says of the motion vectors after the clip, among
    all points of all samples and of further motion of the same video. Unlike the official code: velocities are scaled
    with the picture and turned round with a flip (``corrected: false`` of the tower does neither); the heads end
    without batch norm; learned queries are the decoder's first input, and the positions of the clip's tokens are fixed
    waves; samples of equal key, group or caption are no negatives.

    Needs: a video tower that learns, a tower of motion, videos of H.264 or MPEG-4.
    """

    name: Literal["motion_decoupling"] = "motion_decoupling"
    weight: Weight = 1.0
    tower: str = "video"
    """the tower of clips"""
    motion_tower: str = "motion"
    frame_tower: str | None = None
    """the tower of keyframes; null: ``tower``, which then sees a clip of one frame"""
    terms: Literal["both", "context", "motion"] = "both"
    """the sum of both losses, or one of them alone"""
    augmentation: str = "none"
    """a name in ``data.augmentations``: clip and following motion share its crop and flip; the keyframe and the other
    motion have draws of their own"""
    negatives: Annotated[int, Field(ge=0, le=16)] = 3
    """n, further motion of the same video; where it is too short for one apart from the positive, there is none"""
    gap_frames: Annotated[int, Field(ge=0, le=1000)] = 1
    """frames of the motion's rate between the clip's window, which ends half a stride after its last frame, and what is
    foretold: with a stride of 4, 3 frames after the last one"""
    points: Annotated[int, Field(ge=1)] = 16
    """P, tokens of the motion tower"""
    width: Annotated[int, Field(ge=8)] = 512
    """of the transformer"""
    heads: Annotated[int, Field(ge=1)] = 8
    feed_forward: Annotated[int, Field(ge=1)] = 512
    encoder_layers: Annotated[int, Field(ge=0, le=64)] = 2
    decoder_layers: Annotated[int, Field(ge=1, le=64)] = 4
    hidden: Annotated[int, Field(ge=1)] = 2048
    """of the heads, which have batch norm over all ranks"""
    out: Annotated[int, Field(ge=1)] = 512
    """of the heads"""
    temperature: Annotated[float, Field(gt=0)] = 0.1
    mask_false_negatives: bool = True
    """samples of equal key, group or with an equal caption are never each other's negatives"""


class MotionPredictor(nn.Module):
    """Tokens of a clip to features of the P points of what follows it, by a transformer without dropout."""

    def __init__(self, options: MotionDecouplingOptions, clip_width: int) -> None:
        super().__init__()
        width = options.width
        self.lift = nn.Linear(clip_width, width)
        self.queries = nn.Parameter(0.02 * torch.randn(options.points, width))

        def how() -> dict[str, object]:
            return {"dropout": 0.0, "batch_first": True, "norm_first": True, "activation": "gelu"}

        shape = (width, options.heads, options.feed_forward)
        self.encoder = nn.ModuleList(
            nn.TransformerEncoderLayer(*shape, **how())  # type: ignore[arg-type]
            for _ in range(options.encoder_layers)
        )
        self.decoder = nn.ModuleList(
            nn.TransformerDecoderLayer(*shape, **how())  # type: ignore[arg-type]
            for _ in range(options.decoder_layers)
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: Tensor) -> Tensor:
        """``(B, L, D)`` to ``(B, P, width)``; rows do not see each other."""
        memory = self.lift(tokens)
        memory = memory + _waves(memory)
        for layer in self.encoder:
            memory = layer(memory)
        x = self.queries.to(memory.dtype).expand(len(memory), -1, -1)
        for layer in self.decoder:
            x = layer(x, memory)
        out: Tensor = self.norm(x)
        return out


def _waves(x: Tensor) -> Tensor:
    """Sines and cosines of the place of each token, ``(L, D)`` (Vaswani et al. 2017, section 3.5)."""
    length, width = x.shape[1:]
    half = (width + 1) // 2
    rates = 10_000.0 ** (-torch.arange(half, device=x.device, dtype=torch.float64) / half)
    angles = torch.arange(length, device=x.device, dtype=torch.float64)[:, None] * rates
    return torch.stack([angles.sin(), angles.cos()], 2).flatten(1)[:, :width].to(x.dtype)


class MotionDecoupling(Objective):
    """Own rows against the keys of all ranks: ``B · N`` similarities for context, ``B·P · (1+n)·N·P`` for motion."""

    def __init__(
        self,
        options: MotionDecouplingOptions,
        clip: Need,
        frame: Need | None,
        motion: tuple[Need, ...],
        widths: Mapping[str, int],
    ) -> None:
        super().__init__()
        self.options, self.clip, self.frame, self.motion = options, clip, frame, motion
        self.needs = (clip, *([] if frame is None else [frame]), *motion)
        self.watched = tuple(name for name, used in (("context", frame), ("motion", motion)) if used)

        def head(width: int) -> MLPHead:
            return MLPHead(width, options.hidden, options.out, layers=2, norm="batch")

        if frame is not None:
            self.clip_head, self.frame_head = head(widths["clip"]), head(widths["frame"])
        if motion:
            self.predictor = MotionPredictor(options, widths["clip"])
            self.query_head, self.key_head = head(options.width), head(widths["motion"])

    def forward(self, embeddings: Embeddings, comm: Comm) -> Term:
        groups = embeddings.batch.groups
        related = related_rows(groups, comm)
        itself = comm.index(len(groups), groups.device)
        related[torch.arange(len(groups), device=groups.device), itself] = False  # its own keys it always sees
        if not self.options.mask_false_negatives:
            related = torch.zeros_like(related)
        losses = {}
        if self.frame is not None:
            losses["context"] = self._context(embeddings, self.frame, related, comm)
        if self.motion:
            losses["motion"] = self._motion(embeddings, related, comm)
        metrics = {name: loss.detach() for name, loss in losses.items()}
        return Term(torch.stack(list(losses.values())).sum(), metrics)

    def _context(self, embeddings: Embeddings, frame: Need, related: Tensor, comm: Comm) -> Tensor:
        rows = embeddings.present(self.clip.view, frame.view)
        queries = self.clip_head(embeddings.get(self.clip, "pooled"), rows)
        keys = self.frame_head(embeddings.get(frame, "pooled"), rows)
        return self._contrast(queries[:, None], keys[:, None, None], rows, rows[:, None], related, comm)

    def _motion(self, embeddings: Embeddings, related: Tensor, comm: Comm) -> Tensor:
        rows = embeddings.present(self.clip.view, self.motion[0].view)
        maps = torch.stack([embeddings.get(need, "tokens") for need in self.motion], 1)  # (B, K, P, D)
        points = self.options.points
        if maps.shape[2] != points:
            raise ConfigError(
                f"{self.options.name}: points is {points}, but tower {self.options.motion_tower!r} gives "
                f"{maps.shape[2]} tokens; set it to that"
            )
        has = torch.stack([embeddings.present(need.view) for need in self.motion], 1) & rows[:, None]
        keys = self.key_head(maps.flatten(0, 2), has.flatten().repeat_interleave(points)).unflatten(0, maps.shape[:3])
        foretold = self.predictor(embeddings.get(self.clip, "tokens"))
        asked = self.query_head(foretold.flatten(0, 1), rows.repeat_interleave(points)).unflatten(0, foretold.shape[:2])
        return self._contrast(asked, keys, rows, has, related, comm)

    def _contrast(
        self, queries: Tensor, keys: Tensor, rows: Tensor, has: Tensor, related: Tensor, comm: Comm
    ) -> Tensor:
        """``queries (B, P, D)``; ``keys (B, K, P, D)``, the first of them the positive; ``rows (B,)`` that take part;
        ``has (B, K)``: keys that are there.
        """
        with torch.autocast(queries.device.type, enabled=False):
            dtype = queries.dtype if queries.dtype == torch.float64 else torch.float32
            own, own_keys = unit(queries.to(dtype)), unit(keys.to(dtype))
            everyone, absent = comm.gather(own_keys), ~comm.gather(has)
            points = own.shape[1]

            def hidden(numbers: Tensor) -> Tensor:
                unseen = related[numbers // points][:, :, None] | absent
                return unseen.flatten(1).repeat_interleave(points, 1)

            values = point_rows(
                own, own_keys[:, 0], everyone.flatten(0, 2), hidden, temperature=self.options.temperature
            )
            return comm.mean(values, rows[:, None].expand_as(values))


def build(
    options: MotionDecouplingOptions, towers: Mapping[str, TowerInfo], path: str = "objectives.0"
) -> MotionDecoupling:
    """The objective for these towers.

    Raises:
        ConfigError: unknown or frozen towers, towers of other modalities or of pictures cut otherwise, heads that do
            not divide the width; names ``path``.
    """
    clip = learning_tower(options.tower, towers, f"{path}.tower")
    frame = _named(options.frame_tower or options.tower, towers, f"{path}.frame_tower")
    if not isinstance(clip.spec, VideoSpec) or not isinstance(frame.spec, VideoSpec):
        option = "frame_tower" if isinstance(clip.spec, VideoSpec) else "tower"
        raise ConfigError(f"{path}.{option}: a video tower is needed, {getattr(options, option)!r} is none")
    if options.width % options.heads:
        raise ConfigError(f"{path}.heads: {options.heads} do not divide a width of {options.width}")
    widths = {"clip": clip.width, "frame": frame.width}
    motion: tuple[Need, ...] = ()
    if options.terms != "context":
        tower = _named(options.motion_tower, towers, f"{path}.motion_tower")
        widths["motion"] = tower.width
        motion = _motion_needs(options, tower, clip.spec, f"{path}.motion_tower")
    wanted = {"both": ("pooled", "tokens"), "context": ("pooled",), "motion": ("tokens",)}[options.terms]
    seen = Need(clip.name, View(clip.spec, augmentation=options.augmentation), wanted)
    near = None
    if options.terms != "motion":
        picture = dataclasses.replace(frame.spec, frames=1, stride=1, keyframe=True)
        drawn = options.negatives + 1  # numbered on after the motion's, so that its crop is its own
        view = View(picture, augmentation=options.augmentation, copy=drawn, place="near")
        near = Need(frame.name, view, ("pooled",))
    return MotionDecoupling(options, seen, near, motion, widths)


def _motion_needs(options: MotionDecouplingOptions, tower: TowerInfo, clip: VideoSpec, path: str) -> tuple[Need, ...]:
    """The motion after the clip, then the motion elsewhere."""
    spec = tower.spec
    if not isinstance(spec, MotionSpec):
        raise ConfigError(f"{path}: a tower of motion is needed, such as tiny_motion; {tower.name!r} is none")
    if spec.fit != clip.fit:
        raise ConfigError(f"{path}: it fits pictures by {spec.fit!r}, tower {options.tower!r} by {clip.fit!r}")
    augmentation = options.augmentation
    views = [View(spec, augmentation=augmentation, place="after", gap_frames=options.gap_frames)]
    views += [
        View(spec, augmentation=augmentation, copy=1 + number, place="elsewhere") for number in range(options.negatives)
    ]
    return tuple(Need(tower.name, view, ("tokens",)) for view in views)


def _named(name: str, towers: Mapping[str, TowerInfo], path: str) -> TowerInfo:
    if name not in towers:
        raise unknown_name(path, name, towers)
    return towers[name]
