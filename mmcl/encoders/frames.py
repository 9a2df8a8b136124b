"""Image networks on each frame: ``timm:NAME``, and what such towers share with ``open_clip:NAME``."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field
from torch import Tensor, nn

from mmcl.config import unknown_name
from mmcl.encoders.norms import replace_batch_norm
from mmcl.encoders.pixels import NormedOptions, VideoEncoder, renamed, video_spec
from mmcl.encoders.temporal import TemporalHead, TemporalOptions
from mmcl.types import ConfigError, Features, VideoSpec


class FramesOptions(NormedOptions):
    """An image network on each frame; one of ``frames: 1`` is a tower for pictures."""

    temporal: TemporalOptions = TemporalOptions()
    """from frames to a clip"""
    config: dict[str, Any] = Field(default_factory=dict)
    """arguments of the network to change, such as its depth"""


class TimmOptions(FramesOptions):
    """An image network of timm."""

    name: str = Field(pattern=r"^timm:.+$")
    """``timm:`` and a name of ``timm.list_models()``, such as ``timm:vit_small_patch16_224``"""
    size: Annotated[int, Field(ge=16, le=4096)] | None = None
    """pixels, height = width; null: as published"""


class FramesEncoder(VideoEncoder):
    """One token a frame; ``pooled`` as ``temporal`` says. ``tower`` takes normalised pictures to ``(B·T, D)``."""

    def __init__(self, spec: VideoSpec, tower: nn.Module, width: int, options: FramesOptions) -> None:
        super().__init__(spec)
        self.tower = replace_batch_norm(tower, options.norm)
        self.width = width
        try:
            self.temporal = TemporalHead(options.temporal, width, spec.frames)
        except ValueError as error:
            raise ConfigError(f"tower.temporal.heads: {error}") from None

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Features:
        """``x``: uint8 ``(B, T, C, H, W)``; ``mask`` is not used."""
        frames = self.tower(self.normalised(x).flatten(0, 1)).unflatten(0, x.shape[:2])
        pooled, tokens = self.temporal(frames)
        return Features(pooled, tokens, grid=(x.shape[1],))

    def blocks(self) -> list[nn.Module]:
        """The parts of the image network, its stages taken apart, and what turns frames into a clip."""
        return [part for part in [*_parts(self.tower), self.temporal] if any(True for _ in part.parameters())]


class TimmFrames(FramesEncoder):
    """An image network of timm on each frame, without its classifier."""

    def __init__(self, options: TimmOptions) -> None:
        import timm
        from timm.data import resolve_model_data_config

        model = options.name.removeprefix("timm:")
        if not timm.is_model(model):  # a name may also ask for a download: hf-hub:…
            raise unknown_name("tower.name", options.name, [f"timm:{name}" for name in timm.list_models()])
        changes = dict(options.config)
        published = timm.get_pretrained_cfg(model)
        if options.size is not None and published is not None and published.fixed_input_size:
            changes = {"img_size": options.size, **changes}
        try:
            tower: Any = timm.create_model(model, pretrained=False, num_classes=0, **changes)
        except (TypeError, ValueError, RuntimeError, AssertionError) as error:
            raise ConfigError(f"tower.config: {options.name} cannot be built with {options.config}: {error}") from error
        eats = resolve_model_data_config(tower)
        size = options.size or eats["input_size"][-1]
        spec = video_spec(options, frames=8, fps=4.0, size=size, mean=eats["mean"], std=eats["std"])
        super().__init__(spec, tower, getattr(tower, "head_hidden_size", tower.num_features), options)
        classifier = tower.pretrained_cfg.get("classifier") or ()
        self._classifiers = (classifier,) if isinstance(classifier, str) else tuple(classifier)

    def foreign(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """timm's own names, without the classifier."""
        own = {name: tensor for name, tensor in tensors.items() if name.startswith(("tower.", "temporal."))}
        theirs = {name: tensor for name, tensor in tensors.items() if name not in own}
        return {**own, **renamed(theirs, "tower.", leave=[f"{name}." for name in self._classifiers])}


def _parts(module: nn.Module) -> list[nn.Module]:
    """Children from input to output; lists of them, and the trunks of open_clip's towers, are taken apart."""
    found = []
    for name, child in module.named_children():
        apart = isinstance(child, (nn.Sequential, nn.ModuleList)) or name in ("trunk", "transformer")
        found += _parts(child) if apart else [child]
    return found
