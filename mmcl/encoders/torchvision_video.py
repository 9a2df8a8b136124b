"""``torchvision:NAME``: video networks of torchvision with random weights, eating what their published ones eat."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, NamedTuple

from pydantic import Field
from torch import Tensor, nn

from mmcl.config import unknown_name
from mmcl.encoders.norms import replace_batch_norm
from mmcl.encoders.pixels import NormedOptions, VideoEncoder, renamed, repeated_to, video_spec
from mmcl.types import ConfigError, Features


class Published(NamedTuple):
    """What torchvision's weights say of themselves in prose, and the shape of the network."""

    frames: int
    fps: float
    blocks: tuple[int, ...]
    """of each stage"""
    least_frames: int = 1
    """shorter clips repeat their last frame"""


NETWORKS: Mapping[str, Published] = {
    "r3d_18": Published(16, 15.0, (2, 2, 2, 2)),
    "mc3_18": Published(16, 15.0, (2, 2, 2, 2)),
    "r2plus1d_18": Published(16, 15.0, (2, 2, 2, 2)),
    "s3d": Published(128, 15.0, (), least_frames=8),
    "mvit_v2_s": Published(16, 7.5, (1, 2, 11, 2)),
    "swin3d_t": Published(32, 15.0, (2, 2, 6, 2), least_frames=2),
}


class TorchvisionOptions(NormedOptions):
    """A video network of torchvision."""

    name: str = Field(pattern=r"^torchvision:.+$")
    """``torchvision:`` and one of r3d_18, mc3_18, r2plus1d_18, s3d, mvit_v2_s, swin3d_t"""
    size: Annotated[int, Field(ge=16, le=4096, multiple_of=16)] | None = None
    """pixels, height = width; null: as published"""
    depth: tuple[Annotated[int, Field(ge=1)], ...] | None = None
    """blocks of each stage, to build it smaller; null: as published"""


class TorchvisionVideo(VideoEncoder):
    """uint8 ``(B, T, C, H, W)`` to space-time tokens and their mean, or the class token where the network has one."""

    def __init__(self, options: TorchvisionOptions) -> None:
        from torchvision.models import get_model_weights

        model = options.name.removeprefix("torchvision:")
        if model not in NETWORKS:
            raise unknown_name("tower.name", options.name, [f"torchvision:{name}" for name in NETWORKS])
        published = self.published = NETWORKS[model]
        if options.depth is not None and len(options.depth) != len(published.blocks):
            raise ConfigError(f"tower.depth: {options.name} has {len(published.blocks)} stages, got {options.depth}")
        transform = get_model_weights(model).DEFAULT.transforms()
        super().__init__(
            video_spec(
                options,
                frames=published.frames,
                fps=published.fps,
                size=options.size or transform.crop_size[0],
                mean=transform.mean,
                std=transform.std,
            )
        )
        net, self.width = _build(model, options.depth or published.blocks)
        self.net = replace_batch_norm(net, options.norm)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Features:
        """``x``: uint8 ``(B, T, C, H, W)``; ``mask`` is not used. Tokens unfold to a grid ``(time, height, width)``."""
        pixels = self.normalised(repeated_to(x, self.published.least_frames)).transpose(1, 2)
        return self._features(pixels)

    def _features(self, pixels: Tensor) -> Features:
        for part in self._sequence():
            pixels = part(pixels)
        return from_maps(pixels)

    def _sequence(self) -> list[nn.Module]:
        net: Any = self.net
        if hasattr(net, "features"):
            return list(net.features)
        return [net.stem, *(block for stage in (net.layer1, net.layer2, net.layer3, net.layer4) for block in stage)]

    def blocks(self) -> list[nn.Module]:
        """The stem and each residual block, or each layer of S3D."""
        return [part for part in self._sequence() if any(True for _ in part.parameters())]

    def foreign(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """torchvision's own names, without its classifier."""
        return renamed(tensors, "net.", leave=("fc.", "head.", "classifier."))


class SwinVideo(TorchvisionVideo):
    """Video Swin Transformer (Liu et al. 2021, arXiv 2106.13230)."""

    def _features(self, pixels: Tensor) -> Features:
        net: Any = self.net
        maps = net.features(net.patch_embed(pixels))
        return from_maps(net.norm(maps).movedim(-1, 1))

    def blocks(self) -> list[nn.Module]:
        """The patches, each transformer block, and the merging of patches between stages."""
        net: Any = self.net
        parts = [part if isinstance(part, nn.Sequential) else [part] for part in net.features]
        return [net.patch_embed, *(block for part in parts for block in part)]


class MvitVideo(TorchvisionVideo):
    """MViTv2 (Li et al. 2021, arXiv 2112.01526). ``pooled`` is its class token; any number of frames and pixels."""

    def _features(self, pixels: Tensor) -> Features:
        net: Any = self.net
        maps = net.conv_proj(pixels)
        grid = tuple(maps.shape[2:])
        tokens = net.pos_encoding(maps.flatten(2).transpose(1, 2))
        for block in net.blocks:
            tokens, grid = block(tokens, grid)
        tokens = net.norm(tokens)
        return Features(tokens[:, 0], tokens[:, 1:], grid=tuple(grid))

    def blocks(self) -> list[nn.Module]:
        """The patches and each transformer block; the class token is in front of them."""
        net: Any = self.net
        return [net.conv_proj, *net.blocks]


def build_torchvision(options: TorchvisionOptions) -> TorchvisionVideo:
    """The network that ``options`` name, randomly initialised."""
    kinds = {"torchvision:mvit_v2_s": MvitVideo, "torchvision:swin3d_t": SwinVideo}
    return kinds.get(options.name, TorchvisionVideo)(options)


def from_maps(maps: Tensor) -> Features:
    """Feature maps ``(B, D, T, H, W)`` as tokens and their mean."""
    return Features(maps.mean((2, 3, 4)), maps.flatten(2).transpose(1, 2), grid=tuple(maps.shape[2:]))


def _build(model: str, depth: tuple[int, ...]) -> tuple[nn.Module, int]:
    """The network without its classifier, and ``D``."""
    from torchvision.models import video
    from torchvision.models.video import resnet

    if model == "s3d":
        net: Any = video.s3d()
        net.classifier = nn.Identity()
        return net, 1024
    if model == "swin3d_t":
        net = video.SwinTransformer3d(
            patch_size=[2, 4, 4],
            embed_dim=96,
            depths=list(depth),
            num_heads=[3, 6, 12, 24],
            window_size=[8, 7, 7],
            stochastic_depth_prob=0.0,
        )
        net.head = nn.Identity()
        return net, net.num_features
    if model == "mvit_v2_s":
        net = _mvit(depth)
        net.head = nn.Identity()
        return net, 768
    conv = {
        "r3d_18": [resnet.Conv3DSimple] * 4,
        "mc3_18": [resnet.Conv3DSimple, *[resnet.Conv3DNoTemporal] * 3],
        "r2plus1d_18": [resnet.Conv2Plus1D] * 4,
    }[model]
    stem = resnet.R2Plus1dStem if model == "r2plus1d_18" else resnet.BasicStem
    net = resnet.VideoResNet(resnet.BasicBlock, conv, list(depth), stem)
    net.fc = nn.Identity()
    return net, 512


def _mvit(depth: tuple[int, ...]) -> nn.Module:
    """MViTv2-S (table 4 of arXiv 2112.01526): stages of 1, 2, 11 and 2 blocks; the first block of a later stage
    halves height and width and doubles channels and heads.
    """
    from torchvision.models.video.mvit import MSBlockConfig, MViT

    settings = []
    width = 96
    for stage, count in enumerate(depth):
        for number in range(count):
            first = number == 0 and stage > 0
            settings.append(
                MSBlockConfig(
                    num_heads=2**stage,
                    input_channels=width,
                    output_channels=2 * width if first else width,
                    kernel_q=[3, 3, 3],
                    kernel_kv=[3, 3, 3],
                    stride_q=[1, 2, 2] if first else [1, 1, 1],
                    stride_kv=[1, 8 >> stage, 8 >> stage],
                )
            )
            width *= 2 if first else 1
    net: nn.Module = MViT(
        # tables of relative positions have the published size and are interpolated to what comes
        spatial_size=(224, 224),
        temporal_size=16,
        block_setting=settings,
        residual_pool=True,
        residual_with_cls_embed=False,
        rel_pos_embed=True,
        proj_after_attn=True,
        dropout=0.0,
        stochastic_depth_prob=0.0,
    )
    return net
